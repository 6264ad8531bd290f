"""Weights under TransformerLens' names, tokens as text, and the logit lens.

    lens(r) = norm(r) W_U

The norm is the model's final one, gain included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sae_lens_maira.errors import HookError


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of one attention layer, in TransformerLens' shapes."""

    W_Q: torch.Tensor
    """`(heads, d_model, d_head)`."""
    W_K: torch.Tensor
    """`(kv_heads, d_model, d_head)`."""
    W_V: torch.Tensor
    """`(kv_heads, d_model, d_head)`."""
    W_O: torch.Tensor
    """`(heads, d_head, d_model)`."""


@dataclass(frozen=True)
class MLPWeights:
    """Matrices of one MLP, in TransformerLens' shapes."""

    W_gate: torch.Tensor
    """`(d_model, d_mlp)`."""
    W_in: torch.Tensor
    """`(d_model, d_mlp)`."""
    W_out: torch.Tensor
    """`(d_mlp, d_model)`."""


@dataclass(frozen=True)
class BlockWeights:
    """Weights of one decoder block; views of the model's own tensors."""

    attn: AttentionWeights
    mlp: MLPWeights


class LensMixin:
    """Weights, tokens and logit lens of a wrapped MAIRA-2."""

    model: nn.Module
    tokenizer: Any
    points: Any
    cfg: Any

    @property
    def _decoder(self) -> Any:
        return self.model.get_submodule("model.language_model")

    @property
    def blocks(self) -> list[BlockWeights]:
        """Weights of the decoder blocks, under TransformerLens' names: `blocks[3].attn.W_O`."""
        size = self.cfg.d_head

        def split(linear: Any) -> torch.Tensor:
            return linear.weight.unflatten(0, (-1, size)).transpose(1, 2)

        return [
            BlockWeights(
                AttentionWeights(
                    split(layer.self_attn.q_proj),
                    split(layer.self_attn.k_proj),
                    split(layer.self_attn.v_proj),
                    layer.self_attn.o_proj.weight.T.unflatten(0, (-1, size)),
                ),
                MLPWeights(
                    layer.mlp.gate_proj.weight.T, layer.mlp.up_proj.weight.T, layer.mlp.down_proj.weight.T
                ),
            )
            for layer in self._decoder.layers
        ]

    @property
    def norms(self) -> list[nn.Module]:
        """The norms of the residual stream: ln1 and ln2 per block, then the final one."""
        layers = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in self._decoder.layers]
        return [*(norm for pair in layers for norm in pair), self._decoder.norm]

    def ln_final(self, residual: torch.Tensor) -> torch.Tensor:
        """The final norm, gain included, without its hooks: `(..., d_model)`."""
        return self._decoder.norm.forward(residual)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> torch.Tensor:
        """Sum of the output biases up to a layer `(d_model,)`: zero, since Llama's projections have none."""
        return self.W_E.new_zeros(self.cfg.d_model)

    @property
    def W_E(self) -> torch.Tensor:
        """Token embeddings `(d_vocab, d_model)`."""
        model: Any = self.model
        return model.get_input_embeddings().weight

    @property
    def W_U(self) -> torch.Tensor:
        """Unembedding `(d_model, d_vocab)`; MAIRA-2 does not tie it to `W_E`."""
        model: Any = self.model
        return model.lm_head.weight.T

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> torch.Tensor:
        """Tokenize text.

        Args:
            input: One text or several.
            prepend_bos: False leaves the tokenizer's BOS out; None and True keep it.
            padding_side: "left" or "right"; None for the tokenizer's default.
            move_to_device: Whether the ids go to the model's device.
            truncate: Whether texts are cut at the model's context length.

        Returns:
            Ids `(B, L)`, padded with the tokenizer's pad token.

        Raises:
            HookError: The model was wrapped without a processor.
        """
        tokenizer = self._tokenizer()
        sides = {} if padding_side is None else {"padding_side": padding_side}
        model: Any = self.model
        ids = tokenizer(
            [input] if isinstance(input, str) else list(input),
            return_tensors="pt",
            padding=True,
            truncation=truncate,
            max_length=model.config.text_config.max_position_embeddings if truncate else None,
            add_special_tokens=prepend_bos is not False,
            **sides,
        )["input_ids"]
        return ids.to(self.W_E.device) if move_to_device else ids

    def to_single_token(self, word: str) -> int:
        """The id of a text that is one token.

        Raises:
            HookError: It is several, or the model was wrapped without a processor.
        """
        ids = self._tokenizer()(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise HookError(
                f"{word!r} is {len(ids)} tokens; expected one. Choose a word that the tokenizer keeps whole."
            )
        return int(ids[0])

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> Any:
        """The tokens of a text as strings.

        Args:
            input: A text, or token ids `(L,)` or `(1, L)`; a list gives one result per item.
            prepend_bos: For text, as in `to_tokens`.
            padding_side: For text, as in `to_tokens`.

        Returns:
            One string per token, decoded one by one, as TransformerLens' models give them.
        """
        if isinstance(input, (list, tuple)):
            return [self.to_str_tokens(item, prepend_bos, padding_side) for item in input]
        ids = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else input
        ids = torch.as_tensor(ids)
        if ids.ndim > 1 and ids.shape[:-1].numel() > 1:
            raise HookError(
                f"to_str_tokens was given ids of shape {tuple(ids.shape)}; expected one row. Pass list(ids)."
            )
        return self._tokenizer().batch_decode(ids.reshape(-1, 1), clean_up_tokenization_spaces=False)

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of token ids: a string for `(L,)`, a list of strings for `(B, L)`."""
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return self._tokenizer().batch_decode(ids, clean_up_tokenization_spaces=False)
        return self._tokenizer().decode(ids, clean_up_tokenization_spaces=False)

    def tokens_to_residual_directions(self, tokens: int | str | torch.Tensor) -> torch.Tensor:
        """Columns of `W_U` for token ids, or for the token of a word: `(..., d_model)`."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.T[tokens]

    def lens(self, residual: torch.Tensor) -> torch.Tensor:
        """Logits that a residual stream would give if the model ended there.

        Args:
            residual: `(..., d_model)`.

        Returns:
            `(..., d_vocab)`.
        """
        model: Any = self.model
        norm, head = model.model.language_model.norm, model.lm_head
        # The modules' own forwards: a hook at ln_final or unembed is about the run, not about the lens.
        return head.forward(norm.forward(residual.to(head.weight)))

    @torch.no_grad()
    def logit_lens(
        self, input: Any, layers: Sequence[int] | None = None, position: int | slice = -1, **kwargs: Any
    ) -> torch.Tensor:
        """The logit lens after each block.

        Args:
            input: As in `forward`.
            layers: Blocks whose output is read; None for all.
            position: Positions that are read; all of them at once cost layers x L x d_vocab numbers.
            **kwargs: As in `forward`.

        Returns:
            `(layers, B, d_vocab)` for one position, `(layers, B, positions, d_vocab)` for a slice.
        """
        count = self.points.counts["block"]
        chosen = list(range(count)) if layers is None else [i + count if i < 0 else i for i in layers]
        names = [f"blocks.{i}.hook_resid_post" for i in chosen]
        host: Any = self
        _, cache = host.run_with_cache(input, names_filter=names, stop_at_layer=max(chosen) + 1, **kwargs)
        return torch.stack([self.lens(cache[name][:, position]) for name in names])

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise HookError(
                "Text needs a tokenizer, and this model was wrapped without a processor. Wrap the result of"
                " load_maira2, or pass processor=."
            )
        return self.tokenizer

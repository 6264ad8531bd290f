"""Reading the residual stream in words: embedding and unembedding matrices, and the logit lens.

    lens(r) = norm(r) W_U

The norm is the model's final one, gain included. It knows nothing about how the stream was obtained.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sae_lens_maira.errors import HookError


class LensMixin:
    """Matrices and logit lens of a wrapped MAIRA-2."""

    model: nn.Module
    tokenizer: Any
    points: Any

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
            input: one text or several.
            prepend_bos: False leaves the tokenizer's BOS out; None and True keep it.
            padding_side: "left" or "right"; None is the tokenizer's own.
            move_to_device: whether the ids go to the model's device.
            truncate: whether texts are cut at the model's context length.

        Returns:
            Ids `(B, L)`, padded with the tokenizer's pad token.

        Raises:
            HookError: the model was wrapped without a processor.
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
            HookError: it is several, or the model was wrapped without a processor.
        """
        ids = self._tokenizer()(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise HookError(
                f"{word!r} is {len(ids)} tokens; expected one. Choose a word that the tokenizer keeps whole."
            )
        return int(ids[0])

    def to_str_tokens(self, ids: torch.Tensor) -> list[str]:
        """The token strings of ids `(L,)` or `(1, L)`."""
        return self._tokenizer().convert_ids_to_tokens(ids.reshape(-1).tolist())

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
            input: as in `forward`.
            layers: blocks whose output is read; None is all.
            position: positions that are read; all of them at once cost layers x L x d_vocab numbers.
            **kwargs: as in `forward`.

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

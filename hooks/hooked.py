"""MAIRA-2 as a TransformerLens model: names for activations, caches, hooks, early stop, SAEs, generation.

`HookedMaira2` wraps the transformers model and runs it unchanged, so its logits are the wrapped model's, bit
for bit; hooks are attached by `_attach.py`. It works with TransformerLens 2.17 and 3.9, next to nnsight on the
same model, and as `override_model` of SAELens' runners. It takes a study, a list of studies, an encoding or
tensors.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks._attach import StopForward, stopping_at
from sae_lens_maira.hooks._cache import GeneratedValues
from sae_lens_maira.hooks._inputs import ModelInputs, gather_inputs
from sae_lens_maira.hooks._lens import LensMixin
from sae_lens_maira.hooks._positions import Bypass, Positions
from sae_lens_maira.hooks._root import Filter
from sae_lens_maira.hooks._splice import SplicingPoints
from sae_lens_maira.maira2 import (
    MAX_NEW_TOKENS,
    Maira2,
    Maira2Encoding,
    Maira2ForConditionalGeneration,
    Maira2Processor,
    load_maira2,
    role_mask,
)

logger = logging.getLogger(__name__)


@dataclass
class HookedMaira2Config:
    """What TransformerLens and SAELens read from a model's `cfg`."""

    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    model_name: str
    device: torch.device
    dtype: torch.dtype
    original_architecture: str = "Maira2ForConditionalGeneration"
    positional_embedding_type: str = "rotary"
    normalization_type: str = "RMS"
    is_multimodal: bool = True
    use_attn_result: bool = False
    attn_only: bool = False


class HookedMaira2(LensMixin, SplicingPoints):
    """A MAIRA-2 with named hook points.

    Args:
        model: The result of `load_maira2`, or a `Maira2ForConditionalGeneration`.
        processor: Its processor; needed for studies and text, taken from `model` if that is a `Maira2`.
        model_name: Model name that SAEs trained on it record.

    Raises:
        HookError: The model is not MAIRA-2's module graph.

    Example:
        ```python
        hooked = HookedMaira2.from_pretrained("microsoft/maira-2")
        logits, cache = hooked.run_with_cache(study, names_filter="blocks.15.hook_resid_post",
        stop_at_layer=16) ```
    """

    def __init__(
        self,
        model: Maira2 | Maira2ForConditionalGeneration,
        processor: Maira2Processor | None = None,
        model_name: str = "microsoft/maira-2",
    ) -> None:
        if isinstance(model, Maira2):
            model, processor = model.model, processor or model.processor
        super().__init__(model)
        self.processor = processor
        self.tokenizer: Any = None if processor is None else processor.tokenizer
        text: Any = model.config.text_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.cfg = HookedMaira2Config(
            n_layers=text.num_hidden_layers,
            d_model=text.hidden_size,
            n_heads=text.num_attention_heads,
            n_key_value_heads=text.num_key_value_heads,
            d_head=head,
            d_mlp=text.intermediate_size,
            d_vocab=text.vocab_size,
            n_ctx=text.max_position_embeddings,
            model_name=model_name,
            device=self.W_E.device,
            dtype=self.W_E.dtype,
        )
        self._positions = Positions()
        self._reported_length = False

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path = "microsoft/maira-2", **kwargs: Any) -> "HookedMaira2":
        """Load a checkpoint, or "phantom", with `load_maira2` (whose keyword arguments these are) and wrap it."""
        return cls(load_maira2(path_or_id, **kwargs), model_name=str(path_or_id))

    def inputs(self, given: Any, **kwargs: Any) -> ModelInputs:
        """The model's tensors for any accepted input; see `gather_inputs`. The first long prompt is reported."""
        pad: Any = self.model.config
        inputs = gather_inputs(
            given, self.processor, self.W_E.device, pad_token_id=pad.pad_token_id, **kwargs
        )
        ids = inputs.tensors.get("input_ids")
        if ids is not None and ids.shape[1] > self.cfg.n_ctx and not self._reported_length:
            self._reported_length = True
            logger.warning(long_prompt(ids.shape[1], pad.text_config))
        return inputs

    def encode(
        self,
        study: Any,
        report: Any = None,
        task: str | None = None,
        phrase: Any = None,
        padding_side: str | None = None,
        max_new_tokens: int | None = None,
    ) -> Maira2Encoding:
        """Encode studies, with the report that follows the prompt.

        Args:
            study: A study, a list of studies, or a `Maira2Encoding`, which is returned unchanged.
            report: None for the prompt alone; "teacher" for the study's own report; "generated" for one that the
                model writes now; or a text (for a list of studies, one text per study).
            task: "findings" (also None), "grounded" or "phrase".
            phrase: The phrase of task "phrase".
            padding_side: "left" (also None) or "right".
            max_new_tokens: Token budget of a generated report; None for the task's budget.

        Returns:
            The encoding, on the model's device.

        Raises:
            HookError: Something other than studies, or an encoding together with arguments for studies.
            PromptError: The study lacks a frontal image or the report that was requested.
        """
        single = isinstance(report, str) and report not in ("teacher", "generated")
        options = {
            "task": task,
            "phrase": phrase,
            "padding_side": padding_side,
            "report": None if report == "generated" else [report] if single else report,
        }
        if isinstance(study, Maira2Encoding):
            options["report"] = None if report == "teacher" else report
        encoding = self.inputs(study, encode=options).encoding
        if encoding is None:
            raise HookError(
                f"The input is {type(study).__name__}; expected a study, a list of studies or a Maira2Encoding."
            )
        encoding = encoding.to(self.W_E.device)
        if report != "generated":
            return encoding
        if padding_side == "right":
            raise HookError(
                "report='generated' was combined with padding_side='right', but a report is generated after the "
                "prompt. Leave padding_side out."
            )
        ids = self.generate(encoding, max_new_tokens=max_new_tokens, task=task)
        return encoding.extend(ids[:, encoding.input_ids.shape[1] :])

    def run_with_cache(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Run the model and keep the values at the named points; see `HookedPoints.run_with_cache`.

        A report that has to be generated is written first, without the caching hooks.
        """
        if kwargs.get("report") == "generated":
            given = args[0] if args else kwargs.pop("input")
            names = ("report", "task", "phrase", "padding_side")
            encoding = self.encode(given, **{name: kwargs.pop(name) for name in names if name in kwargs})
            args = (encoding, *args[1:])
        return super().run_with_cache(*args, **kwargs)

    def forward(
        self,
        input: Any = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        prepend_bos: bool | None = None,
        loss_roles: Any = None,
        task: str | None = None,
        phrase: Any = None,
        report: Any = None,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """One forward pass.

        Args:
            input: A study, a list of studies, a `Maira2Encoding`, a mapping of tensors, token ids `(B, L)`,
                text.
            return_type: "logits", "loss", "both" or None.
            loss_per_token: Whether the loss keeps its `(B, L - 1)` axes.
            stop_at_layer: Run only the blocks before this one (negative: from the end) and return the
                residual stream `(B, L, d_model)` there.
            prepend_bos: Accepted for TransformerLens' sake; prompts carry their own BOS.
            loss_roles: Token roles whose tokens count as targets of the mean loss; needs an encoding or
                studies.
            task: For studies, see `encode`.
            phrase: For studies, see `encode`.
            report: For studies, see `encode`; "generated" writes the report with the hooks in force.
            padding_side: For studies, see `encode`.
            **kwargs: `attention_mask` and `pixel_values` for token ids; further arguments of the model.

        Returns:
            Logits `(B, L, d_vocab)`, the loss (mean over targets, in nats), a pair of both, or None.

        Raises:
            HookError: An unsupported input, `prepend_bos=True`, a hook that never fired, a stop out of
                range.
            PromptError: Image placeholders and images do not agree.
        """
        if prepend_bos:
            raise HookError(
                "prepend_bos=True was requested, but MAIRA-2's prompts carry their own BOS. Leave it out, or"
                " put the token in front yourself."
            )
        if return_type not in ("logits", "loss", "both", None):
            raise HookError(f"return_type is {return_type!r}; use 'logits', 'loss', 'both' or None.")
        tensors = {name: kwargs.pop(name, None) for name in ("input_ids", "attention_mask", "pixel_values")}
        if any(value is not None for value in (task, phrase, report, padding_side)):
            input = self.encode(input, report, task, phrase, padding_side)
        inputs = self.inputs(input, **tensors)
        stop = self.points.stop_before(stop_at_layer)
        with self._running(inputs), self._watching(), stopping_at(self.model, stop, self.cfg.n_layers):
            try:
                # No cache unless requested: at 4,000 positions it is 2 GB in bf16 that is not read.
                output = self.model(**inputs.tensors, **{"use_cache": False, **kwargs})
            except StopForward as stopped:
                return stopped.residual
        if return_type is None:
            return None
        if return_type == "logits":
            return output.logits
        loss = self._loss(output.logits, inputs, loss_per_token, loss_roles)
        return loss if return_type == "loss" else (output.logits, loss)

    def _loss(self, logits: torch.Tensor, inputs: ModelInputs, per_token: bool, roles: Any) -> torch.Tensor:
        ids = inputs.tensors["input_ids"].to(logits.device)
        nll = -logits.log_softmax(dim=-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        if per_token and roles is None:
            return nll
        if per_token:
            raise HookError(
                "loss_per_token=True and loss_roles were both given; a loss per token keeps every"
                " position. Take it without loss_roles and select with role_mask."
            )
        if roles is not None:
            if inputs.encoding is None:
                raise HookError(
                    "loss_roles needs token roles, which tensors do not carry. Pass a study or a"
                    " Maira2Encoding."
                )
            counted = role_mask(inputs.encoding, roles).to(nll.device)[:, 1:]
        else:
            mask = inputs.tensors.get("attention_mask", torch.ones_like(ids)).to(nll.device).bool()
            counted = mask[:, 1:] & mask[:, :-1]
        if not bool(counted.any()):
            raise HookError(
                f"No target of the loss has one of the roles {roles!r}. Encode with report='teacher', so that"
                " there is a report to predict."
            )
        return nll[counted].mean()

    @torch.no_grad()
    def generate(
        self,
        input: Any = None,
        max_new_tokens: int | None = None,
        return_type: str = "tokens",
        task: str | None = None,
        phrase: Any = None,
        names_filter: Filter = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate, greedily by default, with every hook and SAE in force.

        Vision and projector points fire once, with the prompt; the others fire again for every new token.

        Args:
            input: As in `forward`.
            max_new_tokens: Token budget; None for the task's budget.
            return_type: "tokens" for transformers' result, `(B, L + T)` ids with the prompt; "reports" for
                one `ParsedReport` per row.
            task: For studies: "findings", "grounded" or "phrase".
            phrase: For studies and task "phrase".
            names_filter: Hook points whose values are kept, as in `run_with_cache`: the result is then a pair of the
                result and a cache of name -> `(B, L + T - 1, ...)`. Position i belongs to token i of the result; the
                last token is written and never read. Vision and projector points have their one value.
            device: Device of the kept values, for instance "cpu".
            **kwargs: `attention_mask`, `pixel_values` with token ids; arguments of transformers'
                `generate`.

        Raises:
            HookError: An input of another kind, a hook added by name that never fired, or values requested for beams,
                several samples or attention patterns.
            PromptError: Image placeholders and images do not agree.
        """
        if return_type not in ("tokens", "reports"):
            raise HookError(f"return_type is {return_type!r}; use 'tokens' or 'reports'.")
        encode = {"task": task, "phrase": phrase}
        tensors = {name: kwargs.pop(name, None) for name in ("input_ids", "attention_mask", "pixel_values")}
        inputs = self.inputs(input, encode=encode, **tensors)
        arguments = {
            "max_new_tokens": max_new_tokens or MAX_NEW_TOKENS[task or "findings"],
            "do_sample": False,
        } | kwargs
        model: Any = self.model
        names = self._generated_names(names_filter, arguments)
        kept = GeneratedValues(self.points, device)
        pairs = [(known, kept.keep) for known in dict.fromkeys(names.values())]
        with self._running(inputs), self._watching(), self.hooks(pairs) if pairs else nullcontext():
            output = model.generate(**inputs.tensors, **arguments)
        result = output if return_type == "tokens" else self._reports(output, inputs)
        if names_filter is None:
            return result
        cache = kept.cache()
        return result, cache | {name: cache[known] for name, known in names.items()}

    def _generated_names(self, wanted: Filter, arguments: dict[str, Any]) -> dict[str, str]:
        """Requested name -> name of the point, for values that are kept during `generate`."""
        if wanted is None:
            return {}
        if callable(wanted):
            found = {name: name for name in self._chosen(wanted)}
        else:
            found = {name: self.resolve(name) for name in ([wanted] if isinstance(wanted, str) else wanted)}
        patterns = [name for name in found.values() if name.endswith("attn.hook_pattern")]
        several = [name for name in ("num_beams", "num_return_sequences") if (arguments.get(name) or 1) > 1]
        if patterns or several:
            what = (
                f"{patterns[0]!r}, whose shape changes with every token" if patterns else f"{several[0]} > 1"
            )
            raise HookError(
                f"Values of generated tokens were requested with {what}. Generate first, then pass the tokens to"
                " run_with_cache."
            )
        return found

    def _reports(self, output: Any, inputs: ModelInputs) -> list[Any]:
        if self.processor is None:
            raise HookError(
                "Reports are read by a processor, and this model was wrapped without one. Pass one."
            )
        new = getattr(output, "sequences", output)[:, inputs.tensors["input_ids"].shape[1] :]
        return [self.processor.decode_report(row) for row in new]

    @contextmanager
    def _running(self, inputs: ModelInputs) -> Iterator[None]:
        roles = None if inputs.encoding is None else inputs.encoding.roles
        with self.exclusive(), self._positions.following(self.model, roles):
            yield

    def _bypass(self, site: str, exclude: bool | Sequence[int], roles: Any) -> Bypass:
        return self._positions.bypass(self.points.points[site], self.tokenizer, exclude, roles)


def long_prompt(length: int, text_config: Any) -> str:
    """Message for a prompt that has more positions than the configuration names.

    Args:
        length: Tokens of the longest row.
        text_config: The decoder's configuration.
    """
    named = text_config.max_position_embeddings
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    factor = float(rope.get("factor", 1.0))
    return (
        f"The prompt has {length:,} tokens, and max_position_embeddings is {named:,}. Nothing is cut: rotary positions "
        f"have no table, and this model divides them by {factor:g}, so the last one counts as {length / factor:,.0f}. "
        "MAIRA-2 reaches such a length with three images; leave out the lateral or the prior image to stay below."
    )

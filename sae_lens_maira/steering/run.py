"""Run a model under interventions: one context manager for transformers, HookedMaira2 and nnsight.

    with steering(maira, sae, "blocks.3.hook_resid_post", [Add(latents=(7,))], encoding, p99=p99) as run:
        ids = run.generate(max_new_tokens=60)
    run.effect.ratio

The same `Engine` edits the stream in all three, so their results are equal. The model is restored when the block
ends, also after an exception.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from sae_lens import SAE
from torch import nn

from sae_lens_maira.errors import HookError, InterventionError
from sae_lens_maira.hooks import HookedMaira2, Point, PointTable
from sae_lens_maira.maira2 import (
    MAX_NEW_TOKENS,
    Maira2,
    Maira2Encoding,
    Maira2ForConditionalGeneration,
    Maira2Processor,
    ParsedReport,
    generate_reports,
)
from sae_lens_maira.steering.engine import Effect, Engine
from sae_lens_maira.steering.interventions import Intervention

if TYPE_CHECKING:
    from sae_lens_maira.hooks import Maira2NNsight

    Backend = Maira2 | Maira2ForConditionalGeneration | HookedMaira2 | Maira2NNsight


class Steering:
    """A steered batch, returned by `steering`.

    Attributes:
        encoding: The batch that is steered.
    """

    def __init__(self, backend: "Backend", point: Point, engine: Engine, encoding: Maira2Encoding) -> None:
        self._backend, self._point, self._engine, self.encoding = backend, point, engine, encoding

    @property
    def hook_name(self) -> str:
        """Name of the hook point."""
        return self._point.name

    @property
    def effect(self) -> Effect:
        """Effect of the interventions so far."""
        return self._engine.effect

    def generate(self, max_new_tokens: int = MAX_NEW_TOKENS["findings"], **kwargs: Any) -> torch.Tensor:
        """Generate for the encoding, greedily by default.

        Args:
            max_new_tokens: Maximum number of new tokens.
            **kwargs: Arguments of transformers' `generate`: `use_cache`, `num_beams`, `do_sample`, ...

        Returns:
            (rows, L + T) ids including the prompt; rows are studies times returned sequences.
        """
        arguments: dict[str, Any] = {
            "do_sample": False,
            "pad_token_id": self.encoding.pad_token_id,
            "eos_token_id": self.encoding.eos_token_id,
        } | kwargs
        if is_nnsight(self._backend):
            edits = {self._point.name: lambda value, _step: self._engine(value)}
            return self._backend.generate_edited(self.encoding, edits, max_new_tokens, **arguments)
        # The hook points of a HookedMaira2 are on the model it wraps, so they fire here as well.
        with torch.no_grad():
            output: Any = _model(self._backend).generate(
                **self.encoding.model_inputs(), max_new_tokens=max_new_tokens, **arguments
            )
        return getattr(output, "sequences", output)

    def reports(
        self, processor: Maira2Processor, max_new_tokens: int = MAX_NEW_TOKENS["findings"], **kwargs: Any
    ) -> list[ParsedReport]:
        """Generate, and parse the reports."""
        ids = self.generate(max_new_tokens, **kwargs)
        return [processor.decode_report(row) for row in ids[:, self.encoding.input_ids.shape[1] :]]

    def logits(self) -> torch.Tensor:
        """(B, L, d_vocab) logits of one forward pass over the encoding."""
        if is_nnsight(self._backend):
            raise InterventionError(
                "Logits under nnsight are read in a trace; pass the model or a HookedMaira2."
            )
        with torch.no_grad():
            return _model(self._backend)(**self.encoding.model_inputs(), use_cache=False).logits


@contextmanager
def steering(
    maira: "Backend",
    sae: SAE[Any] | None,
    hook_name: str,
    interventions: Intervention | Sequence[Intervention],
    encoding: Maira2Encoding,
    p99: torch.Tensor | None = None,
    require_effect: bool = True,
    control_seed: int | None = None,
) -> Iterator[Steering]:
    """Apply interventions at a hook point while the block runs.

    Args:
        maira: The model itself, a `Maira2`, a `HookedMaira2` or a `Maira2NNsight`. With nnsight only
            `Steering.generate` is steered; with the others any forward or `generate` of the encoding is.
        sae: SAE whose latents are meant; None if there are only directions.
        hook_name: A hook point of shape (B, L, d_model) inside the decoder.
        interventions: What to do, in order.
        encoding: The batch that will run, on the model's device.
        p99: (d_sae,) units of the latents, from `stats.p99` or the latent records.
        require_effect: Refuse a run that reached its positions but changed nothing.
        control_seed: Replace every change by a random direction of the same norm, drawn with this seed.

    Raises:
        InterventionError: Invalid input (before the block), or a run that did nothing (after it).
    """
    items = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    model = _model(maira)
    point = check_point(model, hook_name, sae)
    width = model.config.get_text_config().hidden_size
    engine = Engine(sae, items, encoding, p99, width, control_seed=control_seed)
    run = Steering(maira, point, engine, encoding)
    with ExitStack() as stack:
        if isinstance(maira, HookedMaira2):
            stack.enter_context(_hooked(maira, point.name, engine))
        elif not is_nnsight(maira):
            handle = edit_output(model.get_submodule(point.module), engine)
            stack.callback(handle.remove)
        yield run
    engine.require(require_effect)


def steered_reports(
    maira: Maira2,
    sae: SAE[Any] | None,
    hook_name: str,
    interventions: Sequence[Intervention],
    studies: Sequence[Any],
    max_new_tokens: int = MAX_NEW_TOKENS["findings"],
    batch_size: int = 32,
) -> list[str]:
    """Greedy reports of studies under interventions; the model's own without any.

    Args:
        maira: The model.
        sae: SAE whose latents are meant; None if there are only directions.
        hook_name: A hook point of shape (B, L, d_model) inside the decoder.
        interventions: What to do, in order; may be empty, and may change nothing in some studies.
        studies: What to report on.
        max_new_tokens: Maximum length of a report.
        batch_size: Studies per forward.
    """
    texts: list[str] = []
    for start in range(0, len(studies), batch_size):
        part = list(studies[start : start + batch_size])
        if interventions:
            encoding = maira.processor.encode(part).to(maira.model.device, maira.model.dtype)
            with steering(maira, sae, hook_name, interventions, encoding, require_effect=False) as run:
                reports = run.reports(maira.processor, max_new_tokens)
        else:
            reports = generate_reports(maira.model, maira.processor, part, max_new_tokens=max_new_tokens)
        texts += [report.text for report in reports]
    return texts


@contextmanager
def _hooked(maira: HookedMaira2, name: str, engine: Engine) -> Iterator[None]:
    """Hook an engine; a block in which nothing ran is left to `Engine.require`, as with the other backends."""
    ended = False
    try:
        with maira.hooks([(name, lambda value, hook: engine(value))]):
            yield
            ended = True
    except HookError:
        if not ended:
            raise


def is_nnsight(maira: Any) -> TypeGuard["Maira2NNsight"]:
    """Whether a model is a `Maira2NNsight`; importing nnsight to find out would change the process."""
    module = sys.modules.get("sae_lens_maira.hooks.nnsight")
    return module is not None and isinstance(maira, module.Maira2NNsight)


def _model(maira: "Backend") -> Any:
    if isinstance(maira, (Maira2, HookedMaira2)):
        return maira.model
    return maira._module if is_nnsight(maira) else maira


def check_point(model: Any, hook_name: str, sae: SAE[Any] | None) -> Point:
    """Resolve a hook point; InterventionError if it cannot be steered or the SAE belongs to another one."""
    try:
        point = PointTable(model.config).resolve(hook_name)
    except HookError as error:
        raise InterventionError(f"There is no stream to steer: {error}") from error
    if (
        point.spec.shape != "(B, L, d_model)"
        or point.spec.counted_by != "block"
        or point.spec.tap != "output"
        or point.name.endswith("hook_resid_mid")
    ):
        raise InterventionError(
            f"{hook_name!r} cannot be steered: it is not an output of shape (B, L, d_model) in the decoder. Use "
            "blocks.{i}.hook_resid_post, hook_attn_out or hook_mlp_out."
        )
    trained = getattr(sae.cfg.metadata, "hook_name", None) if sae is not None else None
    if trained and PointTable(model.config).aliases.get(trained, trained) != point.name:
        raise InterventionError(
            f"The SAE was trained at {trained!r} and is used at {point.name!r}, where its latents have no meaning; "
            "steer at its own hook point."
        )
    return point


def edit_output(module: nn.Module, engine: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """Let `engine` edit the output of a module; returns the handle that removes the hook."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        new = engine(value)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    # Before transformers' own hooks, which collect hidden states.
    return module.register_forward_hook(hook, prepend=True)

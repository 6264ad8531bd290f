"""Interventions in force: one context manager for transformers, TransformerLens (HookedMaira2) and nnsight.

    with steering(maira, sae, "blocks.3.hook_resid_post", [Add(latents=(7,))], encoding, p99=p99) as run:
        ids = run.generate(max_new_tokens=60)
    run.effect.ratio

The same `Engine` edits the stream in all three, so their results are equal. The model is as before when the block
ends, whatever was raised in it. It knows nothing about what reports say.
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
)
from sae_lens_maira.steering.engine import Effect, Engine
from sae_lens_maira.steering.interventions import Intervention

if TYPE_CHECKING:
    from sae_lens_maira.hooks import Maira2NNsight

    Backend = Maira2 | Maira2ForConditionalGeneration | HookedMaira2 | Maira2NNsight


class Steering:
    """A run of interventions, as `steering` hands it out.

    Attributes:
        encoding: the batch that is steered.
    """

    def __init__(self, backend: "Backend", point: Point, engine: Engine, encoding: Maira2Encoding) -> None:
        self._backend, self._point, self._engine, self.encoding = backend, point, engine, encoding

    @property
    def effect(self) -> Effect:
        """What the interventions have done so far."""
        return self._engine.effect

    def generate(self, max_new_tokens: int = MAX_NEW_TOKENS["findings"], **kwargs: Any) -> torch.Tensor:
        """Generate for the encoding, greedily unless told otherwise.

        Args:
            max_new_tokens: budget.
            **kwargs: arguments of transformers' `generate`: `use_cache`, `num_beams`, `do_sample`, ...

        Returns:
            (rows, L + T) ids, prompt included; rows are studies times returned sequences.
        """
        arguments: dict[str, Any] = {
            "do_sample": False,
            "pad_token_id": self.encoding.pad_token_id,
            "eos_token_id": self.encoding.eos_token_id,
        } | kwargs
        if is_nnsight(self._backend):
            edits = {self._point.name: lambda value, _step: self._engine(value)}
            return self._backend.generate_edited(self.encoding, edits, max_new_tokens, **arguments)
        # A HookedMaira2's points listen to the model it wraps, so they fire here as well.
        with torch.no_grad():
            output: Any = _model(self._backend).generate(
                **self.encoding.model_inputs(), max_new_tokens=max_new_tokens, **arguments
            )
        return getattr(output, "sequences", output)

    def reports(
        self, processor: Maira2Processor, max_new_tokens: int = MAX_NEW_TOKENS["findings"], **kwargs: Any
    ) -> list[ParsedReport]:
        """`generate`, and the reports read from it."""
        ids = self.generate(max_new_tokens, **kwargs)
        return [processor.decode_report(row) for row in ids[:, self.encoding.input_ids.shape[1] :]]

    def logits(self) -> torch.Tensor:
        """(B, L, d_vocab) logits of one forward pass over the encoding."""
        if is_nnsight(self._backend):
            raise InterventionError(
                "Logits under nnsight are read in a trace; give the model or a HookedMaira2."
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
) -> Iterator[Steering]:
    """Put interventions in force at a hook point while the block runs.

    Args:
        maira: the model, bare or in a `Maira2`, `HookedMaira2` or `Maira2NNsight`. Under nnsight only
            `Steering.generate` is steered; on the others any forward or `generate` of the encoding is.
        sae: whose latents are meant; None if there are only directions.
        hook_name: a point of shape (B, L, d_model) inside the decoder.
        interventions: applied in order.
        encoding: the batch that will run, on the model's device.
        p99: (d_sae,) units of the latents, from `stats.p99` or the latent records.
        require_effect: refuse a run that reached its positions but changed nothing.

    Raises:
        InterventionError: input that cannot be meant, before the block; a silent no-op, behind it.
    """
    items = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    model = _model(maira)
    point = check_point(model, hook_name, sae)
    engine = Engine(sae, items, encoding, p99, model.config.get_text_config().hidden_size)
    run = Steering(maira, point, engine, encoding)
    with ExitStack() as stack:
        if isinstance(maira, HookedMaira2):
            # Not the watched form: a block in which nothing ran gets the same message as on other backends.
            stack.enter_context(maira.hooks([(point.name.__eq__, lambda value, hook: engine(value))]))
        elif not is_nnsight(maira):
            handle = listen(model.get_submodule(point.module), engine)
            stack.callback(handle.remove)
        yield run
    engine.require(require_effect)


def is_nnsight(maira: Any) -> TypeGuard["Maira2NNsight"]:
    """Whether a model is a `Maira2NNsight`; importing nnsight to ask would change the process."""
    module = sys.modules.get("sae_lens_maira.hooks.nnsight")
    return module is not None and isinstance(maira, module.Maira2NNsight)


def _model(maira: "Backend") -> Any:
    if isinstance(maira, (Maira2, HookedMaira2)):
        return maira.model
    return maira._module if is_nnsight(maira) else maira


def check_point(model: Any, hook_name: str, sae: SAE[Any] | None) -> Point:
    """The point, or InterventionError where it cannot be steered or the SAE was trained elsewhere."""
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
            f"{hook_name!r} cannot be steered: it is no output of shape (B, L, d_model) inside the decoder. Use "
            "blocks.{i}.hook_resid_post, hook_attn_out or hook_mlp_out."
        )
    trained = getattr(sae.cfg.metadata, "hook_name", None) if sae is not None else None
    if trained and PointTable(model.config).aliases.get(trained, trained) != point.name:
        raise InterventionError(
            f"The SAE was trained at {trained!r} and is to steer at {point.name!r}, where its latents mean nothing; "
            "steer at its own point."
        )
    return point


def listen(module: nn.Module, engine: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """Let `engine` edit what a module gives; returns the handle."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        new = engine(value)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    # Before transformers' own hooks, which collect hidden states.
    return module.register_forward_hook(hook, prepend=True)

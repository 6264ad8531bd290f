"""What a model loses when an SAE's reconstruction takes the place of its activations.

    loss recovered = (CE_ablated - CE_spliced) / (CE_ablated - CE_clean)

1 means that the model does not notice, 0 that the reconstruction is no better than zeros (or the mean) there.
Positions are replaced and targets counted separately: replace image positions only, count report tokens only.
The model is any torch module that returns `.logits`; this module knows nothing about MAIRA-2.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor, nn

from sae_lens_maira.errors import HookError, SAEError
from sae_lens_maira.sae.evaluation import beside_label, level_reconstructions
from sae_lens_maira.sae.inference import load_matryoshka
from sae_lens_maira.sae.levels import level_widths_of
from sae_lens_maira.stats import loss_recovered

IGNORED_LABEL = -100


@dataclass(frozen=True)
class SpliceBatch:
    """What one forward pass needs."""

    model_inputs: Mapping[str, Any]
    """Keyword arguments of the model, on its device."""
    labels: Tensor
    """(B, L) token ids where the token is a target, -100 elsewhere; not shifted, as in transformers."""
    roles: Tensor | None = None
    """(B, L) token roles, None where positions are not told apart."""


@dataclass(frozen=True)
class SpliceRecord:
    """Cross-entropy in nats per target with one SAE at one level in one set of positions."""

    sae: str
    level: int
    width: int
    positions: str
    """Name of the set of positions that were replaced."""
    replaced: int
    targets: int
    ce_clean: float
    ce_ablated: float
    ce_spliced: float
    loss_recovered: float
    """NaN where the ablation does not raise the loss: nothing can be recovered then."""


@dataclass(frozen=True)
class SpliceEvaluation:
    """All records of a splice evaluation; `to_frame()` for a table."""

    records: tuple[SpliceRecord, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per SAE, set of positions and level."""
        return pd.DataFrame([dataclasses.asdict(record) for record in self.records])


@torch.no_grad()
def evaluate_splice(
    model: nn.Module,
    module: nn.Module,
    batches: Iterable[SpliceBatch | tuple[Mapping[str, Any], Tensor, Tensor | None]],
    sae: SAE[Any],
    *,
    baseline: SAE[Any] | Mapping[str, SAE[Any]] | None = None,
    positions: Mapping[str, Collection[int] | None] | None = None,
    levels: Sequence[int] | None = None,
    ablation: Literal["zero", "mean"] = "zero",
) -> SpliceEvaluation:
    """Cross-entropy with reconstructions in place of a module's output, per level and set of positions.

    Args:
        model: called with each batch's inputs; its result has `.logits` (B, L, vocabulary).
        module: the submodule whose output (B, L, d_in), or first output, the SAE reconstructs.
        batches: `SpliceBatch`es or tuples (model_inputs, labels, roles).
        sae: any SAELens SAE.
        baseline: SAE to compare with, such as `make_control("untrained", sae, rows)`, or one per set of positions.
        positions: name -> roles whose positions are replaced, None for every position that the attention mask
            keeps. Default {"all": None}. An SAE should be judged on the roles that it was trained on.
        levels: which levels to splice; None means all.
        ablation: what stands for "no information": zeros, or the mean of the replaced positions of the batch.

    Returns:
        One record per SAE, set of positions and level. The cost is one forward pass per batch, one more per set
        of positions, and one more per SAE, set and level.

    Raises:
        HookError: the module did not run, or its output is not (B, L, d).
        SAEError: the SAE has another d_in, or no target or no position remains.
    """
    sae = load_matryoshka(sae) if isinstance(sae, TrainingSAE) else sae
    positions = positions or {"all": None}
    variants = {
        where: _variants(sae, baseline[where] if isinstance(baseline, Mapping) else baseline, levels)
        for where in positions
    }
    sums: dict[Any, float] = {}
    counts: dict[str, int] = {"targets": 0}
    with _in_eval_mode(model):
        for entry in batches:
            batch = entry if isinstance(entry, SpliceBatch) else SpliceBatch(*entry)
            counts["targets"] += int((batch.labels[:, 1:] != IGNORED_LABEL).sum())
            _add(sums, "clean", _loss(model, batch))
            for where, roles in positions.items():
                mask = _mask(batch, where, roles)
                counts[where] = counts.get(where, 0) + int(mask.sum())
                with _replaced(module, mask, lambda rows: _ablated(rows, ablation)):
                    _add(sums, ("ablated", where), _loss(model, batch))
                for variant in variants[where]:
                    with _replaced(module, mask, variant.reconstruct):
                        _add(sums, (variant.name, variant.level, where), _loss(model, batch))
    empty = [where for where in positions if not counts.get(where)]
    if counts["targets"] == 0 or empty:
        raise SAEError(
            f"{counts['targets']} targets and no positions in {empty}: nothing to measure. Labels must hold token "
            "ids at targets, and roles the numbers that positions= names."
        )
    return SpliceEvaluation(
        tuple(_record(sums, counts, where, variant) for where in positions for variant in variants[where])
    )


@dataclass(frozen=True)
class _Variant:
    name: str
    sae: SAE[Any]
    level: int
    width: int

    def reconstruct(self, rows: Tensor) -> Tensor:
        if rows.shape[-1] != self.sae.cfg.d_in:
            raise SAEError(
                f"The module's output has {rows.shape[-1]} numbers per position, the SAE "
                f"d_in={self.sae.cfg.d_in}. It was trained on another model or another hook point."
            )
        rows = rows.to(self.sae.device, self.sae.dtype)
        return level_reconstructions(self.sae, rows, self.sae.encode(rows), [self.width])[0]


def _variants(sae: SAE[Any], baseline: SAE[Any] | None, levels: Sequence[int] | None) -> list[_Variant]:
    named = [("trained", sae)] + ([] if baseline is None else [(beside_label(baseline), baseline)])
    result = []
    for name, one in named:
        widths = level_widths_of(one)
        wanted = range(len(widths)) if levels is None else {level % len(widths) for level in levels}
        result += [_Variant(name, one, level, widths[level]) for level in sorted(wanted)]
    return result


def _record(
    sums: Mapping[Any, float], counts: Mapping[str, int], where: str, variant: _Variant
) -> SpliceRecord:
    targets = counts["targets"]
    keys = ("clean", ("ablated", where), (variant.name, variant.level, where))
    clean, ablated, spliced = (sums[key] / targets for key in keys)
    return SpliceRecord(
        sae=variant.name,
        level=variant.level,
        width=variant.width,
        positions=where,
        replaced=counts[where],
        targets=targets,
        ce_clean=clean,
        ce_ablated=ablated,
        ce_spliced=spliced,
        loss_recovered=loss_recovered(clean, ablated, spliced),
    )


def _loss(model: nn.Module, batch: SpliceBatch) -> float:
    """Summed cross-entropy over the targets; logits are taken at the positions that predict one."""
    logits = model(**batch.model_inputs).logits[:, :-1]
    labels = batch.labels[:, 1:].to(logits.device)
    wanted = labels != IGNORED_LABEL
    return float(torch.nn.functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum"))


def _mask(batch: SpliceBatch, where: str, roles: Collection[int] | None) -> Tensor:
    attention = batch.model_inputs.get("attention_mask")
    mask = torch.ones_like(batch.labels, dtype=torch.bool) if attention is None else attention.bool()
    if roles is None:
        return mask
    if batch.roles is None:
        raise SAEError(f"positions={where!r} names roles {sorted(roles)}, but the batch carries none.")
    return mask & torch.isin(batch.roles, torch.tensor(sorted(roles), device=batch.roles.device)).to(
        mask.device
    )


def _ablated(rows: Tensor, ablation: str) -> Tensor:
    return torch.zeros_like(rows) if ablation == "zero" else rows.mean(0, keepdim=True).expand_as(rows)


@contextmanager
def _replaced(module: nn.Module, mask: Tensor, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the module's output at the masked positions is what `replace` makes of those rows."""
    calls = 0

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise HookError(
                f"The hooked {type(module).__name__} gave {shape}; a tensor of shape {(*mask.shape, 'd_in')} was "
                "expected. Hook a module of the residual stream, such as a decoder layer."
            )
        changed = hidden.clone()
        where = mask.to(hidden.device)
        changed[where] = replace(hidden[where]).to(hidden.device, hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, (tuple, list)) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if calls == 0:
        raise HookError(
            f"The hooked {type(module).__name__} did not run. Pass a submodule of the model itself."
        )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _add(sums: dict[Any, float], key: Any, value: float) -> None:
    sums[key] = sums.get(key, 0.0) + value

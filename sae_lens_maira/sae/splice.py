"""Loss of a model whose activations are replaced by an SAE's reconstruction.

    loss recovered = (CE_ablated - CE_spliced) / (CE_ablated - CE_clean)

1 means that the loss is unchanged, 0 that the reconstruction is no better than zeros (or the mean) there.
Positions are replaced and targets counted separately: replace image positions only, count report tokens only.
`evaluate_splice` takes any causal model of transformers; `hooks` has a run that repeats MAIRA-2's upper layers only.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import pandas as pd
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor, nn

from sae_lens_maira.errors import HookError, SAEError
from sae_lens_maira.sae.controls import UntrainedControl
from sae_lens_maira.sae.evaluation import beside_label, level_reconstructions
from sae_lens_maira.sae.inference import load_matryoshka
from sae_lens_maira.sae.levels import level_widths_of
from sae_lens_maira.stats import IGNORED_LABEL, loss_recovered


@dataclass(frozen=True)
class SpliceBatch:
    """What one forward pass needs."""

    model_inputs: Mapping[str, Any]
    """Keyword arguments of the model, on its device."""
    labels: Tensor
    """(B, L) token ids where the token is a target, -100 elsewhere; not shifted, as in transformers."""
    roles: Tensor | None = None
    """(B, L) token roles, None where positions are not distinguished."""


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


class SpliceRun(Protocol):
    """One batch whose forward pass can be repeated with other values at the hook point."""

    @property
    def values(self) -> Tensor:
        """(B, L, d_in) at the hook point, of the unchanged run."""
        ...

    @property
    def labels(self) -> Tensor:
        """(B, L), as in `SpliceBatch`."""
        ...

    @property
    def roles(self) -> Tensor | None:
        """(B, L), or None where positions are not distinguished."""
        ...

    @property
    def real(self) -> Tensor:
        """(B, L) bool, False at padding."""
        ...

    def logits(self, values: Tensor | None = None, first: int = 0) -> Tensor:
        """(targets, vocabulary) logits that predict the targets, row by row.

        Args:
            values: (B, L, d_in) to put at the hook point; None leaves it alone.
            first: First position that differs from the unchanged run.
        """
        ...


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
        model: A causal model of transformers; logits are computed where a target is predicted, without a cache.
        module: The submodule whose output (B, L, d_in), or first output, the SAE reconstructs.
        batches: `SpliceBatch`es or tuples (model_inputs, labels, roles).
        sae: Any SAELens SAE.
        baseline: SAE to compare with, such as `make_control("untrained", sae, rows)`, or one per set of positions.
        positions: Name -> roles whose positions are replaced, None for every position that the attention mask
            keeps. Default {"all": None}. An SAE should be judged on the roles that it was trained on.
        levels: Which levels to splice; None means all.
        ablation: What counts as "no information": zeros, or the mean of the replaced positions of the batch.

    Returns:
        One record per SAE, set of positions and level. The cost is one forward pass per batch, one more per set
        of positions, and one more per SAE, set and level.

    Raises:
        HookError: The module did not run, or its output is not (B, L, d).
        SAEError: The SAE has another d_in, or no target or no position remains.
    """
    runs = (
        ModuleRun(model, module, entry if isinstance(entry, SpliceBatch) else SpliceBatch(*entry))
        for entry in batches
    )
    with _in_eval_mode(model):
        return evaluate_runs(
            runs, sae, baseline=baseline, positions=positions, levels=levels, ablation=ablation
        )


@torch.no_grad()
def evaluate_runs(
    runs: Iterable[SpliceRun],
    sae: SAE[Any],
    *,
    baseline: SAE[Any] | UntrainedControl | Mapping[str, SAE[Any] | UntrainedControl] | None = None,
    positions: Mapping[str, Collection[int] | None] | None = None,
    levels: Sequence[int] | None = None,
    ablation: Literal["zero", "mean"] = "zero",
) -> SpliceEvaluation:
    """`evaluate_splice` of runs that can be repeated; an SAE encodes each position once.

    Args:
        runs: The batches; one is held at a time.
        sae: As for `evaluate_splice`.
        baseline: As for `evaluate_splice`; also controls that `UntrainedControls` made.
        positions: As for `evaluate_splice`.
        levels: As for `evaluate_splice`.
        ablation: As for `evaluate_splice`.
    """
    sae = load_matryoshka(sae) if isinstance(sae, TrainingSAE) else sae
    positions = positions or {"all": None}
    subjects = {
        where: _subjects(sae, baseline[where] if isinstance(baseline, Mapping) else baseline, levels)
        for where in positions
    }
    sums: dict[Any, float] = {}
    counts: dict[str, int] = {"targets": 0}
    for run in runs:
        wanted = run.labels[:, 1:] != IGNORED_LABEL
        targets = run.labels[:, 1:][wanted]
        counts["targets"] += len(targets)
        if not len(targets):
            continue
        _add(sums, "clean", _loss(run.logits(), targets))
        for where, roles in positions.items():
            mask = _mask(run, where, roles)
            counts[where] = counts.get(where, 0) + int(mask.sum())
            if not bool(mask.any()):
                for key in (
                    ("ablated", where),
                    *((s.name, level, where) for s in subjects[where] for level in s.levels),
                ):
                    _add(sums, key, _loss(run.logits(), targets))
                continue
            rows = run.values[mask]
            ablated = (
                torch.zeros_like(rows) if ablation == "zero" else rows.mean(0, keepdim=True).expand_as(rows)
            )
            _add(sums, ("ablated", where), _replaced_loss(run, mask, ablated, targets))
            for subject in subjects[where]:
                for level, new in zip(subject.levels, subject.reconstruct(rows), strict=True):
                    _add(sums, (subject.name, level, where), _replaced_loss(run, mask, new, targets))
    empty = [where for where in positions if not counts.get(where)]
    if counts["targets"] == 0 or empty:
        raise SAEError(
            f"{counts['targets']} targets and no positions in {empty}: nothing to measure. Labels must hold token "
            "ids at targets, and roles the numbers that positions= names."
        )
    return SpliceEvaluation(
        tuple(
            _record(sums, counts, where, subject.name, level, subject.widths[level])
            for where in positions
            for subject in subjects[where]
            for level in subject.levels
        )
    )


ROWS_AT_ONCE = 1024
"""Positions that an SAE encodes at once."""


@dataclass(frozen=True)
class _Subject:
    """An SAE or a control, and the levels that are spliced."""

    name: str
    sae: Any
    widths: Sequence[int]
    levels: list[int]

    def reconstruct(self, rows: Tensor) -> list[Tensor]:
        """One (n, d_in) tensor per level, in the dtype and on the device of the rows."""
        parts: list[list[Tensor]] = [[] for _ in self.levels]
        control = isinstance(self.sae, UntrainedControl)
        place = self.sae.mean if control else self.sae.W_dec
        for chunk in rows.split(ROWS_AT_ONCE):
            if chunk.shape[-1] != place.shape[-1]:
                raise SAEError(
                    f"The module's output has {rows.shape[-1]} numbers per position, the SAE "
                    f"d_in={place.shape[-1]}. It was trained on another model or another hook point."
                )
            x = chunk.to(place.device, place.dtype)
            acts = self.sae.encode(x)
            made = (
                self.sae.reconstructions(acts)
                if control
                else level_reconstructions(self.sae, x, acts, self.widths)
            )
            for part, level in zip(parts, self.levels, strict=True):
                part.append(made[level].to(rows))
        return [torch.cat(part) for part in parts]


def _subjects(
    sae: SAE[Any], baseline: SAE[Any] | UntrainedControl | None, levels: Sequence[int] | None
) -> list[_Subject]:
    named: list[tuple[str, Any]] = [("trained", sae)]
    if isinstance(baseline, UntrainedControl):
        named.append(("untrained", baseline))
    elif baseline is not None:
        named.append((beside_label(baseline), baseline))
    result = []
    for name, one in named:
        widths = one.widths if isinstance(one, UntrainedControl) else level_widths_of(one)
        wanted = range(len(widths)) if levels is None else {level % len(widths) for level in levels}
        result.append(_Subject(name, one, widths, sorted(wanted)))
    return result


def _record(
    sums: Mapping[Any, float], counts: Mapping[str, int], where: str, name: str, level: int, width: int
) -> SpliceRecord:
    targets = counts["targets"]
    keys = ("clean", ("ablated", where), (name, level, where))
    clean, ablated, spliced = (sums[key] / targets for key in keys)
    return SpliceRecord(
        sae=name,
        level=level,
        width=width,
        positions=where,
        replaced=counts[where],
        targets=targets,
        ce_clean=clean,
        ce_ablated=ablated,
        ce_spliced=spliced,
        loss_recovered=loss_recovered(clean, ablated, spliced),
    )


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Cross-entropy summed over the targets."""
    return float(nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum"))


def _replaced_loss(run: SpliceRun, mask: Tensor, rows: Tensor, targets: Tensor) -> float:
    """Loss with other rows at the masked positions."""
    values = run.values.clone()
    values[mask] = rows.to(values)
    first = int(mask.any(0).nonzero()[0])
    return _loss(run.logits(values, first), targets)


def _mask(run: SpliceRun, where: str, roles: Collection[int] | None) -> Tensor:
    mask = run.real
    if roles is not None:
        if run.roles is None:
            raise SAEError(f"positions={where!r} names roles {sorted(roles)}, but the batch carries none.")
        mask = mask & torch.isin(run.roles, torch.tensor(sorted(roles), device=run.roles.device)).to(
            mask.device
        )
    return mask.to(run.values.device)


class ModuleRun:
    """A batch through a causal model of transformers, with a torch hook on one of its modules."""

    values: Tensor

    def __init__(self, model: nn.Module, module: nn.Module, batch: SpliceBatch) -> None:
        self._model, self._module, self._inputs = model, module, batch.model_inputs
        self.labels, self.roles = batch.labels, batch.roles
        mask = batch.model_inputs.get("attention_mask")
        self.real = torch.ones_like(batch.labels, dtype=torch.bool) if mask is None else mask.bool()
        self._predicting = torch.nn.functional.pad(batch.labels[:, 1:] != IGNORED_LABEL, (0, 1))
        self._clean: Tensor | None = self._run(None)

    def logits(self, values: Tensor | None = None, first: int = 0) -> Tensor:
        """See `SpliceRun`; the whole model runs."""
        return self._run(values) if values is not None or self._clean is None else self._clean

    def _run(self, values: Tensor | None) -> Tensor:
        calls = 0

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            if not isinstance(hidden, Tensor) or hidden.ndim != 3 or shape[:2] != tuple(self.labels.shape):
                raise HookError(
                    f"The hooked {type(self._module).__name__} gave {shape}; a tensor of shape "
                    f"{(*self.labels.shape, 'd_in')} was expected. Hook a module of the residual stream, such as a "
                    "decoder layer."
                )
            if values is None:
                self.values = hidden
                return None
            return (values, *output[1:]) if isinstance(output, (tuple, list)) else values

        # Positions that predict a target in any row: logits of all others would be thrown away.
        kept = self._predicting.any(0).nonzero()[:, 0]
        kept = kept if len(kept) else torch.zeros(1, dtype=torch.long, device=kept.device)
        handle = self._module.register_forward_hook(hook)
        try:
            logits = self._model(**self._inputs, use_cache=False, logits_to_keep=kept).logits
        finally:
            handle.remove()
        if calls == 0:
            raise HookError(
                f"The hooked {type(self._module).__name__} did not run. Pass a submodule of the model itself."
            )
        return logits[self._predicting[:, kept].to(logits.device)]


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

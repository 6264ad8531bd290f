"""Evaluate an SAE on activation rows: explained variance, L0 and dead latents per level and token role, with a control.

    EV = 1 - sum_rows |x - x_i|^2 / sum_rows |x - mean|^2            aggregate
    EV per token = mean_rows (1 - |x - x_i|^2 / |x - mean|^2)        every row counts the same
    L0 = latents that fire per row, dead = latents that fire on no row

x_i is the reconstruction from level i; the mean is that of the rows counted, so a role's EV says nothing about
telling roles apart. Rows and roles are arrays.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.standard_sae import StandardSAE
from torch import Tensor

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.controls import UntrainedControl, UntrainedControls, control_kind
from sae_lens_maira.sae.inference import load_matryoshka
from sae_lens_maira.sae.levels import level_widths_of
from sae_lens_maira.sae.losses import decode_levels
from sae_lens_maira.stats import explained_by_sums

_SAMPLE_ROWS, _NO_ROLE = 4096, -(2**31)
Rows = Tensor | np.ndarray | Iterable[Any]
ALL = "all"


@dataclass(frozen=True)
class ReconstructionRecord:
    """Figures of one SAE at one level on the rows of one role."""

    sae: str
    """"trained", a kind of control such as "untrained", or "baseline" for another SAE."""
    level: int
    width: int
    role: str
    rows: int
    explained_variance: float
    explained_variance_per_token: float
    l0: float
    dead_latents: int
    """Of the level's `width` latents, those that fired on none of these rows."""
    mse: float
    """Squared error summed over d_in, averaged over rows."""


@dataclass(frozen=True)
class SAEEvaluation:
    """All records of an evaluation; `to_frame()` for a table."""

    records: tuple[ReconstructionRecord, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per SAE, role and level."""
        return pd.DataFrame([dataclasses.asdict(record) for record in self.records])

    def get(self, *, level: int = -1, role: str = ALL, sae: str = "trained") -> ReconstructionRecord:
        """One record; level -1 is the whole SAE.

        Raises:
            SAEError: There is none.
        """
        found = [record for record in self.records if record.role == role and record.sae == sae]
        if not found or not -len(found) <= level < len(found):
            roles = sorted({record.role for record in self.records})
            raise SAEError(f"No record of sae={sae!r}, role={role!r}, level={level}. Roles are {roles}.")
        return found[level]


def evaluate_sae(
    sae: SAE[Any],
    rows: Rows,
    roles: Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    role_names: Mapping[int, str] | None = None,
    baseline: SAE[Any] | Literal["untrained"] | None = "untrained",
    batch_rows: int = 2048,
    seed: int = 0,
    summary: "RowSummary | None" = None,
) -> SAEEvaluation:
    """Explained variance, L0 and dead latents per level and per token role.

    Args:
        sae: Any SAELens SAE; without levels it has one. A training SAE is evaluated as it would be saved.
        rows: (n, d_in) array, or something that can be iterated over twice and gives batches of rows or pairs
            (rows, roles).
        roles: (n,) integers, one per row of an array. None counts all rows together only.
        role_names: Names of the integers; an integer without a name is called by its number.
        baseline: An SAE to compare with, None, or "untrained" for that control of each role's own rows, which
            then starts from that role's mean and sparsity.
        batch_rows: Rows encoded at once.
        seed: Random seed of the untrained SAE.
        summary: Means and samples of the rows, if they are known: the rows are then read once.

    Raises:
        SAEError: The rows do not fit the SAE, or can be read once only.
    """
    if isinstance(sae, TrainingSAE):
        sae = load_matryoshka(sae)
    batches = _Batches(rows, roles, batch_rows)
    names = role_names or {}
    summary = summary or summarise_rows(batches, sae.cfg.d_in)
    groups = [ALL, *(names.get(role, str(role)) for role in summary.roles)]
    subjects = [_Subject.of("trained", sae, groups)]
    if isinstance(baseline, SAE):
        subjects.append(_Subject.of(beside_label(baseline), baseline, groups))
    elif baseline is not None:
        # One per role: rows of one role are far from the mean of all, and an SAE that cannot know that is too
        # easy to beat.
        family = UntrainedControls(sae, seed)
        for group, chosen in zip(groups, [None, *([role] for role in summary.roles)], strict=True):
            control = family.fit(summary.sample(chosen))
            subjects.append(_Subject.untrained(sae, control, group))
    means = {names.get(role, str(role)): summary.mean([role]) for role in summary.roles}
    return SAEEvaluation(tuple(_score(subjects, batches, means | {ALL: summary.mean()}, names)))


def beside_label(baseline: SAE[Any]) -> str:
    """Name of a baseline SAE in records: its kind of control, or "baseline"."""
    return control_kind(baseline) or "baseline"


class _Batches:
    def __init__(self, rows: Rows, roles: Any, batch_rows: int) -> None:
        if not isinstance(rows, (Tensor, np.ndarray)) and iter(rows) is rows:
            raise SAEError(
                f"Rows came as a {type(rows).__name__}, which can be read once; two passes are needed. "
                "Give an array, a list of batches, or an object whose __iter__ starts again."
            )
        self.rows, self.batch_rows = rows, batch_rows
        self.roles = None if roles is None else torch.as_tensor(roles)
        if self.roles is not None and (
            not isinstance(rows, (Tensor, np.ndarray)) or len(self.roles) != len(rows)
        ):
            raise SAEError(
                f"{len(self.roles)} roles were given for {len(rows) if hasattr(rows, '__len__') else 'streamed'} "  # pyright: ignore[reportArgumentType]
                "rows. Give one role per row of an array, or batches of pairs (rows, roles)."
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        if isinstance(self.rows, (Tensor, np.ndarray)):
            for start in range(0, len(self.rows), self.batch_rows):
                part = slice(start, start + self.batch_rows)
                yield torch.as_tensor(self.rows[part]), None if self.roles is None else self.roles[part]
            return
        for batch in self.rows:
            x, roles = batch if isinstance(batch, (tuple, list)) else (batch, None)
            x, roles = torch.as_tensor(x), None if roles is None else torch.as_tensor(roles)
            for start in range(0, len(x), self.batch_rows):
                part = slice(start, start + self.batch_rows)
                yield x[part], None if roles is None else roles[part]


def _groups(roles: Tensor | None, names: Mapping[int, str], n: int) -> Iterator[tuple[str, Tensor]]:
    yield ALL, torch.ones(n, dtype=torch.bool)
    if roles is not None:
        for role in roles.unique().tolist():
            yield names.get(role, str(role)), roles.cpu() == role


class RowSummary:
    """Mean and an even sample of rows per role, from one pass over them.

    Attributes:
        roles: The roles that occurred, in order; empty for rows without roles.
    """

    def __init__(
        self, sums: dict[int, Tensor], counts: dict[int, int], samples: dict[int, list[Tensor]]
    ) -> None:
        self._sums, self._counts, self._samples = sums, counts, samples
        self.roles = [role for role in sorted(counts) if role != _NO_ROLE]

    def mean(self, roles: Collection[int] | None = None) -> Tensor:
        """(d_in,) float64 mean of the rows of some roles; None means all rows."""
        chosen = [role for role in self._counts if roles is None or role in roles]
        return torch.stack([self._sums[role] for role in chosen]).sum(0) / sum(
            self._counts[r] for r in chosen
        )

    def sample(self, roles: Collection[int] | None = None) -> Tensor:
        """At most 4,096 rows (n, d_in) float32 of some roles, each role in proportion to its rows.

        Raises:
            SAEError: No row has one of the roles.
        """
        chosen = [role for role in self._counts if roles is None or role in roles]
        if not chosen:
            raise SAEError(f"No row has one of the roles {sorted(roles or ())}; there are {self.roles}.")
        total = sum(self._counts[role] for role in chosen)
        parts = []
        for role in chosen:
            rows = torch.cat(self._samples[role])
            wanted = min(len(rows), max(1, round(_SAMPLE_ROWS * self._counts[role] / total)))
            parts.append(rows[torch.linspace(0, len(rows) - 1, wanted).round().long()])
        return torch.cat(parts)


def summarise_rows(batches: Iterable[tuple[Tensor, Tensor | None]], d_in: int) -> RowSummary:
    """Read rows once for their means and a sample.

    Args:
        batches: Pairs of rows (n, d_in) and roles (n,), or None for rows without roles.
        d_in: Expected width.

    Raises:
        SAEError: Rows of another width, numbers that are not finite, or no rows.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    samples: dict[int, list[Tensor]] = {}
    for x, roles in batches:
        if x.ndim != 2 or x.shape[1] != d_in:
            raise SAEError(
                f"A batch of shape {tuple(x.shape)} was given; (n, {d_in}) was expected, d_in={d_in} being the "
                "SAE's. Check that the rows come from the hook point it was trained on."
            )
        if not bool(torch.isfinite(x).all()):
            raise SAEError(
                "The rows hold NaN or infinite numbers. Check the model's dtype at this hook point."
            )
        numbers = torch.full((len(x),), _NO_ROLE) if roles is None else roles.cpu()
        for role in numbers.unique().tolist():
            part = x.cpu()[numbers == role]
            sums[role] = sums.get(role, 0) + part.double().sum(0)
            counts[role] = counts.get(role, 0) + len(part)
            if sum(map(len, samples.setdefault(role, []))) < _SAMPLE_ROWS:
                evenly = torch.linspace(0, len(part) - 1, min(len(part), 512)).round().long()
                samples[role].append(part[evenly].float())
    if not counts:
        raise SAEError("No rows were given. Evaluation needs at least one.")
    return RowSummary(sums, counts, samples)


@dataclass
class _Subject:
    """An SAE or a control, and the groups of rows that it is scored on."""

    label: str
    groups: list[str]
    widths: Sequence[int]
    device: torch.device
    encode: Callable[[Tensor], Tensor]
    reconstruct: Callable[[Tensor, Tensor], list[Tensor]]

    @classmethod
    def of(cls, label: str, sae: SAE[Any], groups: list[str]) -> "_Subject":
        widths = level_widths_of(sae)
        return cls(
            label,
            groups,
            widths,
            sae.W_dec.device,
            lambda x: sae.encode(x),
            lambda x, acts: level_reconstructions(sae, x, acts, widths),
        )

    @classmethod
    def untrained(cls, sae: SAE[Any], control: UntrainedControl, group: str) -> "_Subject":
        return cls(
            "untrained",
            [group],
            control.widths,
            sae.W_dec.device,
            control.encode,
            lambda _, acts: control.reconstructions(acts),
        )


@torch.no_grad()
def _score(
    subjects: Sequence[_Subject],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    means: dict[str, Tensor],
    names: Mapping[int, str],
) -> list[ReconstructionRecord]:
    """One pass over the rows for all SAEs; no more than a batch of them is held."""
    sums = [{group: _Sums(subject.widths) for group in subject.groups} for subject in subjects]
    for rows, roles in batches:
        masks = dict(_groups(roles, names, len(rows)))
        variance = {g: (rows.cpu()[m].double() - means[g]).pow(2).sum(-1) for g, m in masks.items()}
        for subject, mine in zip(subjects, sums, strict=True):
            groups = [group for group in subject.groups if group in masks]
            if not groups:
                continue
            wanted = torch.stack([masks[group] for group in groups]).any(0)
            x = rows[wanted.to(rows.device)].to(subject.device, torch.float32)
            acts = subject.encode(x)
            errors = torch.stack([(r.float() - x).pow(2).sum(-1) for r in subject.reconstruct(x, acts)])
            fired = acts != 0
            l0 = torch.stack([fired[:, :width].sum(-1) for width in subject.widths])
            errors, l0 = errors.cpu().double(), l0.cpu()
            for group in groups:
                mask = masks[group][wanted]
                active = fired[mask.to(fired.device)].any(0).cpu()
                mine[group].add(errors[:, mask], variance[group], l0[:, mask], active)
    return [
        mine[group].record(subject.label, level, width, group)
        for subject, mine in zip(subjects, sums, strict=True)
        for group in subject.groups
        for level, width in enumerate(subject.widths)
    ]


def level_reconstructions(sae: SAE[Any], x: Tensor, acts: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Reconstruction (n, d_in) of rows from each prefix of latents of any SAELens SAE."""
    is_linear = isinstance(sae, (JumpReLUSAE, StandardSAE)) and sae.cfg.reshape_activations == "none"
    if is_linear and sae.cfg.normalize_activations == "none":
        return decode_levels(acts, sae.W_dec, sae.b_dec, widths)
    results = []
    for width in widths:
        # SAELens' decode consumes what encode remembered of the row's norm, so each level encodes again.
        prefix = sae.encode(x) if sae.cfg.normalize_activations != "none" else acts
        prefix = torch.where(torch.arange(prefix.shape[-1], device=prefix.device) < width, prefix, 0)
        results.append(sae.decode(prefix))
    return results


class _Sums:
    def __init__(self, widths: Sequence[int]) -> None:
        self.rows, self.variance = 0, 0.0
        self.error, self.per_token, self.l0 = (
            torch.zeros(len(widths), dtype=torch.float64) for _ in range(3)
        )
        self.fired = torch.zeros(max(widths), dtype=torch.bool)

    def add(self, errors: Tensor, variance: Tensor, l0: Tensor, fired: Tensor) -> None:
        self.rows += len(variance)
        self.variance += float(variance.sum())
        self.error += errors.sum(1)
        self.per_token += torch.where(variance > 0, 1 - errors / variance, 0.0).sum(1)
        self.l0 += l0.double().sum(1)
        self.fired |= fired[: len(self.fired)]

    def record(self, sae: str, level: int, width: int, role: str) -> ReconstructionRecord:
        return ReconstructionRecord(
            sae=sae,
            level=level,
            width=width,
            role=role,
            rows=self.rows,
            explained_variance=float(explained_by_sums(float(self.error[level]), self.variance)),
            explained_variance_per_token=float(self.per_token[level]) / self.rows
            if self.variance > 0
            else math.nan,
            l0=float(self.l0[level]) / self.rows,
            dead_latents=width - int(self.fired[:width].sum()),
            mse=float(self.error[level]) / self.rows,
        )

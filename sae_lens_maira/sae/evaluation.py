"""Judge an SAE on activation rows: explained variance, L0 and dead latents per level and token role, with a control.

    EV = 1 - sum_rows |x - x_i|^2 / sum_rows |x - mean|^2            aggregate
    EV per token = mean_rows (1 - |x - x_i|^2 / |x - mean|^2)        every row counts the same
    L0 = latents that fire per row, dead = latents that fire on no row

x_i is the reconstruction from level i; the mean is that of the rows counted, so a role's EV says nothing about
telling roles apart. Rows and roles are arrays.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from sae_lens_maira.sae.controls import control_kind, make_control
from sae_lens_maira.sae.inference import load_matryoshka
from sae_lens_maira.sae.levels import level_widths_of
from sae_lens_maira.sae.losses import nested_reconstructions
from sae_lens_maira.stats import explained_by_sums

_SAMPLE_ROWS = 4096
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
            SAEError: there is none.
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
) -> SAEEvaluation:
    """Explained variance, L0 and dead latents per level and per token role.

    Args:
        sae: any SAELens SAE; without levels it has one. A training SAE is judged as it would be saved.
        rows: (n, d_in) array, or something that can be iterated over twice and gives batches of rows or pairs
            (rows, roles).
        roles: (n,) integers, one per row of an array. None counts all rows together only.
        role_names: names of the integers; an integer without a name is called by its number.
        baseline: an SAE to stand beside, None, or "untrained" for that control of each role's own rows, which
            then starts from that role's mean and sparsity.
        batch_rows: rows encoded at once.
        seed: of the untrained SAE.

    Raises:
        SAEError: the rows do not fit the SAE, or can be read once only.
    """
    if isinstance(sae, TrainingSAE):
        sae = load_matryoshka(sae)
    batches = _Batches(rows, roles, batch_rows)
    names = role_names or {}
    means, samples = _first_pass(batches, sae.cfg.d_in, names)
    records = _second_pass("trained", sae, batches, means, names)
    if isinstance(baseline, SAE):
        records += _second_pass(beside_label(baseline), baseline, batches, means, names)
    elif baseline is not None:
        # One per role: rows of one role lie far from the mean of all, and an SAE that cannot know that is too
        # easy to beat.
        for group, mean in means.items():
            other = make_control("untrained", sae, samples[group], seed)
            records += _second_pass(beside_label(other), other, batches, {group: mean}, names)
    return SAEEvaluation(tuple(records))


def beside_label(baseline: SAE[Any]) -> str:
    """Name of a baseline SAE in records: its kind of control, or "baseline"."""
    return control_kind(baseline) or "baseline"


class _Batches:
    def __init__(self, rows: Rows, roles: Any, batch_rows: int) -> None:
        if not isinstance(rows, (Tensor, np.ndarray)) and iter(rows) is rows:
            raise SAEError(
                f"Rows came as a {type(rows).__name__}, which can be read once; two passes are needed. "
                "Give an array, a list of batches, or an object whose __iter__ starts anew."
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


def _first_pass(
    batches: _Batches, d_in: int, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean of each role's rows, and a sample of them from many batches."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    samples: dict[str, list[Tensor]] = {}
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
        for group, mask in _groups(roles, names, len(x)):
            part = x.cpu()[mask].double()
            sums[group] = sums.get(group, 0) + part.sum(0)
            counts[group] = counts.get(group, 0) + len(part)
            if sum(map(len, samples.setdefault(group, []))) < _SAMPLE_ROWS:
                evenly = torch.linspace(0, len(part) - 1, min(len(part), 512)).round().long()
                samples[group].append(part[evenly].float())
    if not counts:
        raise SAEError("No rows were given. Evaluation needs at least one.")
    means = {group: sums[group] / counts[group] for group in sums}
    return means, {group: torch.cat(parts) for group, parts in samples.items()}


@torch.no_grad()
def _second_pass(
    label: str, sae: SAE[Any], batches: _Batches, means: dict[str, Tensor], names: Mapping[int, str]
) -> list[ReconstructionRecord]:
    widths = level_widths_of(sae)
    sums = {group: _Sums(len(widths), sae.cfg.d_sae) for group in means}
    for x, roles in batches:
        groups = [(group, mask) for group, mask in _groups(roles, names, len(x)) if group in means]
        wanted = torch.stack([mask for _, mask in groups]).any(0) if groups else torch.zeros(len(x)).bool()
        x = x.cpu()[wanted].to(sae.device, torch.float32)
        acts = sae.encode(x)
        fired = (acts != 0).cpu()
        errors = torch.stack(
            [(r.float() - x).pow(2).sum(-1) for r in level_reconstructions(sae, x, acts, widths)]
        )
        l0 = torch.stack([fired[:, :width].sum(-1) for width in widths])
        for group, mask in groups:
            mask = mask[wanted]
            variance = (x.cpu()[mask].double() - means[group]).pow(2).sum(-1)
            sums[group].add(errors.cpu()[:, mask].double(), variance, l0[:, mask], fired[mask])
    return [
        sums[group].record(label, level, width, group)
        for group in means
        for level, width in enumerate(widths)
    ]


def level_reconstructions(sae: SAE[Any], x: Tensor, acts: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Reconstruction (n, d_in) of rows from each prefix of latents of any SAELens SAE."""
    is_linear = isinstance(sae, (JumpReLUSAE, StandardSAE)) and sae.cfg.reshape_activations == "none"
    if is_linear and sae.cfg.normalize_activations == "none":
        return nested_reconstructions(acts, sae.W_dec, sae.b_dec, widths)
    results = []
    for width in widths:
        # SAELens' decode consumes what encode remembered of the row's norm, so each level encodes again.
        prefix = sae.encode(x) if sae.cfg.normalize_activations != "none" else acts
        prefix = torch.where(torch.arange(prefix.shape[-1], device=prefix.device) < width, prefix, 0)
        results.append(sae.decode(prefix))
    return results


class _Sums:
    def __init__(self, n_levels: int, d_sae: int) -> None:
        self.rows, self.variance = 0, 0.0
        self.error, self.per_token, self.l0 = (torch.zeros(n_levels, dtype=torch.float64) for _ in range(3))
        self.fired = torch.zeros(d_sae, dtype=torch.bool)

    def add(self, errors: Tensor, variance: Tensor, l0: Tensor, fired: Tensor) -> None:
        self.rows += len(variance)
        self.variance += float(variance.sum())
        self.error += errors.sum(1)
        self.per_token += torch.where(variance > 0, 1 - errors / variance, 0.0).sum(1)
        self.l0 += l0.double().sum(1)
        self.fired |= fired.any(0)

    def record(self, sae: str, level: int, width: int, role: str) -> ReconstructionRecord:
        return ReconstructionRecord(
            sae=sae,
            level=level,
            width=width,
            role=role,
            rows=self.rows,
            explained_variance=explained_by_sums(float(self.error[level]), self.variance),
            explained_variance_per_token=float(self.per_token[level]) / self.rows
            if self.variance > 0
            else math.nan,
            l0=float(self.l0[level]) / self.rows,
            dead_latents=width - int(self.fired[:width].sum()),
            mse=float(self.error[level]) / self.rows,
        )

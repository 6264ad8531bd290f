"""Agreement of latents with known findings: F1 of firing, with selection on one half of the patients and scores on the
other.

A latent fires in a study if it is active at one or more of the study's rows. Against the truth of one finding

    F1 = 2 TP / (2 TP + FP + FN),

without a tuned threshold. The best of many latents is selected on the studies of one half of the patients and scored on
the other half. F1 separates trained from untrained SAEs where the AUROC of a maximum does not, since the best of 1,000
random directions correlates with almost any label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from sae_lens_maira.errors import StudyError
from sae_lens_maira.stats import bootstrap, f1, f1_of_firing, interval

if TYPE_CHECKING:
    import torch

    from sae_lens_maira.activations import ActivationRows


class Encoder(Protocol):
    """Protocol of functions from rows (n, d_in) to unit activations (n, n_units), 0 where a unit does not fire."""

    def __call__(self, values: torch.Tensor, /) -> torch.Tensor: ...


def study_firing(
    encode: Encoder, rows: ActivationRows, n_studies: int, chunk: int = 4096
) -> tuple[np.ndarray, float]:
    """Find the studies in which each unit is active at least once.

    Args:
        encode: Encoder of the dictionary.
        rows: N rows of the wanted positions.
        n_studies: Number of studies that `rows.study` refers to.
        chunk: Number of rows encoded at once.

    Returns:
        `(fires, l0)`: (n_studies, n_units) bool, and the mean number of active units per row.
    """
    import torch

    fires: torch.Tensor | None = None
    active = 0
    study = torch.from_numpy(rows.study)
    with torch.no_grad():
        for start in range(0, len(rows), chunk):
            on = encode(rows.values[start : start + chunk]) > 0
            if fires is None:
                fires = torch.zeros(n_studies, on.shape[1])
            active += int(on.sum())
            fires.index_add_(0, study[start : start + chunk], on.float())
    if fires is None:
        return np.zeros((n_studies, 0), dtype=bool), 0.0
    return (fires > 0).numpy(), active / len(rows)


class MeanDifference:
    """One supervised direction per finding: mean of rows of positive studies minus mean of rows of negative ones.

    The labels of the first half are used, and the threshold is tuned there for F1. It is a supervised reference for
    unsupervised units.
    """

    def __init__(self, rows: ActivationRows, truth: np.ndarray, choose: np.ndarray) -> None:
        """Fit on the first half.

        Args:
            rows: N rows of the wanted positions.
            truth: (n_studies, F) bool.
            choose: (n_studies,) bool, the first half.
        """
        n_studies, n_findings = truth.shape
        import torch

        study = torch.from_numpy(rows.study)
        sums = torch.zeros(n_studies, rows.values.shape[1]).index_add_(0, study, rows.values)
        counts = torch.zeros(n_studies).index_add_(0, study, torch.ones(len(rows)))
        directions = []
        for column in range(n_findings):
            means = [
                sums[mask].sum(0) / counts[mask].sum().clamp(min=1)
                for mask in (
                    torch.from_numpy(choose & truth[:, column]),
                    torch.from_numpy(choose & ~truth[:, column]),
                )
            ]
            directions.append(means[0] - means[1])
        self._direction = torch.stack(directions, 1)
        peaks = np.full((n_studies, n_findings), -np.inf, dtype=np.float32)
        np.maximum.at(peaks, rows.study, (rows.values @ self._direction).numpy())
        thresholds = [
            _best_threshold(peaks[choose, column], truth[choose, column]) for column in range(n_findings)
        ]
        self._threshold = torch.tensor(thresholds)

    def __call__(self, values: torch.Tensor, /) -> torch.Tensor:
        return (values @ self._direction - self._threshold).relu()


def _best_threshold(score: np.ndarray, truth: np.ndarray) -> float:
    """Threshold of `score` with the highest F1 against `truth`, halfway between neighbouring scores."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(truth[order])
    best = int(f1(hits, np.arange(1, len(order) + 1), truth.sum()).argmax())
    upper = score[order[best]]
    lower = score[order[min(best + 1, len(order) - 1)]]
    return float((upper + lower) / 2) if np.isfinite(lower) else float(upper - 1e-6)


@dataclass(frozen=True)
class Halves:
    """Studies split by patient: `choose` and `report` are boolean masks (n_studies,) that partition them."""

    choose: np.ndarray
    report: np.ndarray


def split_by_patient(patients: Sequence[str], seed: int = 0) -> Halves:
    """Split patients into two halves, so that no patient is in both.

    Raises:
        StudyError: Fewer than two patients.
    """
    names = sorted(set(patients))
    if len(names) < 2:
        raise StudyError(
            f"{len(names)} patient(s) cannot be split into two halves; give studies of two or more."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = {names[i] for i in order[: len(names) // 2]}
    choose = np.array([patient in chosen for patient in patients])
    return Halves(choose, ~choose)


@dataclass(frozen=True)
class Agreement:
    """Best unit of one dictionary for each finding.

    Attributes:
        name: Name of the dictionary ("Matryoshka SAE", "untrained SAE", ...).
        findings: (F,) names.
        unit: (F,) unit selected on the first half.
        choose_f1: (F,) its F1 on the first half, used to choose between dictionaries (optimistically biased).
        f1: (F,) its F1 on the second half.
        low, high: (F,) 95 % bootstrap interval of `f1` over the second half's studies.
        samples: (n_boot, F) bootstrap F1, with the same resampled studies for every dictionary, so that differences are
            paired.
        n, positives: Number of studies of the second half, and (F,) how many of them have the finding.
    """

    name: str
    findings: tuple[str, ...]
    unit: np.ndarray
    choose_f1: np.ndarray
    f1: np.ndarray
    low: np.ndarray
    high: np.ndarray
    samples: np.ndarray
    n: int
    positives: np.ndarray

    def to_frame(self) -> pd.DataFrame:
        """Table of one row per finding."""
        columns = {
            "unit": self.unit,
            "f1": self.f1,
            "low": self.low,
            "high": self.high,
            "positives": self.positives,
        }
        return pd.DataFrame(columns, index=pd.Index(self.findings, name="finding")).assign(
            dictionary=self.name
        )


def best_units(
    name: str,
    fires: np.ndarray,
    truth: np.ndarray,
    findings: Sequence[str],
    halves: Halves,
    unit: np.ndarray | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Select each finding's unit on the first half and score it on the second.

    Args:
        name: Name of the dictionary.
        fires: (n_studies, n_units) bool.
        truth: (n_studies, F) bool.
        findings: F names.
        halves: Split of the studies.
        unit: (F,) given unit of each finding, if none is to be selected.
        n_boot: Number of bootstrap resamples of the second half's studies.
        seed: Random seed of the bootstrap; equal seeds resample equal studies, which pairs the comparisons.

    Returns:
        The scores with intervals.
    """
    first = f1_of_firing(fires[halves.choose], truth[halves.choose])
    if unit is None:
        unit = np.asarray(first.argmax(0))
    fired, known = fires[halves.report][:, unit], truth[halves.report]
    hits = (fired & known).astype(np.float64)
    resampled = bootstrap(
        lambda weights: f1(
            weights @ hits, weights @ fired.astype(np.float64), weights @ known.astype(np.float64)
        ),
        len(known),
        n_boot,
        seed,
    )
    return Agreement(
        name=name,
        findings=tuple(findings),
        unit=unit,
        choose_f1=first[unit, np.arange(len(findings))],
        f1=f1(hits.sum(0), fired.sum(0), known.sum(0)),
        low=resampled.low,
        high=resampled.high,
        samples=resampled.samples,
        n=len(known),
        positives=known.sum(0),
    )


def best_dictionary(drawn: Sequence[Agreement]) -> int:
    """Index of the dictionary that agrees best with the findings on the selection half.

    SAEs that differ only in their initial weights learn different latents, and it is chance which findings get a latent
    (docs/log.md). A control must be trained with as many seeds and selected by the same rule.

    Args:
        drawn: One or more dictionaries, scored on the same studies.

    Returns:
        Index of the one with the highest mean `choose_f1`; the first of equal ones.

    Raises:
        StudyError: No dictionary was given.
    """
    if not drawn:
        raise StudyError("There are 0 dictionaries to choose from; score one or more with `best_units`.")
    return int(np.argmax([scores.choose_f1.mean() for scores in drawn]))


@dataclass(frozen=True)
class Difference:
    """Mean over findings of F1(a) - F1(b), with a 95 % paired bootstrap interval over studies."""

    mean: float
    low: float
    high: float


def paired_difference(a: Agreement, b: Agreement) -> Difference:
    """Compare two dictionaries scored on the same studies with the same seed."""
    if a.n != b.n or a.findings != b.findings or a.samples.shape != b.samples.shape:
        raise StudyError(
            f"{a.name!r} was scored on {a.n} studies and {len(a.findings)} findings, {b.name!r} on {b.n} and "
            f"{len(b.findings)}; a paired comparison needs the same ones, so score both with the same split and seed."
        )
    samples = (a.samples - b.samples).mean(1)
    low, high = interval(samples)
    return Difference(float((a.f1 - b.f1).mean()), float(low), float(high))

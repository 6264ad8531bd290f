"""Which units fire in which study: from activation rows to a boolean (studies, units) table.

Units are the latents of an SAE or of one of its controls (`sae.controls`), or one supervised direction per finding.
Rows are encoded in chunks, so memory is O(studies x units) for any number of rows.
"""

from typing import Protocol

import numpy as np
import torch

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.stats import f1


class Encoder(Protocol):
    """Anything that turns rows (n, d_in) into unit activations (n, n_units), 0 where a unit is silent."""

    def __call__(self, values: torch.Tensor, /) -> torch.Tensor: ...


def study_firing(
    encode: Encoder, rows: ActivationRows, n_studies: int, chunk: int = 4096
) -> tuple[np.ndarray, float]:
    """Find the studies in which each unit is active at least once.

    Args:
        encode: of the dictionary.
        rows: N rows of the wanted positions.
        n_studies: size of the sequence that `rows.study` counts in.
        chunk: rows encoded at once.

    Returns:
        `(fires, l0)`: (n_studies, n_units) bool, and the mean number of active units per row.
    """
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

    It has seen the labels of the first half, and its threshold is tuned there for F1: it is the reference that
    unsupervised units are held against, not their rival.
    """

    def __init__(self, rows: ActivationRows, truth: np.ndarray, choose: np.ndarray) -> None:
        """Fit on the first half.

        Args:
            rows: N rows of the wanted positions.
            truth: (n_studies, F) bool.
            choose: (n_studies,) bool, the first half.
        """
        n_studies, n_findings = truth.shape
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
        return torch.relu(values @ self._direction - self._threshold)


def _best_threshold(score: np.ndarray, truth: np.ndarray) -> float:
    """The threshold of `score` with the highest F1 against `truth`, halfway between neighbouring scores."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(truth[order])
    best = int(f1(hits, np.arange(1, len(order) + 1), truth.sum()).argmax())
    upper = score[order[best]]
    lower = score[order[min(best + 1, len(order) - 1)]]
    return float((upper + lower) / 2) if np.isfinite(lower) else float(upper - 1e-6)

"""Statistics shared by all packages, with one definition of every reported score.

    explained variance   1 - sum |x - x_hat|^2 / sum |x - mean|^2       over rows, summed over dimensions
    loss recovered       (CE_ablated - CE_spliced) / (CE_ablated - CE_clean)
    F1                   2 TP / (fired + positives)
    perplexity           exp(-mean log-probability of the counted tokens)
    p99                  smallest value with at least 99 % of the values above zero at or below it
    mean map             sum of activations per patch / rows at that patch

Intervals are 95 %: Wilson's for shares, the bootstrap over studies for all other statistics. Quantiles are computed
from counts in bins of 1/36 octave, so that they can be streamed and added over processes; their relative error is below
1 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

# Functions that compute with torch import it themselves: readers of records and tables do without.
if TYPE_CHECKING:
    from torch import Tensor

Z95 = 1.959963984540054

LOWEST_OCTAVE, HIGHEST_OCTAVE, BINS_PER_OCTAVE = -10, 14, 36
EDGES = 2.0 ** (
    LOWEST_OCTAVE + np.arange((HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE
)
"""Edges of the quantile bins. Smaller values count into the first bin, larger ones into the last."""


def wilson_arrays(hits: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % Wilson intervals of hits / n, elementwise; (0, 1) where n is 0."""
    n = np.asarray(n, dtype=np.float64)
    safe = np.maximum(n, 1)
    p = hits / safe
    middle = (p + Z95**2 / (2 * safe)) / (1 + Z95**2 / safe)
    half = Z95 / (1 + Z95**2 / safe) * np.sqrt(p * (1 - p) / safe + Z95**2 / (4 * safe**2))
    low, high = np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)
    return np.where(n > 0, low, 0.0), np.where(n > 0, high, 1.0)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of hits / n; (0, 1) where n is 0."""
    low, high = wilson_arrays(np.asarray(hits), np.asarray(n))
    return float(low), float(high)


@dataclass(frozen=True)
class Bootstrap:
    """Bootstrap samples of a statistic, and their 95 % interval along the first axis."""

    samples: np.ndarray
    """(draws, ...)"""
    low: np.ndarray
    high: np.ndarray


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % percentile interval of bootstrap samples (draws, ...)."""
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    return low, high


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, draws: int = 1000, seed: int = 0
) -> Bootstrap:
    """95 % percentile bootstrap interval of a statistic of n studies.

    Resampling with replacement gives every study a multinomial weight, so that a statistic made of sums is one matrix
    product over all resamples. Equal n, draws and seed resample the same studies, so that comparisons are paired: the
    interval of a difference is the interval of the difference of two `samples`.

    Args:
        statistic: Function from weights (draws, n) to values (draws, ...).
        n: Number of studies, at least 1.
        draws: Number of resamples.
        seed: Random seed of the resampling.
    """
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    samples = np.asarray(statistic(weights))
    return Bootstrap(samples, *interval(samples))


def bootstrap_mean(values: np.ndarray, draws: int = 1000, seed: int = 0) -> Bootstrap:
    """95 % bootstrap interval of the mean of values (n, ...) over their first axis."""
    values = np.asarray(values, dtype=np.float64)
    flat = values.reshape(len(values), -1)
    return bootstrap(
        lambda weights: (weights @ flat / len(flat)).reshape(len(weights), *values.shape[1:]),
        len(values),
        draws,
        seed,
    )


def f1(true_positive: np.ndarray, fired: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """F1 = 2 TP / (fired + positives), elementwise; 0 where both fired and positives are 0."""
    both, total = np.broadcast_arrays(
        2 * np.asarray(true_positive, float), np.asarray(fired, float) + positives
    )
    return np.divide(both, total, out=np.zeros(both.shape), where=total > 0)


def f1_of_firing(fires: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """F1 of every latent against every finding, with firing as the prediction and without a tuned threshold.

    Args:
        fires: (n_studies, n_latents) bool, whether the latent is active at one or more rows of the study.
        truth: (n_studies, n_findings) bool.

    Returns:
        (n_latents, n_findings) in 0..1; 0 where the latent never fires and the finding is never present.
    """
    fired, known = fires.astype(np.float32), truth.astype(np.float32)
    return f1(fired.T @ known, fired.sum(0)[:, None], known.sum(0)[None])


def explained_by_sums(residual: ArrayLike, variance: ArrayLike) -> np.ndarray:
    """Explained variance (...) from sums of squared errors and of squared distances to the mean; NaN for a sum of 0."""
    above, below = np.asarray(residual, dtype=float), np.asarray(variance, dtype=float)
    return 1 - np.divide(above, below, out=np.full(below.shape, math.nan), where=below > 0)


class ExplainedVariance:
    """Explained variance and squared error, streamed over rows in float64.

    Attributes:
        rows: Number of rows counted.
        residual: Sum of squared errors.
    """

    def __init__(self) -> None:
        self.rows, self.residual, self._square = 0, 0.0, 0.0
        self._origin: Tensor | None = None
        self._total: Tensor | None = None

    def add(self, x: Tensor, reconstruction: Tensor) -> None:
        """Count rows (n, d) and their reconstructions (n, d)."""
        if not len(x):
            return
        x, reconstruction = x.double(), reconstruction.to(x.device).double()
        # Sums around the first batch's mean, since sums of squares cancel for rows far from zero.
        if self._origin is None or self._total is None:
            self._origin = x.mean(0)
            self._total = self._origin.new_zeros(self._origin.shape)
        centred = x - self._origin.to(x.device)
        self.rows += len(x)
        self.residual += float((x - reconstruction).pow(2).sum())
        self._square += float(centred.pow(2).sum())
        self._total = self._total + centred.sum(0).to(self._origin.device)

    @property
    def variance(self) -> float:
        """Sum of squared distances to the mean of all rows counted."""
        if self._total is None:
            return 0.0
        return max(0.0, self._square - float(self._total.pow(2).sum()) / self.rows)

    @property
    def value(self) -> float:
        """1 - residual / variance; NaN if all rows are equal."""
        return float(explained_by_sums(self.residual, self.variance))


def explained_variance(rows: Tensor, reconstruct: Callable[[Tensor], Tensor], chunk: int = 8192) -> float:
    """Explained variance of rows (n, d) by a reconstruction, computed in chunks of rows."""
    import torch

    sums = ExplainedVariance()
    with torch.no_grad():
        for part in rows.split(chunk):
            sums.add(part, reconstruct(part))
    return sums.value


IGNORED_LABEL = -100
"""Label of a token that is not a target of the cross-entropy, as in transformers."""


def loss_recovered(clean: float, ablated: float, spliced: float) -> float:
    """Share of the ablation's loss that a reconstruction recovers; NaN if the ablation does not raise the loss."""
    return (ablated - spliced) / (ablated - clean) if ablated > clean else math.nan


def perplexity(log_probabilities: Tensor, counted: Tensor) -> Tensor:
    """Perplexity per sequence.

    Args:
        log_probabilities: (..., T) log-probabilities of the generated tokens, in nats.
        counted: (..., T) bool, False at padding.

    Returns:
        (...,) values of 1 or more; NaN for a sequence without tokens.
    """
    return (-log_probabilities).masked_fill(~counted, 0.0).sum(-1).div(counted.sum(-1)).exp()


def quantile_bins(values: Tensor) -> Tensor:
    """Index of the bin between `EDGES` of every value, int64."""
    import torch

    inner = torch.from_numpy(EDGES[1:-1]).to(values.device, torch.float32)
    return torch.bucketize(values.float(), inner, right=True)


def quantile_of_counts(counts: Tensor, largest: Tensor, q: float = 0.99) -> Tensor:
    """Quantile of values above zero from their counts per bin, with a relative error below 1 %.

    Args:
        counts: (..., bins) number of values in each bin of `quantile_bins`.
        largest: (...,) largest value, which the result never exceeds.
        q: Quantile in 0..1: the smallest value with at least this share of the values at or below it.

    Returns:
        (...,) float32 geometric middle of the quantile's bin; 0 where nothing was counted.
    """
    import torch

    cumulative = counts.cumsum(-1)
    wanted = (q * cumulative[..., -1:]).ceil().clamp(min=1)
    middle = torch.from_numpy(np.sqrt(EDGES[1:] * EDGES[:-1])).to(counts.device, torch.float32)
    found = middle[(cumulative >= wanted).int().argmax(-1)]
    return torch.where(cumulative[..., -1] > 0, torch.minimum(found, largest.float()), 0.0)


class Quantiles:
    """Streaming quantiles of the activations above zero of many latents.

    Attributes:
        counts: (n, bins) int32, which may be added over processes.
        largest: (n,) float32.
    """

    def __init__(self, n: int) -> None:
        import torch

        self.counts = torch.zeros(n, len(EDGES) - 1, dtype=torch.int32)
        self.largest = torch.zeros(n)

    def add(self, latent: Tensor, value: Tensor) -> None:
        """Count values (m,) above zero of latents (m,)."""
        value = value.float().cpu()
        at = latent.cpu() * self.counts.shape[1] + quantile_bins(value)
        self.counts.view(-1).index_add_(0, at, self.counts.new_ones(len(at)))
        self.largest.scatter_reduce_(0, latent.cpu(), value, "amax")

    def value(self, q: float = 0.99) -> Tensor:
        """(n,) quantile of every latent; 0 for one that was never active."""
        return quantile_of_counts(self.counts, self.largest, q)


def p99(acts: Tensor, chunk: int = 4096) -> Tensor:
    """99th percentile of every latent's activations above zero: the unit of steering strengths.

    Args:
        acts: (n, d_sae) activations.
        chunk: Number of rows counted at once.

    Returns:
        (d_sae,) float32; 0 for a latent that is never active, which cannot be steered in this unit.
    """
    counts = Quantiles(acts.shape[1])
    for part in acts.split(chunk):
        row, latent = (part > 0).nonzero(as_tuple=True)
        counts.add(latent, part[row, latent])
    return counts.value()


def mean_map(total: Tensor, rows: Tensor) -> Tensor:
    """Mean activation per patch: sums (..., patches) over the number of rows (patches,); 0 without rows."""
    return total / rows.to(total.device).clamp(min=1)

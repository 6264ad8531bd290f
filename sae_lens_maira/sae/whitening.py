"""Whitening as SAELens trains with it, and in the symmetric form that controls take.

    covariance = E diag(v) E^T,   s = (v + eps)^(1/2)
    PCA:        z = (x - mean) E diag(1/s)          symmetric:  z = (x - mean) E diag(1/s) E^T

The first is SAELens' `ActivationScaler.estimate_whitening` (arXiv 2511.13981), which can only read a data provider;
here the moments come from wherever they were summed. Its axes have free signs, so that two processes may differ by
more than rounding; the symmetric form has none, and random directions are as random in it.
"""

from dataclasses import dataclass

import torch
from sae_lens.training.activation_scaler import ActivationWhitening
from torch import Tensor

from sae_lens_maira.errors import SAEError

EPS = 1e-3


@dataclass
class Moments:
    """Count (), sum (d_in,) and sum of outer products (d_in, d_in) of rows, in float64; sums of ranks may be added."""

    count: Tensor
    total: Tensor
    outer: Tensor

    @classmethod
    def none(cls, d_in: int, device: torch.device) -> "Moments":
        """Of no rows yet."""
        shapes = ((), (d_in,), (d_in, d_in))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, rows: Tensor) -> None:
        """Count rows (n, d_in) in."""
        rows = rows.to(self.total.device, torch.float64)
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer += rows.T @ rows


def pca_whitening(moments: Moments) -> ActivationWhitening:
    """SAELens' whitening of rows known by their moments.

    Raises:
        SAEError: Fewer than two rows, or a value that is not finite.
    """
    mean, axes, scale = _spectrum(moments)
    return ActivationWhitening(
        mean=mean, matrix=(axes / scale).contiguous(), inverse_matrix=(scale[:, None] * axes.T).contiguous()
    )


def symmetric_whitening(rows: Tensor, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """Matrix (d_in, d_in) that gives centred rows unit covariance without turning them, and its inverse, in float64.

    Args:
        rows: (n, d_in).
        chunk: Rows turned to float64 at once.

    Raises:
        SAEError: There are not more rows than dimensions, so that some direction has almost no variance, or a
            value is not finite.
    """
    if rows.ndim != 2 or len(rows) <= rows.shape[-1]:
        raise SAEError(
            f"Rows of shape {tuple(rows.shape)} cannot be whitened: (n, d_in) with n above d_in was expected, since a "
            "direction in which the rows do not vary would be amplified without bound. Give more rows."
        )
    moments = Moments.none(rows.shape[1], rows.device)
    for part in rows.split(chunk):
        moments.add(part)
    _, axes, scale = _spectrum(moments)
    return (axes / scale) @ axes.T, (axes * scale) @ axes.T


def _spectrum(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, principal axes (columns) and standard deviations, `EPS` added to the variances."""
    count, total, outer = moments.count, moments.total, moments.outer
    if count < 2 or not bool(torch.isfinite(outer).all()):
        raise SAEError(
            f"The covariance of {int(count)} rows cannot be computed: two or more rows of finite values were expected. "
            "Drop or repair rows with NaN or infinity where activations are harvested."
        )
    mean = total / count
    variances, axes = torch.linalg.eigh((outer - count * torch.outer(mean, mean)) / (count - 1))
    return mean, axes, (variances.clamp(min=0) + EPS).sqrt()

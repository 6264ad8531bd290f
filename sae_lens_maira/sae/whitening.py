"""Whitening as SAELens trains with it, and in the symmetric form that controls take.

    covariance = E diag(v) E^T,   s = (v + eps)^(1/2)
    PCA:        z = (x - mean) E diag(1/s)          symmetric:  z = (x - mean) E diag(1/s) E^T

The first is SAELens' `ActivationScaler.estimate_whitening` (arXiv 2511.13981), which can only read a data provider;
here the moments come from wherever they were summed. Its axes have free signs, so that two processes may differ by
more than rounding; the symmetric form has none, and random directions are as random in it. It knows nothing about SAEs.
"""

import torch
from sae_lens.training.activation_scaler import ActivationWhitening
from torch import Tensor

from sae_lens_maira.errors import SAEError

EPS = 1e-3


def whitening_from_moments(count: Tensor, total: Tensor, outer: Tensor) -> ActivationWhitening:
    """PCA whitening of rows known by their moments.

    Args:
        count: () number of rows, float64.
        total: (d_in,) their sum, float64.
        outer: (d_in, d_in) sum of their outer products, float64.

    Raises:
        SAEError: fewer than two rows, or a value that is not finite.
    """
    mean, axes, scale = _spectrum(count, total, outer)
    return ActivationWhitening(
        mean=mean, matrix=(axes / scale).contiguous(), inverse_matrix=(scale[:, None] * axes.T).contiguous()
    )


def symmetric_whitening(rows: Tensor, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """Matrix (d_in, d_in) that gives centred rows unit covariance without turning them, and its inverse, in float64.

    Args:
        rows: (n, d_in).
        chunk: rows turned to float64 at once.

    Raises:
        SAEError: there are not more rows than dimensions, so that some direction has no variance to speak of, or a
            value is not finite.
    """
    if rows.ndim != 2 or len(rows) <= rows.shape[-1]:
        raise SAEError(
            f"Rows of shape {tuple(rows.shape)} cannot be whitened: (n, d_in) with n above d_in was expected, since a "
            "direction in which the rows do not vary would be blown up. Give more rows."
        )
    d_in, device = rows.shape[1], rows.device
    total = torch.zeros(d_in, dtype=torch.float64, device=device)
    outer = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk].double()
        total += part.sum(0)
        outer += part.T @ part
    count = torch.tensor(len(rows), dtype=torch.float64, device=device)
    _, axes, scale = _spectrum(count, total, outer)
    return (axes / scale) @ axes.T, (axes * scale) @ axes.T


def _spectrum(count: Tensor, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, principal axes (columns) and standard deviations, `EPS` added to the variances."""
    if count < 2 or not bool(torch.isfinite(outer).all()):
        raise SAEError(
            f"The covariance of {int(count)} rows cannot be had: two or more rows of finite values were expected. Drop "
            "or repair rows with NaN or infinity where activations are harvested."
        )
    mean = total / count
    variances, axes = torch.linalg.eigh((outer - count * torch.outer(mean, mean)) / (count - 1))
    return mean, axes, (variances.clamp(min=0) + EPS).sqrt()

"""PCA whitening as SAELens trains with it: z = (x - mean) M, and back x = z M^-1 + mean.

    covariance = E diag(v) E^T,   M = E diag(v + eps)^(-1/2),   M^-1 = diag(v + eps)^(1/2) E^T

Formula and `eps` are those of SAELens' `ActivationScaler.estimate_whitening` (arXiv 2511.13981), which can only read a
data provider; here the moments come from wherever they were summed. Principal axes have no sign of their own: two
machines may give opposite ones. It knows nothing about SAEs.
"""

import torch
from sae_lens.training.activation_scaler import ActivationWhitening
from torch import Tensor

from sae_lens_maira.errors import SAEError

EPS = 1e-3


def whitening_from_moments(count: Tensor, total: Tensor, outer: Tensor) -> ActivationWhitening:
    """Whitening of rows known by their moments.

    Args:
        count: () number of rows, float64.
        total: (d_in,) their sum, float64.
        outer: (d_in, d_in) sum of their outer products, float64.
    """
    mean = total / count
    variances, axes = torch.linalg.eigh((outer - count * torch.outer(mean, mean)) / (count - 1))
    scale = (variances.clamp(min=0) + EPS).sqrt()
    return ActivationWhitening(
        mean=mean, matrix=(axes / scale).contiguous(), inverse_matrix=(scale[:, None] * axes.T).contiguous()
    )


def whitening_of(rows: Tensor, chunk: int = 65536) -> ActivationWhitening:
    """Whitening of rows (n, d_in), in float64.

    Raises:
        SAEError: there are not more rows than dimensions, so that some direction has no variance to speak of.
    """
    if rows.ndim != 2 or len(rows) <= rows.shape[-1]:
        raise SAEError(
            f"Rows of shape {tuple(rows.shape)} cannot be whitened: (n, d_in) with n above d_in was expected, since a "
            "direction in which the rows do not vary would be blown up. Give more rows."
        )
    total, outer = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk].double()
        total, outer = total.to(part.device) + part.sum(0), outer.to(part.device) + part.T @ part
    return whitening_from_moments(torch.tensor(len(rows), dtype=torch.float64), total, outer)

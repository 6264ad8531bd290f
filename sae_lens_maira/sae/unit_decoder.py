"""dictionary_learning's constraint on the decoder, |W_dec[j]| = 1, and its first guess of b_dec.

    gradient of row j:   g <- g - (g . w) w,   w = W_dec[j] / |W_dec[j]|
    after each update:   W_dec[j] <- W_dec[j] / |W_dec[j]|

The projection is an autograd function, so any optimiser and any trainer see the projected gradient. The small
constants in the denominators are that library's. This module knows nothing about losses or configurations.
"""

from typing import Any

import torch
from torch import Tensor


class _TangentGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(W_dec)
        return W_dec.view_as(W_dec)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (W_dec,) = ctx.saved_tensors
        (gradient,) = grad_outputs
        direction = W_dec / (W_dec.norm(dim=-1, keepdim=True) + 1e-6)
        return gradient - (gradient * direction).sum(dim=-1, keepdim=True) * direction


def with_tangent_gradient(W_dec: Tensor) -> Tensor:
    """W_dec itself, whose gradient loses the part along each row; (d_sae, d_in)."""
    return _TangentGradient.apply(W_dec)  # pyright: ignore[reportReturnType] - apply() is untyped in torch


def unit_rows(W_dec: Tensor) -> Tensor:
    """Rows divided by their norms; a zero row stays zero."""
    return W_dec / (W_dec.norm(dim=-1, keepdim=True) + torch.finfo(W_dec.dtype).eps)


@torch.no_grad()
def geometric_median(points: Tensor, max_iter: int = 100, tol: float = 1e-5) -> Tensor:
    """Point with the least sum of distances to the rows, by Weiszfeld's iteration from the mean.

    Args:
        points: (n, d).
        max_iter: most iterations.
        tol: stop when the guess moves less than this.

    Returns:
        (d,). A guess that falls exactly on a row is returned as it is: its weight would be infinite.
    """
    guess = points.mean(dim=0)
    for _ in range(max_iter):
        distances = (points - guess).norm(dim=1)
        if bool((distances == 0).any()):
            return guess
        weights = 1 / distances
        # A sum of products, not a matrix product: autocast would turn the latter into bfloat16.
        previous, guess = guess, ((weights / weights.sum())[:, None] * points).sum(dim=0)
        if (guess - previous).norm() < tol:
            break
    return guess

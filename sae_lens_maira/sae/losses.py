"""Terms of the Matryoshka loss and dictionary_learning's decoder constraint, as plain functions of tensors.

    x_i = b_dec + sum_{j < w_i} f_j W_dec[j]            nested reconstructions
    L_i = mean_rows sum_d (x_i - x)^2
    aux: min(d_in // 2, dead) dead latents per row reconstruct the detached error, without b_dec

The auxiliary terms differ between libraries in what is easily overlooked: whether the dead latents' activations pass a
ReLU first, whether the error is divided by its variance, whether few dead latents scale the term down.

    gradient of row j:   g <- g - (g . w) w,   w = W_dec[j] / |W_dec[j]|          |W_dec[j]| = 1 is kept:
    after each update:   W_dec[j] <- W_dec[j] / |W_dec[j]|

The projection is an autograd function, so any optimiser and any trainer see the projected gradient. The small
constants in the denominators are that library's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor


def nested_reconstructions(
    coefficients: Tensor, W_dec: Tensor, b_dec: Tensor, widths: Sequence[int]
) -> list[Tensor]:
    """Reconstruction from each prefix of latents, in one pass over the decoder.

    Args:
        coefficients: (..., d_sae) factors of the decoder rows.
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
        widths: Cumulative level widths.

    Returns:
        One (..., d_in) tensor per level.
    """
    reconstructions: list[Tensor] = []
    decoded, start = b_dec, 0
    for width in widths:
        decoded = coefficients[..., start:width] @ W_dec[start:width] + decoded
        reconstructions.append(decoded)
        start = width
    return reconstructions


def decode_levels(acts: Tensor, W_dec: Tensor, b_dec: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """`nested_reconstructions` without gradients; on a CPU only the active latents' decoder rows are read."""
    if acts.device.type != "cpu" or acts.ndim != 2 or int(acts.count_nonzero()) * SPARSE > acts.numel():
        return nested_reconstructions(acts, W_dec, b_dec, widths)
    reconstructions: list[Tensor] = []
    decoded, start = b_dec.expand(len(acts), -1), 0
    for width in widths:
        row, latent = acts[:, start:width].nonzero(as_tuple=True)
        first = torch.searchsorted(row, torch.arange(len(acts)))
        values = acts[row, start + latent]
        part = torch.nn.functional.embedding_bag(
            start + latent, W_dec, first, mode="sum", per_sample_weights=values
        )
        decoded = decoded + part
        reconstructions.append(decoded)
        start = width
    return reconstructions


SPARSE = 16
"""Activations are decoded latent by latent if at most one in so many is active."""


def squared_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Squared error summed over d_in, averaged over rows."""
    return torch.nn.functional.mse_loss(reconstruction, x, reduction="none").sum(dim=-1).mean()


def per_level_aux_loss(
    x: Tensor,
    reconstructions: Sequence[Tensor],
    hidden_pre: Tensor,
    dead: Tensor,
    W_dec: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """SAELens' Matryoshka auxiliary term: the dead latents of each level reconstruct that level's own error.

    Args:
        x: (batch, d_in) rows to reconstruct.
        reconstructions: One (batch, d_in) tensor per level.
        hidden_pre: (batch, d_sae) pre-activations, negative ones included.
        dead: (d_sae,) bool, at least one of them True.
        W_dec: (d_sae, d_in), with unit rows where activations are scaled by the decoder's norms.
        widths: Cumulative level widths.
    """
    k_full = x.shape[-1] // 2
    total, start = x.new_zeros(()), 0
    for width, reconstruction in zip(widths, reconstructions, strict=True):
        level = slice(start, width)
        start = width
        n_dead = int(dead[level].sum())
        if n_dead == 0:
            continue
        acts = calculate_topk_aux_acts(min(k_full, n_dead), hidden_pre[..., level], dead[level])
        error = squared_error(acts @ W_dec[level], (x - reconstruction).detach())
        total = total + min(n_dead / k_full, 1.0) * error
    return total


def variance_normalised_aux_loss(
    x: Tensor, reconstruction: Tensor, hidden_pre: Tensor, dead: Tensor, W_dec: Tensor
) -> Tensor:
    """dictionary_learning's auxiliary term: squared error of the dead latents' fit, over its variance.

    The activations pass a ReLU first; a batch whose error has no variance counts 0. Computed in float32 at
    least.

    Args:
        x: (batch, d_in) rows to reconstruct.
        reconstruction: (batch, d_in) full reconstruction.
        hidden_pre: (batch, d_sae) pre-activations.
        dead: (d_sae,) bool, at least one of them True.
        W_dec: (d_sae, d_in) with rows of norm 1.
    """
    residual = (x - reconstruction).detach()
    k_aux = min(x.shape[-1] // 2, int(dead.sum()))
    fit = calculate_topk_aux_acts(k_aux, hidden_pre.relu(), dead) @ W_dec
    at_least_float32 = torch.promote_types(residual.dtype, torch.float32)
    residual, fit = residual.to(at_least_float32), fit.to(at_least_float32)
    variance = (residual - residual.mean(dim=0)).pow(2).sum(dim=-1).mean()
    return ((residual - fit).pow(2).sum(dim=-1).mean() / variance).nan_to_num(0.0)


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
        max_iter: Most iterations.
        tol: Stop when the guess moves less than this.

    Returns:
        (d,). A guess that falls exactly on a row is returned unchanged: its weight would be infinite.
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

"""The terms of the Matryoshka loss, as plain functions of tensors.

    x_i = b_dec + sum_{j < w_i} f_j W_dec[j]            nested reconstructions
    L_i = mean_rows sum_d (x_i - x)^2
    aux: min(d_in // 2, dead) dead latents per row reconstruct the detached error, without b_dec

The auxiliary terms differ between libraries in what is easily overlooked: whether the dead latents'
activations pass a ReLU first, whether the error is divided by its variance, whether few dead latents scale
the term down. This module knows nothing about SAEs, configurations or training steps.
"""

from collections.abc import Sequence

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
        widths: cumulative level widths.

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
        reconstructions: one (batch, d_in) tensor per level.
        hidden_pre: (batch, d_sae) pre-activations, negative ones included.
        dead: (d_sae,) bool, at least one of them True.
        W_dec: (d_sae, d_in), with unit rows where activations are scaled by the decoder's norms.
        widths: cumulative level widths.
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

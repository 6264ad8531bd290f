"""The yardstick beside every SAE: one of the same shape that has learnt nothing.

    W_dec[j] = g u_j,  |u_j| = 1 random,  W_enc = u^T,  b_dec = mean of the rows
    whitened:  W_dec[j] = g u_j M^-1,  W_enc = M u^T

Its threshold is set so that as many latents fire per row as in the trained SAE, and its gain g is the best single
factor in the least-squares sense: an untrained SAE that overshoots would be too easy to beat. What it explains,
any set of directions explains. This module knows nothing about metrics.
"""

from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.config import MatryoshkaSAEConfig
from sae_lens_maira.sae.inference import MatryoshkaSAE, matryoshka_from_state_dict
from sae_lens_maira.sae.levels import level_widths_of
from sae_lens_maira.sae.whitening import symmetric_whitening


@torch.no_grad()
def untrained_like(
    sae: SAE[Any],
    rows: Tensor,
    *,
    l0: float | None = None,
    seed: int = 0,
    max_rows: int = 2048,
    whiten: bool = False,
) -> MatryoshkaSAE:
    """An untrained SAE of the same shape, levels and sparsity.

    Args:
        sae: the SAE to stand beside.
        rows: (n, d_in) activation rows to calibrate on.
        l0: latents that fire per row; None measures the given SAE on the rows. About half of all latents is the
            most that random directions give.
        seed: of the random directions.
        max_rows: set threshold and gain on at most this many rows, evenly spaced.
        whiten: directions are random where all the rows given have unit covariance, as they are at the start of an SAE
            trained with `normalize_activations="covariance_whitening"`. Which of the two is the stricter control
            differs from one kind of position to another (docs/log.md).

    Raises:
        SAEError: the rows do not fit the SAE, no threshold gives that sparsity, or there are too few to whiten.
    """
    d_in, d_sae = sae.cfg.d_in, sae.cfg.d_sae
    if rows.ndim != 2 or rows.shape[1] != d_in or len(rows) == 0:
        raise SAEError(f"Rows of shape {tuple(rows.shape)} were given; (n, {d_in}) with n > 0 was expected.")
    whitening = symmetric_whitening(rows) if whiten else None
    stride = -(-len(rows) // max_rows)
    rows = rows[::stride].to(sae.device, torch.float32)
    if l0 is None:
        l0 = float((sae.encode(rows) != 0).sum(-1).float().mean())
    n_active = round(l0 * len(rows))
    if not 0 <= n_active < len(rows) * d_sae:
        raise SAEError(f"l0={l0} active latents per row cannot be set in an SAE of {d_sae} latents.")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(d_sae, d_in, generator=generator)
    directions = (directions / directions.norm(dim=-1, keepdim=True)).to(rows.device)
    encoder, decoder = directions.T, directions
    if whitening is not None:
        matrix, inverse = (part.to(rows) for part in whitening)
        encoder, decoder = matrix @ directions.T, directions @ inverse
    b_dec = rows.mean(0)
    centred = rows - b_dec
    pre = centred @ encoder
    threshold = pre.flatten().topk(n_active + 1).values[-1].clamp(min=0)
    raw = (pre * (pre > threshold)) @ decoder
    gain = (centred * raw).sum() / raw.pow(2).sum().clamp(min=torch.finfo(torch.float32).tiny)
    config = MatryoshkaSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        device=str(rows.device),
        metadata=SAEMetadata(
            model_name=sae.cfg.metadata.model_name,
            hook_name=sae.cfg.metadata.hook_name,
            untrained={"seed": seed, "l0": l0, "gain": float(gain), "whitened": whiten},
        ),
        matryoshka_widths=list(level_widths_of(sae)),
        k=l0,
    )
    return matryoshka_from_state_dict(
        config,
        {
            "W_enc": encoder,
            "b_enc": torch.zeros(d_sae, device=rows.device),
            "threshold": threshold.expand(d_sae),
            "W_dec": gain * decoder,
            "b_dec": b_dec,
        },
    )

"""The residual stream's own axes as an SAE of 2 d_in latents: each dimension, with either sign.

    f = relu(z) [z > t],  z = +-(x - mean) / std          x = f W_dec + mean where every z passed

One threshold t for all lets as many latents fire per row as the SAE beside it. It is an SAELens SAE like any other,
so records, explanations and scores of raw dimensions are made by the same code. It knows nothing about findings.
"""

from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig
from sae_lens_maira.sae.inference import matryoshka_from_state_dict


@torch.no_grad()
def raw_dimensions_like(
    sae: SAE[Any], rows: torch.Tensor, *, l0: float | None = None, max_rows: int = 2048
) -> MatryoshkaSAE:
    """Raw dimensions with the sparsity of an SAE.

    Args:
        sae: the SAE to stand beside.
        rows: (n, d_in) activation rows to calibrate on.
        l0: latents that fire per row; None measures the given SAE on the rows.
        max_rows: use at most this many rows, evenly spaced.

    Raises:
        SAEError: the rows do not fit the SAE, or no threshold gives that sparsity.
    """
    d_in = int(sae.cfg.d_in)
    if rows.ndim != 2 or rows.shape[1] != d_in or len(rows) < 2:
        raise SAEError(f"Rows of shape {tuple(rows.shape)} were given; (n, {d_in}) with n > 1 was expected.")
    rows = rows[:: -(-len(rows) // max_rows)].to(sae.device, torch.float32)
    if l0 is None:
        l0 = float((sae.encode(rows.to(sae.W_dec.dtype)) != 0).sum(-1).float().mean())
    mean, std = rows.mean(0), rows.std(0).clamp(min=1e-6)
    size = ((rows - mean) / std).abs().flatten()
    n_active = round(l0 * len(rows))
    if not 0 <= n_active < len(size):
        raise SAEError(f"l0={l0} active latents per row cannot be set in {2 * d_in} raw dimensions.")
    threshold = size.topk(n_active + 1).values[-1]
    metadata = SAEMetadata(
        model_name=sae.cfg.metadata.model_name, hook_name=sae.cfg.metadata.hook_name, raw={"l0": l0}
    )
    config = MatryoshkaSAEConfig(
        d_in=d_in,
        d_sae=2 * d_in,
        device=str(rows.device),
        metadata=metadata,
        matryoshka_widths=[2 * d_in],
        k=l0,
    )
    scale, unscale = torch.diag(1 / std), torch.diag(std)
    return matryoshka_from_state_dict(
        config,
        {
            "W_enc": torch.cat([scale, -scale], 1),
            "b_enc": torch.zeros(2 * d_in, device=rows.device),
            "threshold": threshold.expand(2 * d_in),
            "W_dec": torch.cat([unscale, -unscale]),
            "b_dec": mean,
        },
    )

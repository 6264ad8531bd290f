"""Control SAEs: what an SAE's scores are compared with.

    untrained            f = relu(z) [z > t],  z = (x - mean) U,  x_hat = g f U^T + mean       U random unit columns
    untrained_whitened   z = (x - mean) M U,   x_hat = g f U^T M^-1 + mean                     M whitens the rows
    raw                  z = +-(x - mean) / std per dimension, 2 d_in latents
    frozen_decoder       trained like the SAE, while its random decoder stays fixed
    frozen_encoder       trained like the SAE, while its random encoder stays fixed

The first three are computed from rows by `make_control`. One threshold t lets as many latents fire per row as the SAE
does; the gain g is the best single factor in the least-squares sense, since an untrained SAE that overshoots would be
too easy to beat. The frozen ones (arXiv 2602.14111) are trained by `training.train_control` or `train --control`. Every
control is an SAELens SAE, so that records, explanations, scores and steering treat it as the SAE itself, and its
metadata name it under "control".
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.config import MatryoshkaSAEConfig
from sae_lens_maira.sae.inference import MatryoshkaSAE, matryoshka_from_state_dict
from sae_lens_maira.sae.levels import CONTROL_KEY, level_widths_of
from sae_lens_maira.sae.losses import decode_levels
from sae_lens_maira.sae.whitening import symmetric_whitening

Control = Literal["untrained", "untrained_whitened", "raw", "frozen_decoder", "frozen_encoder"]
CONTROLS: tuple[Control, ...] = (
    "untrained",
    "untrained_whitened",
    "raw",
    "frozen_decoder",
    "frozen_encoder",
)

MOST_PREACTIVATIONS = 2**25
"""Pre-activations that a threshold is set on at most: 134 MB in float32."""


@torch.no_grad()
def make_control(
    kind: str,
    sae: SAE[Any],
    rows: Tensor,
    seed: int = 0,
    *,
    l0: float | None = None,
    max_rows: int = 4096,
) -> MatryoshkaSAE:
    """Make a control of an SAE that needs no training.

    Args:
        kind: "untrained", "untrained_whitened" or "raw". The untrained SAE has the SAE's size and levels; raw has
            2 d_in latents in one level: each dimension of the residual stream, with either sign.
        sae: The SAE to compare with.
        rows: (n, d_in) activation rows; mean, whitening and standard deviation are those of all of them.
        seed: Random seed of the directions.
        l0: Latents that fire per row; None measures the SAE on the rows.
        max_rows: Set threshold and gain on at most this many rows, evenly spaced.

    Raises:
        SAEError: The kind is unknown or must be trained, the rows do not fit the SAE or are too few, or no threshold
            gives that sparsity.
    """
    if kind not in CONTROLS:
        raise SAEError(f"The control {kind!r} is unknown; expected one of {', '.join(CONTROLS)}.")
    if kind.startswith("frozen"):
        raise SAEError(
            f"The control {kind!r} is trained, not computed from rows. Train it with `sae-lens-maira train --control "
            f"{kind}` or training.train_control, and pass its folder."
        )
    d_in = int(sae.cfg.d_in)
    fewest = 2 if kind == "raw" else 1
    if rows.ndim != 2 or rows.shape[1] != d_in or len(rows) < fewest:
        raise SAEError(
            f"Rows of shape {tuple(rows.shape)} were given; (n, {d_in}) with n of {fewest} or more was expected."
        )
    device = sae.W_dec.device
    encoder, decoder, widths = _directions(kind, sae, rows, seed)
    encoder, decoder = (part.to(device, torch.float32) for part in (encoder, decoder))
    mean, threshold, gain, l0 = _calibrate(kind, sae, rows, encoder, decoder, l0, max_rows)
    facts = {"kind": kind, "seed": seed, "l0": l0, "gain": float(gain)}
    config = MatryoshkaSAEConfig(
        d_in=d_in,
        d_sae=encoder.shape[1],
        device=str(device),
        metadata=SAEMetadata(
            model_name=sae.cfg.metadata.model_name,
            hook_name=sae.cfg.metadata.hook_name,
            **{CONTROL_KEY: facts},
        ),
        matryoshka_widths=widths,
        k=l0,
    )
    return matryoshka_from_state_dict(
        config,
        {
            "W_enc": encoder,
            "b_enc": torch.zeros(config.d_sae, device=device),
            "threshold": threshold.expand(config.d_sae),
            "W_dec": gain * decoder,
            "b_dec": mean,
        },
    )


def _calibrate(
    kind: str,
    sae: SAE[Any],
    rows: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    l0: float | None,
    max_rows: int,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mean (d_in,), threshold, gain and active latents per row of a control with these directions."""
    max_rows = max(1, min(max_rows, MOST_PREACTIVATIONS // encoder.shape[1]))
    sample = rows[:: -(-len(rows) // max_rows)].to(encoder)
    if l0 is None:
        l0 = float((sae.encode(sample.to(sae.W_dec.dtype)) != 0).sum(-1).float().mean())
    mean = rows.float().mean(0).to(encoder.device)
    centred = sample - mean
    pre = centred @ encoder
    n_active = round(l0 * len(sample))
    if not 0 <= n_active < pre.numel():
        raise SAEError(
            f"{l0} active latents per row cannot be set among {pre.shape[1]} latents of the control {kind!r}."
        )
    threshold = pre.flatten().topk(n_active + 1).values[-1].clamp(min=0)
    gain = torch.ones((), device=encoder.device)
    if kind != "raw":
        raw = (pre * (pre > threshold)) @ decoder
        gain = (centred * raw).sum() / raw.pow(2).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return mean, threshold, gain, l0


class UntrainedControls:
    """Untrained SAEs of several sets of rows that share one matrix of directions.

    Each has the same encoder and decoder, and the mean, threshold and gain of its own rows: at d_in 4,096 and d_sae
    16,384 a second one costs a vector, where `make_control` would make another 0.5 GB of weights.

    Args:
        sae: The SAE to compare with.
        seed: Random seed of the directions, as for `make_control`.
    """

    def __init__(self, sae: SAE[Any], seed: int = 0) -> None:
        self._sae = sae
        encoder, _, self.widths = _directions("untrained", sae, torch.empty(0, sae.cfg.d_in), seed)
        self._units = encoder.T.contiguous().to(sae.W_dec.device, torch.float32)

    @torch.no_grad()
    def fit(self, rows: Tensor) -> "UntrainedControl":
        """The control for rows (n, d_in), which may be a sample of those that it will be compared on."""
        units = self._units
        mean, threshold, gain, _ = _calibrate("untrained", self._sae, rows, units.T, units, None, 4096)
        return UntrainedControl(units, tuple(self.widths), mean, threshold, gain)


@dataclass(frozen=True)
class UntrainedControl:
    """One of `UntrainedControls`: the same numbers as `make_control("untrained", ...)`, without weights of its own.

    Attributes:
        units: (d_sae, d_in) random unit directions, shared.
        widths: Cumulative level widths.
        mean: (d_in,) of the rows.
        threshold: Smallest pre-activation that counts, a scalar.
        gain: Factor of the reconstruction, a scalar.
    """

    units: Tensor
    widths: tuple[int, ...]
    mean: Tensor
    threshold: Tensor
    gain: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """(n, d_sae) activations of rows (n, d_in)."""
        pre = (x - self.mean) @ self.units.T
        return pre.masked_fill_(pre <= self.threshold, 0)

    def reconstructions(self, acts: Tensor) -> list[Tensor]:
        """(n, d_in) reconstruction per level."""
        parts = decode_levels(acts, self.units, torch.zeros_like(self.mean), self.widths)
        return [self.gain * part + self.mean for part in parts]


def control_kind(sae: SAE[Any]) -> str | None:
    """The kind of control that an SAE's metadata name, None for an SAE that is not a control."""
    facts = sae.cfg.metadata.get(CONTROL_KEY)
    return None if not facts else str(facts["kind"])


def _directions(kind: str, sae: SAE[Any], rows: Tensor, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    """Encoder (d_in, m), decoder (m, d_in) without gain, and level widths."""
    if kind == "raw":
        std = rows.float().std(0).clamp(min=1e-6)
        scale, unscale = torch.diag(1 / std), torch.diag(std)
        return torch.cat([scale, -scale], 1), torch.cat([unscale, -unscale]), [2 * rows.shape[1]]
    generator = torch.Generator().manual_seed(seed)
    units = torch.randn(sae.cfg.d_sae, sae.cfg.d_in, generator=generator)
    units = units / units.norm(dim=-1, keepdim=True)
    widths = list(level_widths_of(sae))
    if kind == "untrained":
        return units.T, units, widths
    matrix, inverse = (part.to(units) for part in symmetric_whitening(rows))
    return matrix @ units.T, units @ inverse, widths

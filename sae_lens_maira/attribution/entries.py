"""Active latents of one study as a sparse list of entries (position, latent, activation)."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_maira.errors import SAEError

ENCODE_BYTES = 1 << 28


@dataclass(frozen=True)
class Entries:
    """E active (position, latent) pairs of one study.

    Attributes:
        position: (E,) int64 position in the sequence.
        latent: (E,) int64.
        activation: (E,) float32, above 0.
        decoder: (d_sae, d_model) the SAE's decoder, in the SAE's dtype.
        length: Positions of the sequence, L.
    """

    position: torch.Tensor
    latent: torch.Tensor
    activation: torch.Tensor
    decoder: torch.Tensor
    length: int

    def __len__(self) -> int:
        return len(self.position)

    def delta(self, chosen: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
        """What the chosen entries write into the stream: (L, d_model) float32, sum of a W_dec per position.

        Args:
            chosen: (n,) numbers of entries.
            chunk: Entries that are expanded at a time.
        """
        total = torch.zeros(self.length, self.decoder.shape[1], device=self.decoder.device)
        for part in chosen.split(chunk):
            rows = self.decoder[self.latent[part]].float() * self.activation[part][:, None]
            total.index_add_(0, self.position[part], rows)
        return total

    def random_delta(self, n: int, norm: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """What n random entries write, scaled to a norm: the control of removing n entries of that norm.

        They are drawn without replacement from all entries, those that were removed included, so that a group of
        all entries is compared with itself.

        Args:
            n: Number of entries.
            norm: Norm of the result.
            generator: Random generator, on the CPU.

        Returns:
            (L, d_model) float32.

        Raises:
            SAEError: The drawn entries write nothing, so that nothing of that norm can be made of them.
        """
        chosen = torch.randperm(len(self), generator=generator)[:n].to(self.position.device)
        other = self.delta(chosen)
        size = other.norm()
        if not bool(size > 0) and bool(norm > 0):
            raise SAEError(
                f"{len(chosen)} random entries of {len(self)} write nothing into the stream, so they cannot be the "
                f"control of an edit of norm {float(norm):.3g}. Use an SAE whose decoder rows are not zero."
            )
        return other * (norm / size.clamp(min=1e-12))

    def dot(self, gradient: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
        """(E,) a_j(p) W_dec[j] . gradient[p], the first-order effect of every entry.

        Args:
            gradient: (L, d_model) float32.
            chunk: Entries that are expanded at a time.
        """
        found = torch.empty(len(self), device=self.decoder.device)
        for start in range(0, len(self), chunk):
            part = slice(start, start + chunk)
            rows = self.decoder[self.latent[part]].float()
            found[part] = (rows * gradient[self.position[part]]).sum(1) * self.activation[part]
        return found


@torch.no_grad()
def active_entries(
    sae: SAE[Any], hidden: torch.Tensor, positions: torch.Tensor
) -> tuple[Entries, torch.Tensor]:
    """Encode the stream at some positions.

    Args:
        sae: The SAE.
        hidden: (L, d_model).
        positions: (P,) int64 positions to encode.

    Returns:
        The active entries, and the reconstruction error (P, d_model) float32 at the positions.

    Raises:
        SAEError: The SAE's width is not the stream's, or its activations cannot be ablated one by one.
    """
    if sae.cfg.d_in != hidden.shape[1]:
        raise SAEError(
            f"The SAE reads {sae.cfg.d_in} numbers per token and the stream has {hidden.shape[1]}. Use an SAE of this "
            "model and hook point."
        )
    if getattr(sae.cfg, "normalize_activations", "none") not in ("none", None):
        raise SAEError(
            f"The SAE normalises its input ({sae.cfg.normalize_activations}), so an activation is not in the units of "
            "the stream. Fold the normalisation into the weights first (fold_activation_norm_scaling_factor)."
        )
    rows = max(1, ENCODE_BYTES // (4 * sae.cfg.d_sae))
    place, latent, value, errors = [], [], [], []
    for part in positions.split(rows):
        x = hidden[part].to(sae.W_dec)
        acts = sae.encode(x)
        errors.append((x - sae.decode(acts)).float())
        where = acts.nonzero(as_tuple=True)
        place.append(part[where[0]])
        latent.append(where[1])
        value.append(acts[where].float())
    entries = Entries(torch.cat(place), torch.cat(latent), torch.cat(value), sae.W_dec.detach(), len(hidden))
    return entries, torch.cat(errors)

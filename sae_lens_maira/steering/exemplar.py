"""Put a finding in as one study shows it: what its patches hold beyond other studies, where its finding lies.

    delta[p] = w[p] sum_j (e_j[p] - absent_j[p]) W_dec[j]        w[p] = 1 in its boxes and `margin` patches around

e_j are the activations of an exemplar, or of several on average, absent_j the mean of studies without the finding, and
j runs over the latents whose difference is largest inside w. The mean of all studies smears a finding that lies
elsewhere in each; one study's map does not. It knows nothing about reports, and does not choose the exemplar.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.steering.interventions import Add
from sae_lens_maira.steering.schedule import box_grid, patches


@dataclass(frozen=True)
class LatentMap:
    """What is added to a few latents at every frontal patch, at strength 1.

    Attributes:
        latents: largest difference first.
        grids: (P, n) added activations.
        shape: rows and columns of patches.
    """

    latents: tuple[int, ...]
    grids: torch.Tensor
    shape: tuple[int, int]

    def interventions(self, strength: float) -> list[Add]:
        """One `Add` a latent that has a map."""
        return [
            Add(latents=(j,), strength=strength, unit="raw", where=patches(grid=grid.reshape(self.shape)))
            for j, grid in zip(self.latents, self.grids.T, strict=True)
            if bool(grid.any())
        ]

    def delta(self, decoder: torch.Tensor) -> torch.Tensor:
        """(P, d_model) what is added to the stream at strength 1, for decoder rows (D, d_model)."""
        return self.grids @ decoder[list(self.latents)]

    def on_other_latents(self, latents: Sequence[int], decoder: torch.Tensor) -> "LatentMap":
        """The same map on other latents, scaled so that every patch is moved as far as by this one: a control.

        Args:
            latents: as many others, in order.
            decoder: (D, d_model) decoder rows.
        """
        other = LatentMap(tuple(latents), self.grids, self.shape)
        size, theirs = (m.delta(decoder).norm(dim=1, keepdim=True) for m in (self, other))
        return LatentMap(other.latents, self.grids * size / theirs.clamp(min=1e-12), self.shape)


def boxes_place(
    boxes: Sequence[tuple[float, float, float, float]], shape: tuple[int, int], margin: int = 1
) -> torch.Tensor:
    """(P,) 1 at the patches that a box touches and `margin` patches around them; 1 everywhere without boxes.

    Args:
        boxes: x_min, y_min, x_max, y_max in 0..1 of the image.
        shape: rows and columns of patches.
        margin: patches around.
    """
    if not boxes:
        return torch.ones(shape[0] * shape[1])
    touched = torch.stack([box_grid(box, shape) > 0 for box in boxes]).any(0).float()
    grown = torch.nn.functional.max_pool2d(touched[None, None], 2 * margin + 1, stride=1, padding=margin)
    return grown.flatten()


def exemplar_map(
    acts: torch.Tensor,
    absent: torch.Tensor,
    decoder: torch.Tensor,
    place: torch.Tensor,
    shape: tuple[int, int],
    n_latents: int = 16,
) -> LatentMap:
    """What studies with the finding hold beyond those without it, over the latents that differ most inside the place.

    Args:
        acts: (P, D) an exemplar's activations at its frontal patches, or a mean over some or all studies that have
            the finding.
        absent: (P, D) mean activations of studies without the finding.
        decoder: (D, d_model) decoder rows.
        place: (P,) weights, from `boxes_place`.
        shape: rows and columns of patches.
        n_latents: how many.

    Raises:
        InterventionError: shapes that do not fit, or no difference inside the place.
    """
    if acts.shape != absent.shape or acts.shape != (len(place), len(decoder)):
        raise InterventionError(
            f"The exemplar has activations {tuple(acts.shape)}, the mean {tuple(absent.shape)}, for a place of "
            f"{len(place)} patches and {len(decoder)} decoder rows; all must be of the same patches and the same SAE."
        )
    difference = (acts - absent) * place[:, None]
    # The norm of what a latent would add, not of its activation: decoder rows differ in length.
    effect = difference.norm(dim=0) * decoder.norm(dim=1)
    chosen = [j for j in effect.topk(min(n_latents, len(effect))).indices.tolist() if effect[j] > 0]
    if not chosen:
        raise InterventionError(
            "The exemplar's latents equal the mean of other studies at every patch of the place, so there is "
            "nothing to add; give a study that shows the finding there."
        )
    return LatentMap(tuple(chosen), difference[:, chosen].contiguous(), shape)

"""Maps: what is added to latents, or to the stream, at every patch of the frontal image.

    delta[p] = sum_j m_j[p] W_dec[j]            m_j (P,) added activation of latent j, P patches row by row

A `LatentMap` comes from the difference of mean activations between studies with and without a finding, or from what an
exemplar (one study, or a few on average) shows beyond studies without it, inside the finding's boxes. The mean of all
studies smears a finding whose place varies; the map of one study does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.latents import Encoder, RecordSet
from sae_lens_maira.stats import mean_map
from sae_lens_maira.steering.interventions import Add, Direction
from sae_lens_maira.steering.positions import VIEWS, View, box_grid, patches

ROWS_AT_ONCE = 1024
"""Rows that are encoded at once."""


@dataclass(frozen=True)
class LatentMap:
    """What is added to a few latents at every frontal patch, at strength 1.

    Attributes:
        latents: Indices of the latents.
        grids: (P, n) added activations.
        shape: Rows and columns of patches.
    """

    latents: tuple[int, ...]
    grids: torch.Tensor
    shape: tuple[int, int]

    def interventions(self, strength: float) -> list[Add]:
        """One `Add` per latent that has a map."""
        return [
            Add(latents=(j,), strength=strength, unit="raw", where=patches(grid=grid.reshape(self.shape)))
            for j, grid in zip(self.latents, self.grids.T, strict=True)
            if bool(grid.any())
        ]

    def delta(self, decoder: torch.Tensor) -> torch.Tensor:
        """(P, d_model) change of the stream at strength 1, for decoder rows (D, d_model)."""
        return self.grids @ decoder[list(self.latents)]

    def on_other_latents(self, latents: Sequence[int], decoder: torch.Tensor) -> "LatentMap":
        """Control: the same map on other latents, scaled so that every patch changes by the same norm.

        Args:
            latents: As many other latents, in order.
            decoder: (D, d_model) decoder rows.
        """
        other = LatentMap(tuple(latents), self.grids, self.shape)
        size, theirs = (m.delta(decoder).norm(dim=1, keepdim=True) for m in (self, other))
        return LatentMap(other.latents, self.grids * size / theirs.clamp(min=1e-12), self.shape)


class PatchMeans:
    """Mean activation at every frontal patch over groups of studies, accumulated over parts of the rows.

    Args:
        groups: (G, n_studies) bool, the studies of each group.
        shape: Rows and columns of patches.
    """

    def __init__(self, groups: np.ndarray, shape: tuple[int, int]) -> None:
        self.groups, self.shape = groups, shape
        self._total: torch.Tensor | None = None
        self._rows = torch.zeros(len(groups), shape[0] * shape[1])

    def add(self, frontal: ActivationRows, encode: Encoder) -> None:
        """Add rows of frontal patches; `frontal.study` are columns of `groups`."""
        patch = torch.from_numpy(frontal.patch_row.astype(np.int64) * self.shape[1] + frontal.patch_col)
        for part in torch.arange(len(frontal)).split(ROWS_AT_ONCE):
            with torch.no_grad():
                acts = encode(frontal.values[part]).float().cpu()
            if self._total is None:
                self._total = torch.zeros(*self._rows.shape, acts.shape[1])
            member = torch.from_numpy(self.groups[:, frontal.study[part.numpy()]])
            for group, inside in enumerate(member):
                here = patch[part][inside]
                self._total[group].index_add_(0, here, acts[inside])
                self._rows[group] += torch.bincount(here, minlength=self._rows.shape[1])

    def means(self) -> torch.Tensor:
        """(G, P, units) means; 0 at a patch without rows.

        Raises:
            InterventionError: A group has no row.
        """
        empty = [group for group, rows in enumerate(self._rows) if not bool(rows.any())]
        if empty or self._total is None:
            raise InterventionError(
                f"{len(empty)} of {len(self.groups)} groups of studies have no frontal patch, so there is no study on "
                "one side of the comparison; read image positions of more studies."
            )
        return mean_map(self._total.transpose(1, 2), self._rows[:, None]).transpose(1, 2)


def frontal_rows(rows: ActivationRows) -> tuple[ActivationRows, tuple[int, int]]:
    """The rows of frontal patches, and how many rows and columns of patches the images have.

    Raises:
        InterventionError: There are none.
    """
    frontal = rows.where(rows.view == VIEWS["frontal"])
    if len(frontal) == 0:
        raise InterventionError(
            "The rows hold no patch of a frontal image; read image positions to steer at them."
        )
    return frontal, (int(frontal.patch_row.max()) + 1, int(frontal.patch_col.max()) + 1)


def mean_patch_maps(
    rows: ActivationRows, encode: Encoder, positive: np.ndarray, negative: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean activation of every latent at every frontal patch, over positive and over negative studies.

    Args:
        rows: Image rows with all patches of the frontal images.
        encode: The SAE's encoder, or the identity for the stream itself.
        positive: (n_studies,) mask.
        negative: (n_studies,) mask.

    Returns:
        Two (P, latents) tensors.
    """
    frontal, shape = frontal_rows(rows)
    sums = PatchMeans(np.stack([positive, negative]), shape)
    sums.add(frontal, encode)
    present, absent = sums.means()
    return present, absent


def difference_map(
    rows: ActivationRows,
    encode: Encoder,
    decoder: torch.Tensor,
    positive: np.ndarray,
    negative: np.ndarray,
    n_latents: int = 8,
) -> LatentMap:
    """The map of the `n_latents` latents whose mean activation maps differ most between two groups of studies.

    Args:
        rows: Image rows with all patches of the frontal images.
        encode: The SAE's encoder.
        decoder: (d_sae, d_model) decoder rows.
        positive: (n_studies,) studies with the finding.
        negative: (n_studies,) studies without it.
        n_latents: How many latents.
    """
    present, absent = mean_patch_maps(rows, encode, positive, negative)
    everywhere = torch.ones(len(present))
    return exemplar_map(present, absent, decoder, everywhere, frontal_rows(rows)[1], n_latents)


def exemplar_map(
    acts: torch.Tensor,
    absent: torch.Tensor,
    decoder: torch.Tensor,
    place: torch.Tensor,
    shape: tuple[int, int],
    n_latents: int = 16,
) -> LatentMap:
    """The difference to studies without a finding, over the latents that differ most inside a place.

    Args:
        acts: (P, D) activations of an exemplar at its frontal patches, or their mean over several or all studies with
            the finding.
        absent: (P, D) mean activations of studies without the finding.
        decoder: (D, d_model) decoder rows.
        place: (P,) weights, for example from `boxes_place`.
        shape: Rows and columns of patches.
        n_latents: How many latents.

    Raises:
        InterventionError: Shapes that do not fit, or no difference inside the place.
    """
    if acts.shape != absent.shape or acts.shape != (len(place), len(decoder)):
        raise InterventionError(
            f"The exemplar has activations {tuple(acts.shape)}, the mean {tuple(absent.shape)}, for a place of "
            f"{len(place)} patches and {len(decoder)} decoder rows; use the same patches and the same SAE for all."
        )
    difference = (acts - absent) * place[:, None]
    # The norm of what a latent would add, not of its activation: decoder rows differ in length.
    effect = difference.norm(dim=0) * decoder.norm(dim=1)
    chosen = [j for j in effect.topk(min(n_latents, len(effect))).indices.tolist() if effect[j] > 0]
    if not chosen:
        raise InterventionError(
            "The latents of the exemplar equal the mean of other studies at every patch of the place, so there is "
            "nothing to add; give a study that shows the finding there."
        )
    return LatentMap(tuple(chosen), difference[:, chosen].contiguous(), shape)


def recorded_map(records: RecordSet, finding: str, decoder: torch.Tensor, n_latents: int = 8) -> LatentMap:
    """The map of the latents whose recorded mean maps with and without a finding differ most; reads no activation.

    Args:
        records: Latent records of the SAE.
        finding: Name of the finding in the records.
        decoder: (d_sae, d_model) decoder rows of the SAE.
        n_latents: Maximum number of latents.

    Raises:
        RecordError: The records hold no maps of this finding.
        InterventionError: The maps with and without the finding are the same.
    """
    numbers = records.table["latent"].tolist()
    present, absent = (records.mean_maps(finding=finding, present=with_it).T for with_it in (True, False))
    rows = decoder.detach().float().cpu()[numbers]
    found = exemplar_map(present, absent, rows, torch.ones(len(present)), records.grid, n_latents)
    return LatentMap(tuple(numbers[j] for j in found.latents), found.grids, found.shape)


def boxes_place(
    boxes: Sequence[tuple[float, float, float, float]], shape: tuple[int, int], margin: int = 1
) -> torch.Tensor:
    """(P,) 1 at the patches that a box touches and `margin` patches around them; 1 everywhere without boxes.

    Args:
        boxes: x_min, y_min, x_max, y_max in 0..1 of the image.
        shape: Rows and columns of patches.
        margin: Patches around a box.
    """
    if not boxes:
        return torch.ones(shape[0] * shape[1])
    touched = torch.stack([box_grid(box, shape) > 0 for box in boxes]).any(0).float()
    grown = torch.nn.functional.max_pool2d(touched[None, None], 2 * margin + 1, stride=1, padding=margin)
    return grown.flatten()


def map_directions(
    delta: torch.Tensor,
    shape: tuple[int, int],
    strength: float,
    view: View = "frontal",
    tolerance: float = 1e-6,
) -> list[Direction]:
    """Directions with patch weights that add up to a vector per patch, by singular value decomposition.

    Args:
        delta: (P, d_model) vector per patch.
        shape: Rows and columns of patches.
        strength: Multiple of `delta`.
        view: View at whose patches they act.
        tolerance: Directions whose singular value is at most this share of the largest are left out.
    """
    u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
    kept = s > tolerance * s[0]
    return [
        Direction(vector=vh[i], strength=strength, where=patches(view, (u[:, i] * s[i]).reshape(shape)))
        for i in range(len(s))
        if kept[i]
    ]


def random_direction(
    delta: torch.Tensor, shape: tuple[int, int], strength: float, seed: int = 0
) -> Direction:
    """Control: one random direction, with the norm of `delta` (P, d_model) at every patch."""
    drawn = torch.randn(delta.shape[1], generator=torch.Generator().manual_seed(seed))
    grid = delta.norm(dim=1).reshape(shape)
    return Direction(vector=drawn / drawn.norm(), strength=strength, where=patches(grid=grid))

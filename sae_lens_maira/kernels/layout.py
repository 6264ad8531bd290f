"""Two orders of the same kept entries, as the passes over tokens and over latents want to read them.

By token: entries of (row, level) are contiguous, since flat indices ascend and levels are ranges of columns.
Bag number row * L + level, bag boundaries `offsets` (B L + 1,). By latent: a stable sort by column, with
boundaries `pointers` (d_sae + 1,). It knows positions only, no values.
"""

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """Positions of nnz kept entries in row-major order and the permutation that sorts them by latent."""

    rows: torch.Tensor
    """(nnz,) row of each entry."""
    cols: torch.Tensor
    """(nnz,) latent of each entry."""
    bags: torch.Tensor
    """(nnz,) row * levels + level."""
    offsets: torch.Tensor
    """(B levels + 1,) first entry of each bag."""
    by_latent: torch.Tensor
    """(nnz,) entries sorted by latent, rows ascending within a latent."""
    pointers: torch.Tensor
    """(d_sae + 1,) first place of each latent in `by_latent`."""
    batch: int
    levels: int
    d_sae: int

    @property
    def fired(self) -> torch.Tensor:
        """(d_sae,) entries of each latent."""
        return self.pointers.diff()


def build_layout(index: torch.Tensor, batch: int, d_sae: int, widths: tuple[int, ...]) -> Layout:
    """Layout of ascending flat indices into a (batch, d_sae) matrix."""
    levels = len(widths)
    rows = torch.div(index, d_sae, rounding_mode="floor")
    cols = index - rows * d_sae
    edges = torch.tensor(widths, device=index.device)
    bags = rows * levels + torch.bucketize(cols, edges, right=True)
    by_latent = torch.sort(cols.to(torch.int32), stable=True).indices
    return Layout(
        rows=rows,
        cols=cols,
        bags=bags,
        offsets=_boundaries(bags, batch * levels),
        by_latent=by_latent,
        pointers=_boundaries(cols, d_sae),
        batch=batch,
        levels=levels,
        d_sae=d_sae,
    )


def _boundaries(groups: torch.Tensor, number: int) -> torch.Tensor:
    """First position of each of `number` groups when entries are sorted by group, plus the end."""
    counts = torch.bincount(groups, minlength=number)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))

"""Two orders of the same kept entries, as the passes over tokens and over latents read them.

By token: entries of (row, level) are contiguous, since flat indices ascend and levels are ranges of columns.
Bag number row * L + level, bag boundaries `offsets` (B L + 1,). By latent: a stable sort by column, with
boundaries `pointers` (d_sae + 1,). Nothing here waits for a device.
"""

from functools import cache
from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """Positions of nnz kept entries in row-major order and the permutation that sorts them by latent."""

    rows: torch.Tensor
    """(nnz,) row of each entry."""
    cols: torch.Tensor
    """(nnz,) latent of each entry."""
    offsets: torch.Tensor
    """(B levels + 1,) first entry of each bag."""
    by_latent: torch.Tensor
    """(nnz,) entries sorted by latent, rows ascending within a latent."""
    latents: torch.Tensor
    """(nnz,) int32 latent of each of these, ascending."""
    pointers: torch.Tensor
    """(d_sae + 1,) first place of each latent in `by_latent`."""
    batch: int
    widths: tuple[int, ...]
    """Cumulative level widths."""

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.widths)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.widths[-1]

    @property
    def fired(self) -> torch.Tensor:
        """(d_sae,) entries of each latent."""
        return self.pointers.diff()


def build_layout(index: torch.Tensor, batch: int, widths: tuple[int, ...]) -> Layout:
    """Layout of ascending flat indices into a (batch, widths[-1]) matrix."""
    d_sae, levels = widths[-1], len(widths)
    rows = torch.div(index, d_sae, rounding_mode="floor")
    cols = index - rows * d_sae
    bags = bags_of(rows, cols, widths)
    offsets = torch.searchsorted(bags, constants(range(batch * levels + 1), torch.int64, index.device))
    return Layout(rows, cols, offsets, *sort_by_latent(cols.to(torch.int32), d_sae), batch, widths)


def bags_of(rows: torch.Tensor, cols: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """(nnz,) row * levels + level of each entry."""
    edges = constants(widths, torch.int64, rows.device)
    return rows * len(widths) + torch.bucketize(cols, edges, right=True)


def sort_by_latent(cols: torch.Tensor, d_sae: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stable order (nnz,) of int32 columns, the sorted columns, and the first place of each latent (d_sae + 1,)."""
    latents, order = torch.sort(cols, stable=True)
    return order, latents, torch.searchsorted(latents, constants(range(d_sae + 1), torch.int32, cols.device))


@cache
def constants(
    values: tuple[float, ...] | range, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """A tensor of fixed numbers on a device, made once: a copy from the host would make the host wait.

    It is kept for good, since a captured CUDA graph may read it.
    """
    if isinstance(values, range):
        return torch.arange(values.start, values.stop, values.step, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, device=device)

"""Mean activation maps of latents over the patches of images, overall and per finding.

    map[view][j, p]     = sum of activations of latent j at patch p / rows at patch p
    finding map[f, j]   = the same over frontal images of the labelled studies with finding f
    absent              = (N * labelled - n * present) / (N - n)      N, n rows at a patch

Maps per finding exist for frontal images only. Their sums need 4 bytes per finding, latent and patch. If this exceeds
the byte budget, patches are pooled 2 by 2, then 3 by 3 and so on; the record set contains the grid. On disk a map is
stored as float16 shares of its largest value, compressed, so that zeros take almost no space.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.records import MeanMap
from sae_lens_maira.stats import mean_map
from sae_lens_maira.token_roles import VIEWS

if TYPE_CHECKING:
    import torch

MAP_BYTES = 2 << 30
"""Default budget in bytes for the sums of the maps per finding: full resolution at 16,384 latents and 20 findings."""


def pooled_grid(grid: tuple[int, int], maps: int, budget: int) -> tuple[int, tuple[int, int]]:
    """Smallest pooling factor for which `maps` float32 maps fit the budget, and the resulting grid."""
    factor = 1
    while True:
        pooled = (-(-grid[0] // factor), -(-grid[1] // factor))
        if 4 * maps * pooled[0] * pooled[1] <= budget or pooled == (1, 1):
            return factor, pooled
        factor += 1


class MapSums:
    """Running sums of activations per latent and patch.

    Attributes:
        grid: Rows and columns of patches; (0, 0) disables maps.
        views: View -> (d_sae, patches) float32 sums.
        rows: View -> (patches,) int64 number of rows read at each patch.
        studies: View -> number of studies with that view.
        pool, finding_grid: Pooling factor and grid of the findings' maps.
        findings: (F + 1, d_sae, pooled patches) float32 sums over labelled studies with each finding; the last one is
            over all labelled studies. None without findings.
        finding_rows: (F + 1, pooled patches) int64 rows of these sums.
    """

    def __init__(
        self, d_sae: int, grid: tuple[int, int], truth: np.ndarray, labelled: np.ndarray, budget: int
    ) -> None:
        """Set all sums to zero.

        Args:
            d_sae: Number of latents.
            grid: Rows and columns of patches.
            truth: (n_studies, F) bool.
            labelled: (n_studies,) bool.
            budget: Largest size in bytes of the sums per finding.
        """
        import torch  # readers of records do without

        self.d_sae, self.grid = d_sae, grid
        self.views: dict[str, torch.Tensor] = {}
        self.rows: dict[str, torch.Tensor] = {
            view: torch.zeros(grid[0] * grid[1], dtype=torch.int64) for view in VIEWS
        }
        self.studies: dict[str, int] = dict.fromkeys(VIEWS, 0)
        self._counted = torch.from_numpy(np.concatenate([truth & labelled[:, None], labelled[:, None]], 1))
        n = truth.shape[1] + 1 if truth.shape[1] else 0
        self.pool, self.finding_grid = pooled_grid(grid, n * d_sae, budget) if n and all(grid) else (1, grid)
        self._cells = self.finding_grid[0] * self.finding_grid[1]
        self.findings: torch.Tensor | None = (
            None  # made when the first patch is read: 1.3 GB at MAIRA-2's size
        )
        self.finding_rows = torch.zeros(n, self._cells, dtype=torch.int64)

    def update(self, rows: Any, row: torch.Tensor, latent: torch.Tensor, value: torch.Tensor) -> None:
        """Add the activations `value` of `latent` at `row` of the block `rows`.

        Raises:
            RecordError: A patch is outside the grid.
        """
        import torch

        height, width = self.grid
        if not height * width:
            return
        view = torch.from_numpy(rows.view.astype(np.int64))
        col = torch.from_numpy(rows.patch_col.astype(np.int64))
        patch = torch.from_numpy(rows.patch_row.astype(np.int64)) * width + col
        for number, name in enumerate(VIEWS):
            here = view == number
            if not here.any():
                continue
            if int(patch[here].max()) >= height * width or int(col[here].max()) >= width:
                raise RecordError(
                    f"A patch of the {name} image is outside the {height} x {width} grid. Give the patch grid of the "
                    "model that the rows were read from."
                )
            self.studies[name] += len(np.unique(rows.study[here.numpy()]))
            self.rows[name] += torch.bincount(patch[here], minlength=height * width)
            if name not in self.views:
                self.views[name] = torch.zeros(self.d_sae, height * width)
            mine = here[row]
            entry = latent[mine] * (height * width) + patch[row[mine]]
            self.views[name].view(-1).index_add_(0, entry, value[mine])
        if len(self.finding_rows):
            self._count_findings(rows, view == 0, patch, row, latent, value)

    def _count_findings(
        self,
        rows: Any,
        frontal: torch.Tensor,
        patch: torch.Tensor,
        row: torch.Tensor,
        latent: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        import torch

        if not frontal.any():
            return
        if self.findings is None:
            self.findings = torch.zeros(len(self.finding_rows), self.d_sae, self._cells)
        width = self.grid[1]
        cell = patch // width // self.pool * self.finding_grid[1] + patch % width // self.pool
        member = self._counted[torch.from_numpy(rows.study)] & frontal[:, None]
        at, finding = member.nonzero(as_tuple=True)
        ones = torch.ones_like(at)
        self.finding_rows.view(-1).index_add_(0, finding * self._cells + cell[at], ones)
        at, finding = member[row].nonzero(as_tuple=True)
        entry = (finding * self.d_sae + latent[at]) * self._cells + cell[row[at]]
        self.findings.view(-1).index_add_(0, entry, value[at])

    def add(self, other: MapSums) -> None:
        """Add the sums of other studies."""
        for view, total in other.views.items():
            self.views[view] = self.views[view] + total if view in self.views else total.clone()
        for view in VIEWS:
            self.rows[view] += other.rows[view]
            self.studies[view] += other.studies[view]
        if other.findings is not None:
            self.findings = other.findings if self.findings is None else self.findings + other.findings
        self.finding_rows += other.finding_rows

    def state(self) -> dict[str, Any]:
        """Return all sums, for `restore`."""
        own = ("views", "rows", "studies", "findings", "finding_rows")
        return {name: getattr(self, name) for name in own}

    def restore(self, state: dict[str, Any]) -> None:
        """Replace all sums by those of a `state`."""
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def nbytes(self) -> int:
        """Size of the sums in bytes."""
        tensors = [*self.views.values(), *self.rows.values(), self.finding_rows]
        return sum(t.nbytes for t in tensors) + (0 if self.findings is None else self.findings.nbytes)

    def of(self, latent: int) -> tuple[MeanMap, ...]:
        """Mean maps of one latent, one per view where it fires."""
        maps = []
        for view, total in self.views.items():
            if bool(total[latent].any()):
                mean = from_half(*to_half(mean_map(total[latent], self.rows[view]).numpy()))
                maps.append(MeanMap(view, *self.grid, tuple(mean.tolist()), self.studies[view]))
        return tuple(sorted(maps, key=lambda one: VIEWS.index(one.view)))

    def finding_means(self, latents: Sequence[int]) -> np.ndarray | None:
        """(n, F + 1, pooled patches) mean maps of `latents`; None if no image was read or no finding is known."""
        if self.findings is None:
            return None
        return mean_map(self.findings[:, list(latents)], self.finding_rows[:, None]).transpose(0, 1).numpy()


def to_half(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert maps (..., patches) to `(shares, largest)`: float16 shares of the largest value of each map, and this
    value.
    """
    largest = values.max(-1).astype(np.float32)
    shares = values / np.where(largest > 0, largest, 1)[..., None]
    return np.where(shares < 2.0**-11, 0, shares).astype(np.float16), largest


def from_half(shares: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Convert the result of `to_half` back to float32 maps (..., patches)."""
    return shares.astype(np.float32) * largest[..., None]


def write_maps(
    path: Path,
    latents: Sequence[int],
    maps: Sequence[tuple[MeanMap, ...]],
    sums: MapSums | None = None,
) -> None:
    """Write the mean maps of some latents.

    Args:
        path: New file, ending in `.npz`.
        latents: Their indices, ascending.
        maps: Maps per view of each latent.
        sums: Source of the findings' maps, if there are any.
    """
    arrays: dict[str, np.ndarray] = {"latents": np.asarray(latents, np.int64)}
    for view in VIEWS:
        own = [next((one for one in each if one.view == view), None) for each in maps]
        example = next((one for one in own if one is not None), None)
        if example is None:
            continue
        empty = np.zeros(example.rows * example.cols, np.float32)
        values = np.stack([empty if one is None else np.asarray(one.values, np.float32) for one in own])
        arrays[view], arrays[f"{view}_largest"] = to_half(values)
        arrays[f"{view}_shape"] = np.array([example.rows, example.cols, example.studies])
    means = sums.finding_means(latents) if sums is not None else None
    if sums is not None and means is not None:
        arrays["findings"], arrays["findings_largest"] = to_half(means)
        arrays["finding_rows"] = sums.finding_rows.numpy()
        arrays["findings_shape"] = np.array([*sums.grid, *sums.finding_grid, sums.pool])
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


class MapFile:
    """Mean maps of the latents of one file; arrays are read on first use."""

    def __init__(self, path: Path) -> None:
        self._path, self._arrays = path, {}
        try:
            with np.load(path, allow_pickle=False) as file:
                self._names = set(file.files)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise self._damaged(error) from None
        self._index = {int(latent): i for i, latent in enumerate(self["latents"])}

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns of patches; None if no latent of the file fires on an image."""
        for view in VIEWS:
            if view in self:
                rows, cols, _ = self[f"{view}_shape"].tolist()
                return rows, cols
        return None

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            try:
                with np.load(self._path, allow_pickle=False) as file:
                    self._arrays[name] = file[name]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise self._damaged(error) from None
        return self._arrays[name]

    def _damaged(self, error: Exception) -> RecordError:
        return RecordError(
            f"{self._path} cannot be read ({error}); the mean maps are incomplete or damaged. Write the records again."
        )

    def of(self, latent: int) -> tuple[MeanMap, ...]:
        """Mean maps of one latent, one per view where it fires."""
        if latent not in self._index:
            raise self._damaged(KeyError(latent))
        i, maps = self._index[latent], []
        for view in VIEWS:
            if view in self and self[f"{view}_largest"][i] > 0:
                rows, cols, studies = self[f"{view}_shape"].tolist()
                values = from_half(self[view][i], self[f"{view}_largest"][i])
                maps.append(MeanMap(view, rows, cols, tuple(values.tolist()), studies))
        return tuple(maps)

    def view(self, latents: Sequence[int], view: str) -> np.ndarray | None:
        """(n, patches) overall means of `latents`; None if no latent of the file fires in that view."""
        if view not in self:
            return None
        at = [self._index[latent] for latent in latents]
        return from_half(self[view][at], self[f"{view}_largest"][at])

    def finding(self, latents: Sequence[int], finding: int, present: bool) -> np.ndarray | None:
        """(n, patches) means over labelled studies with, or without, a finding; None if none are stored."""
        if "findings" not in self:
            return None
        at = [self._index[latent] for latent in latents]
        means = from_half(self["findings"][at], self["findings_largest"][at]).astype(np.float64)
        mine, every = means[:, finding], means[:, -1]
        n, total = self["finding_rows"][finding], self["finding_rows"][-1]
        if not present:
            mine = np.maximum((every * total - mine * n) / np.maximum(total - n, 1), 0)
        rows, cols, pooled_rows, pooled_cols, pool = self["findings_shape"].tolist()
        grid = mine.reshape(len(at), pooled_rows, pooled_cols)
        full = grid.repeat(pool, 1).repeat(pool, 2)[:, :rows, :cols]
        return full.reshape(len(at), rows * cols).astype(np.float32)

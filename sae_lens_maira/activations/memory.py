"""Memory for large batches: in large pages, and used again once nobody holds it.

On the CPU most of the time of a large new tensor goes into the kernel: page faults, and clearing what was handed over.
4,096 rows of 4,096 float32 touch 32 pages of 2 MiB instead of 16,384 of 4 KiB, and none when a batch that the caller
has dropped is overwritten. It knows nothing about activations.
"""

import mmap
import sys

import torch

LARGE = 4 << 20
"""Bytes from which large pages are asked for; below, the allocator reuses memory anyway."""


def empty_rows(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized (rows, width) tensor on the CPU; where the system has no large pages an ordinary one."""
    region = _region(rows * width * dtype.itemsize)
    if region is None:
        return torch.empty(rows, width, dtype=dtype)
    return torch.frombuffer(region, dtype=dtype).view(rows, width)


class BatchMemory:
    """Uninitialized tensors of one shape, taken from up to `most` pieces of memory that come back by themselves.

    A piece is free when no tensor, and no view of one, lives on it: torch's storage holds a reference to the piece
    for as long as anything needs it.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, most: int = 3) -> None:
        self._shape, self._dtype, self._most = (rows, width), dtype, most
        self._regions: list[mmap.mmap] = []

    def empty(self) -> torch.Tensor:
        """A tensor that nobody else holds."""
        for number in range(len(self._regions)):
            if sys.getrefcount(self._regions[number]) == 2:  # the list's and this call's own
                return torch.frombuffer(self._regions[number], dtype=self._dtype).view(self._shape)
        region = _region(self._shape[0] * self._shape[1] * self._dtype.itemsize)
        if region is None:
            return torch.empty(self._shape, dtype=self._dtype)
        if len(self._regions) < self._most:
            self._regions.append(region)
        return torch.frombuffer(region, dtype=self._dtype).view(self._shape)


def _region(size: int) -> mmap.mmap | None:
    """Memory in large pages; None if it is small or there are none."""
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    # Private: anonymous memory that Python shares by default never gets large pages.
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them
        return None
    return region

"""Fresh memory in large pages: a batch of 4,096 rows of 4,096 float32 touches 32 pages of 2 MiB, not 16,384 of 4 KiB.

On the CPU most of the time of a large new tensor goes into the kernel's page faults: gathering and widening bfloat16
rows ran at 0.5 GB/s with small pages and at 1.6 GB/s with large ones (2-core virtual machine, shared). It knows
nothing about activations.
"""

import mmap

import torch

LARGE = 4 << 20
"""Bytes from which large pages are asked for; below, the allocator reuses memory anyway."""


def empty_rows(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized (rows, width) tensor on the CPU; where the system has no large pages an ordinary one."""
    size = rows * width * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, width, dtype=dtype)
    # Private: anonymous memory that Python shares by default never gets large pages.
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them
        return torch.empty(rows, width, dtype=dtype)
    return torch.frombuffer(region, dtype=dtype).view(rows, width)

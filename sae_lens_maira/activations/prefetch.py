"""Run jobs in threads ahead of their use, and reuse the memory of large batches.

Image decoding, checksums and copies release Python's lock, so threads are enough and nothing is sent between processes.
On the CPU most of the time of a large new tensor goes into page faults: 4,096 rows of 4,096 float32 touch 32 pages of
2 MiB instead of 16,384 of 4 KiB, and none when a batch that the caller has dropped is overwritten.
"""

import mmap
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

LARGE = 4 << 20
"""Bytes from which large pages are requested; below, the allocator reuses memory anyway."""


def prefetch(jobs: Iterable[Callable[[], T]], workers: int) -> Generator[T, None, None]:
    """Run jobs in threads and yield their results in order.

    Up to `workers` jobs run, and as many finished results wait, ahead of the caller.

    Args:
        jobs: Callables, taken one by one as there is room.
        workers: Number of threads; with 0 every job runs in the caller's thread when its result is needed.

    Raises:
        Exception: The exception of a job, in its place in the order; later jobs are dropped.
    """
    if workers == 0:
        for job in jobs:
            yield job()
        return
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def empty_rows(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized (rows, width) tensor on the CPU, in large pages where the system has them."""
    region = _region(rows * width * dtype.itemsize)
    if region is None:
        return torch.empty(rows, width, dtype=dtype)
    return torch.frombuffer(region, dtype=dtype).view(rows, width)


class BatchMemory:
    """Reusable batch buffers of one shape, backed by huge pages.

    A buffer is free when no tensor and no view of one uses it: torch's storage holds a reference to the memory for as
    long as anything needs it.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, most: int = 3) -> None:
        """Allocate nothing yet; up to `most` buffers of (rows, width) are kept for reuse."""
        self._shape, self._dtype, self._most = (rows, width), dtype, most
        self._regions: list[mmap.mmap] = []

    def empty(self) -> torch.Tensor:
        """An uninitialized tensor that has no other user."""
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
    """Memory in large pages; None if it is small or the system has none."""
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    # Private: anonymous memory that Python shares by default never gets large pages.
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them
        return None
    return region

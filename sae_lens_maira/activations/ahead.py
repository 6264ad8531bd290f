"""Work done ahead of its use, in threads, handed out in order: what comes out does not depend on their number.

Image decoding, checksums and copies let go of Python's lock, so threads are enough and nothing is sent between
processes. It knows nothing about what the work is.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_order(jobs: Iterable[Callable[[], T]], workers: int) -> Generator[T, None, None]:
    """Results of `jobs` in their order; up to `workers` of them run, and as many wait finished, ahead of the caller.

    Args:
        jobs: taken one by one as there is room.
        workers: threads; with 0 every job runs when its result is asked for, in the caller's thread.

    Raises:
        Exception: whatever a job raises, in its place in the order; later jobs are dropped.
    """
    if workers == 0:
        for job in jobs:
            yield job()
        return
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead")
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

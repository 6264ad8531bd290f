"""Pieces of a dashboard made side by side: one forked process a core, results in the order of the pieces.

A child shares its parent's memory until it writes, so nothing is loaded twice. Where processes can not be forked, or
one worker is asked for, the pieces are made one after another. It knows nothing about latents.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

P = TypeVar("P")
R = TypeVar("R")

_work: Callable[[Any], Any] | None = None


def each(work: Callable[[P], R], pieces: Sequence[P], workers: int | None = None) -> Iterator[R]:
    """`work(piece)` for every piece, in order.

    Args:
        work: makes one piece; its result is sent back between processes, so it should be small.
        pieces: what to make.
        workers: processes; the cores that this process may use if not given.
    """
    global _work
    count = min(
        workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, len(pieces)
    )
    if count < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, pieces)
        return
    _work = work  # inherited by the children: a closure can not be sent
    try:
        with multiprocessing.get_context("fork").Pool(count) as pool:
            yield from pool.imap(_call, pieces)
    finally:
        _work = None


def _call(piece: Any) -> Any:
    assert _work is not None
    return _work(piece)

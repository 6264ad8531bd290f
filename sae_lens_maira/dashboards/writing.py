"""Shared by all writers: the privacy gate, JSON lines, new folders, batches of latents, and forked workers.

`parallel_map` forks one process per core and returns results in order. A child shares its parent's memory until it
writes, so nothing is loaded twice. Where processes cannot be forked, or one worker is requested, the work runs in
this process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import atomic_folder
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.privacy import check_shareable, mark_folder, private_files

P = TypeVar("P")
R = TypeVar("R")

_work: Callable[[Any], Any] | None = None


def json_line(row: dict[str, Any]) -> str:
    """Format one row as compact JSON with finite numbers only."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def licence_of(records: RecordSet, action: str, allow: bool) -> str:
    """Pass a record set through the privacy gate.

    Args:
        records: The record set; its studies.jsonl must exist.
        action: What would be done with its text or images.
        allow: The user asked for credentialed data.

    Returns:
        The strictest licence class.

    Raises:
        PrivacyError: a study is not known to be public or synthetic, and `allow` is not set.
        RecordError: studies.jsonl is missing or damaged.
    """
    return check_shareable([entry.licence for entry in records.studies.values()], action, allow=allow)


@contextmanager
def new_folder(out: Path | str, licence: str) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` once everything is written.

    Its files are readable by their owner only, and a folder with credentialed data is marked.

    Args:
        out: The folder; must not exist, or be empty.
        licence: Strictest licence class of the data.

    Raises:
        RecordError: `out` is a file, or a folder that contains files.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecordError(f"{out} exists and is not an empty folder. Give a new folder, or remove this one.")
    with private_files(out), atomic_folder(out) as folder:
        yield folder
        mark_folder(folder, licence, "dashboards")


def batches_of(records: RecordSet, size: int) -> list[tuple[int, list[int]]]:
    """Split the latents of a record set into `(number, latents)` batches, in order.

    Raises:
        RecordError: the record set is empty.
    """
    latents = [int(latent) for latent in records.table["latent"]]
    if not latents:
        raise RecordError(
            "The record set contains no latents, so there is nothing to write. Write records first."
        )
    return [(n, latents[start : start + size]) for n, start in enumerate(range(0, len(latents), size))]


def parallel_map(
    work: Callable[[P], R], pieces: Sequence[P], workers: int | None = None
) -> Generator[R, None, None]:
    """Yield `work(piece)` for every piece, in order.

    Args:
        work: Function to apply; its result is sent between processes, so it should be small.
        pieces: Arguments, one per call.
        workers: Number of processes; one per available core if not given.
    """
    global _work
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    count = min(workers or cores, len(pieces))
    if count < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, pieces)
        return
    _work = work  # inherited by the children: a closure cannot be sent
    try:
        # Blocked until a child has its own handlers, so that none runs the parent's.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            pool = multiprocessing.get_context("fork").Pool(count, initializer=_own_signals)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with pool:
            yield from pool.imap(_call, pieces)
            pool.close()
            pool.join()
    finally:
        _work = None


def _own_signals() -> None:
    """A child must end on SIGTERM: SAELens' runner leaves a raising handler in the parent, and children inherit it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _call(piece: Any) -> Any:
    assert _work is not None
    return _work(piece)

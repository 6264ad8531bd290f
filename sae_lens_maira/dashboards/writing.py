"""Functions shared by all writers: privacy gate, new folders, batches of latents, forked workers, interpretations.

`parallel_map` forks one process per core and returns results in order. A child shares its parent's memory until it
writes, so that nothing is loaded twice. If processes cannot be forked, or one worker is requested, the work runs in
this process. Neuronpedia's bulk import has no field for scores, so `note` writes them into the explanation's notes,
each with its control.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sae_lens_maira.checksums import unlisted_files, write_sums
from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.records import Interpretation, Score, load
from sae_lens_maira.io import atomic_folder
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.privacy import check_shareable, mark_folder, private_files

Interpretations = Mapping[int, Iterable[Interpretation]]


def read_interpretations(folder: Path | str) -> dict[int, list[Interpretation]]:
    """Read the interpretations stored with a record set, per latent; empty if there are none.

    Raises:
        RecordError: A line is not an interpretation.
    """
    return by_latent(load(folder))


def by_latent(interpretations: Iterable[Interpretation]) -> dict[int, list[Interpretation]]:
    """Group interpretations by latent."""
    grouped: dict[int, list[Interpretation]] = {}
    for one in interpretations:
        grouped.setdefault(one.latent, []).append(one)
    return grouped


def usable(interpretations: Iterable[Interpretation]) -> list[Interpretation]:
    """Interpretations with a usable explanation, one per distinct text."""
    kept = {one.explanation: one for one in interpretations if one.status == "ok" and one.explanation}
    return list(kept.values())


def leading_score(scores: Sequence[Score]) -> Score | None:
    """The score shown in the index: detection if it was measured, else the first one."""
    for score in scores:
        if score.method == "detection" and score.balanced_accuracy is not None:
            return score
    return next((score for score in scores if score.balanced_accuracy is not None), None)


def best_named(interpretations: Sequence[Interpretation]) -> Interpretation | None:
    """The interpretation that names a latent: the one with the best leading score."""

    def value(one: Interpretation) -> float:
        score = leading_score(one.scores)
        return -1.0 if score is None or score.balanced_accuracy is None else score.balanced_accuracy

    return max((one for one in interpretations if one.explanation), key=value, default=None)


def control_of(interpretation: Interpretation) -> Score | None:
    """The control of the leading score: same method, same judge."""
    lead = leading_score(interpretation.scores)
    if lead is None:
        return None
    same = [c for c in interpretation.control if (c.method, c.judge) == (lead.method, lead.judge)]
    return same[0] if same else None


def shorten(text: str, limit: int) -> str:
    """Cut a text at a word boundary so that it has at most `limit` characters."""
    if len(text) <= limit:
        return text
    return text[: limit - 1].rsplit(" ", 1)[0][: limit - 1] + "…"


def note(interpretation: Interpretation) -> str:
    """Describe explainer and scores in one line; every score with its control, the score of another latent's
    explanation.
    """
    parts = [f"explainer: {interpretation.explainer}"]
    if interpretation.method:
        parts.append(f"method: {interpretation.method}")
    controls = {score.method: score for score in interpretation.control}
    for score in interpretation.scores:
        if score.balanced_accuracy is None:
            continue
        text = f"{score.method} {score.balanced_accuracy:.2f}"
        if score.low is not None and score.high is not None:
            text += f" [{score.low:.2f}, {score.high:.2f}]"
        control = controls.get(score.method)
        if control is not None and control.balanced_accuracy is not None:
            text += f", control {control.balanced_accuracy:.2f}"
        parts.append(f"{text} (balanced accuracy, n = {score.answered}, judge {score.judge})")
    return "; ".join(parts)


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
        allow: Whether the user has allowed credentialed data.

    Returns:
        The strictest licence class.

    Raises:
        PrivacyError: A study is not known to be public or synthetic, and `allow` is not set.
        RecordError: studies.jsonl is missing or damaged.
    """
    return check_shareable([entry.licence for entry in records.studies.values()], action, allow=allow)


@contextmanager
def new_folder(out: Path | str, licence: str) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` once everything is written.

    Its files are readable by their owner only, and a folder with credentialed data is marked.

    Args:
        out: The folder. One that an earlier run wrote is replaced.
        licence: Strictest licence class of the data.

    Raises:
        RecordError: `out` is a file, or a folder that contains other files.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RecordError(f"{out} is a file. Give an empty or new folder.")
    if out.is_dir() and (other := unlisted_files(out)):
        raise RecordError(
            f"{out} contains {other[0]!r}, which an earlier run of this command did not write. Give an empty or new "
            "folder."
        )
    with private_files(out), atomic_folder(out, "replace") as folder:
        yield folder
        mark_folder(folder, licence, "dashboards")
        write_sums(folder)


def batches_of(records: RecordSet, size: int) -> list[tuple[int, list[int]]]:
    """Split the latents of a record set into `(number, latents)` batches, in order.

    Raises:
        RecordError: The record set is empty.
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
        # Signals are blocked until a child has its own handlers, so that none runs the parent's.
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
    """Restore default signal handlers in a child, which would inherit the raising handler of SAELens' runner."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _call(piece: Any) -> Any:
    assert _work is not None
    return _work(piece)

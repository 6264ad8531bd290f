"""Check a table of studies before GPU time is spent on it.

    images    missing, unreadable, of another study (same file, same content, or by the ids in the path)
    ids       one id twice, a patient in two splits
    text      bytes read in the wrong encoding, an empty report, a truth that cannot be read
    priors    not before the study, of another patient

Every issue names its rows, counted from 0. Nothing is changed. Pass `read_image` to use your own loader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.image_files import look_at
from sae_lens_maira.studies.image_issues import image_issues
from sae_lens_maira.studies.issues import IssueKind, TableIssue, ValidationReport
from sae_lens_maira.studies.sequence import IMAGES, SECTIONS
from sae_lens_maira.studies.study import Licence
from sae_lens_maira.studies.table import StudyTable


def validate_table(
    table: StudyTable,
    *,
    images: str = "decode",
    read_image: Callable[[Path], Any] | None = None,
    open_image: Callable[[Path], int] | None = None,
    workers: int = 16,
    progress: bool = True,
) -> ValidationReport:
    """Check a table for every kind of issue.

    Args:
        table: Table to check, with the root of its images.
        images: Depth of the check: "decode" reads every pixel (the only way to find a truncated file), "open" reads
            headers, "exist" checks that files exist, "none" checks no file.
        read_image: Function that reads one image and raises on failure, for "decode"; Pillow if not given, which does
            not read DICOM.
        open_image: Function that reads one header, raises on failure and returns the bytes that decoding takes; Pillow
            if not given.
        workers: Number of threads that read images.
        progress: Show a progress bar.

    Returns:
        The report, with issues ordered by kind and row.

    Raises:
        StudyError: `images` is another word.
    """
    frame = table.frame
    files = look_at(_paths(table), images, read_image, workers, progress, open_image)
    checks = (
        _duplicate_ids(frame),
        _split_leaks(frame),
        image_issues(frame, table.root, files),
        _encodings(frame),
        _empty_reports(frame),
        _placeholders(frame),
        _special_tokens(frame),
        _long_texts(frame),
        _priors(frame),
        _records(table),
        _warnings(frame),
    )
    order = list(IssueKind)
    issues = [issue for check in checks for issue in check]
    issues.sort(key=lambda issue: (order.index(issue.kind), issue.rows))
    return ValidationReport(len(frame), len(files.paths), tuple(issues))


def _paths(table: StudyTable) -> list[Path]:
    named = pd.unique(pd.concat([table.frame[column] for column in IMAGES]).dropna())
    return [table.root / path for path in named]


def _where(mask: Any) -> list[int]:
    return [int(row) for row in np.flatnonzero(np.asarray(mask, dtype=bool))]


def _duplicate_ids(frame: pd.DataFrame) -> Iterator[TableIssue]:
    twice = frame[frame["study_id"].duplicated(keep=False)]
    for study, rows in twice.groupby("study_id", sort=False).indices.items():
        yield TableIssue(
            IssueKind.DUPLICATE_ID, tuple(int(r) for r in twice.index[rows]), f"the study id {study!r}"
        )


def _split_leaks(frame: pd.DataFrame) -> Iterator[TableIssue]:
    assigned = frame[frame["split"].notna()]
    leaking = assigned.loc[assigned.groupby("patient_id")["split"].transform("nunique") > 1]
    for patient, rows in leaking.groupby("patient_id", sort=False).indices.items():
        splits = ", ".join(sorted(set(leaking["split"].iloc[rows])))
        yield TableIssue(
            IssueKind.TWO_SPLITS,
            tuple(int(r) for r in leaking.index[rows]),
            f"patient {patient!r} is in {splits}",
        )


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_RUN = re.compile(r"[^\x00-\x7f]{2,}")
# Characters that reports contain; other sequences that are UTF-8 by chance, such as a capital with a quote, are left
# out.
_MEANT = re.compile("[\u00a0-\u017f\u0370-\u03ff\u2010-\u2044\u20ac\u2122\u2190-\u22ff]+")


def wrong_encoding(text: str) -> str | None:
    """Reason why a text seems to have been read in the wrong encoding; None if it does not.

    UTF-8 that was read as Windows-1252 or Latin-1 is recognised because it is valid UTF-8 when written back in that
    encoding.
    """
    control = _CONTROL.search(text)
    for codec in ("cp1252", "latin-1"):
        for run in () if text.isascii() else _RUN.findall(text):
            try:
                meant = run.encode(codec).decode("utf-8")
            except UnicodeError:
                continue
            if _MEANT.fullmatch(meant):
                return f"{run!r} is UTF-8 that was read as {codec}, meant was {meant!r}"
    return f"it contains the character U+{ord(control[0]):04X}" if control else None


def _encodings(frame: pd.DataFrame) -> Iterator[TableIssue]:
    for column in ("study_id", "patient_id", *SECTIONS):
        for row, text in enumerate(frame[column].array):
            if isinstance(text, str) and (why := wrong_encoding(text)):
                yield TableIssue(IssueKind.ENCODING, (row,), f"{column}: {why}")


def _empty_reports(frame: pd.DataFrame) -> Iterator[TableIssue]:
    blank = ~frame["report"].str.contains(r"[^\W_]", regex=True).fillna(False).astype(bool)
    if blank.all() and len(frame):
        yield TableIssue(IssueKind.EMPTY_REPORT, tuple(_where(blank)), "no row has a report")
        return
    for row in _where(blank):
        yield TableIssue(
            IssueKind.EMPTY_REPORT, (row,), f"study {frame['study_id'].iloc[row]} has no words in its report"
        )


_PLACEHOLDER = re.compile(r"(?:nan|null|nat|<na>|undefined)\.?", re.IGNORECASE)
_SPECIAL = re.compile(
    r"</?(?:s|unk|pad|mask|obj|box|image|prev_im|lat_image|x\d{1,2}|y\d{1,2})>|<0x[0-9A-Fa-f]{2}>|<\|\w+\|>"
)
LONGEST_TEXT = 20_000
"""Largest number of characters of a section; the longest public reports have about 10,000."""
LONGEST_WORD = 1_000
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD},}}")


def _texts(frame: pd.DataFrame, columns: tuple[str, ...]) -> Iterator[tuple[str, int, str]]:
    """Yield (column, row, text) for every text."""
    for column in columns:
        for row, text in enumerate(frame[column].array):
            if isinstance(text, str):
                yield column, row, text


def _placeholders(frame: pd.DataFrame) -> Iterator[TableIssue]:
    """Find texts that a program wrote for a missing value, such as a report that is only "None"."""
    for column, row, text in _texts(frame, ("study_id", "patient_id", *SECTIONS)):
        word = text.strip()
        none = column in ("study_id", "patient_id", "report") and word.rstrip(".").lower() == "none"
        if none or _PLACEHOLDER.fullmatch(word):
            detail = f"{column} is {word!r}, which a program wrote for a missing value; leave the cell empty"
            yield TableIssue(IssueKind.PLACEHOLDER, (row,), detail)


def _special_tokens(frame: pd.DataFrame) -> Iterator[TableIssue]:
    for column, row, text in _texts(frame, SECTIONS):
        if found := _SPECIAL.search(text):
            detail = f"{column} contains {found[0]!r}, a special token of the model; remove it from the text"
            yield TableIssue(IssueKind.SPECIAL_TOKEN, (row,), detail)


def _long_texts(frame: pd.DataFrame) -> Iterator[TableIssue]:
    for column, row, text in _texts(frame, SECTIONS):
        if len(text) > LONGEST_TEXT:
            detail = f"{column} has {len(text):,} characters; at most {LONGEST_TEXT:,} were expected"
            yield TableIssue(IssueKind.LONG_TEXT, (row,), detail)
        elif len(text) >= LONGEST_WORD and _LONG_WORD.search(text):
            yield TableIssue(
                IssueKind.LONG_TEXT, (row,), f"{column} has a word of over {LONGEST_WORD:,} letters"
            )


def _priors(frame: pd.DataFrame) -> Iterator[TableIssue]:
    times = {}
    for column in ("taken", "prior_taken"):
        times[column] = pd.to_datetime(frame[column], format="ISO8601", errors="coerce", utc=True)
        for row in _where(frame[column].notna() & times[column].isna()):
            detail = (
                f"{column} {frame[column].iloc[row]!r} is not an ISO 8601 time such as 2180-05-06T21:30:14"
            )
            yield TableIssue(IssueKind.BAD_TIME, (row,), detail)
    for row in _where(frame["prior_study_id"].eq(frame["study_id"]).fillna(False)):
        yield TableIssue(IssueKind.PRIOR_ORDER, (row,), "the study is its own prior")
    for row in _where(times["prior_taken"] >= times["taken"]):
        detail = f"prior taken {frame['prior_taken'].iloc[row]}, study taken {frame['taken'].iloc[row]}"
        yield TableIssue(IssueKind.PRIOR_ORDER, (row,), detail)
    first = frame.drop_duplicates("study_id")
    place = pd.Series(first.index, index=first["study_id"])
    prior = place.reindex(frame["prior_study_id"]).to_numpy(dtype=float)
    linked = np.flatnonzero(~np.isnan(prior) & frame["prior_study_id"].notna().to_numpy())
    rows = prior[linked].astype(int)
    patient = frame["patient_id"].to_numpy()
    for row, other in zip(linked, rows, strict=True):
        if patient[row] != patient[other]:
            study = frame["study_id"].iloc[other]
            detail = f"prior study {study} is of patient {patient[other]}, the row of {patient[row]}"
            yield TableIssue(IssueKind.FOREIGN_PRIOR, (int(row), int(other)), detail)
        elif (
            row != other
            and pd.isna(times["prior_taken"].iloc[row])
            and times["taken"].iloc[other] >= times["taken"].iloc[row]
        ):
            detail = f"prior taken {frame['taken'].iloc[other]}, study taken {frame['taken'].iloc[row]}"
            yield TableIssue(IssueKind.PRIOR_ORDER, (int(row), int(other)), detail)


def _records(table: StudyTable) -> Iterator[TableIssue]:
    """Check that rows with a truth can be made into records."""
    studies = table.studies
    for row in _where(table.frame["truth"].notna()):
        try:
            _ = studies[row]
        except StudyError as error:
            yield TableIssue(IssueKind.BAD_RECORD, (row,), str(error))


def _warnings(frame: pd.DataFrame) -> Iterator[TableIssue]:
    bare = _where(frame["frontal"].isna())
    if bare:
        yield TableIssue(IssueKind.NO_FRONTAL, tuple(bare), "MAIRA-2 reads no study without a frontal image")
    for column in IMAGES:
        rows = _where(frame[column].str.match(r"/|[A-Za-z]:").fillna(False))
        if rows:
            detail = f"{column} is absolute, so the table is tied to this machine"
            yield TableIssue(IssueKind.ABSOLUTE_PATH, tuple(rows), detail)
    licences = frame["licence"].value_counts()
    if len(licences) > 1:
        rare = _where(frame["licence"] == licences.index[-1])
        counts = ", ".join(f"{count} {name}" for name, count in licences.items())
        strict = Licence.CREDENTIALED.value
        yield TableIssue(
            IssueKind.MIXED_LICENCES, tuple(rare), f"{counts}; results from this table count as {strict}"
        )

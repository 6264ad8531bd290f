"""Table of studies: one row per study, image paths relative to a root that is given when the table is opened.

The root is not part of the file, so a table made on one machine works on another. An absolute image path is kept, and
is valid on its own machine only. Opening a table checks columns, licences and paths; `validate_table` checks images,
ids, splits and texts. Text is stored in Arrow buffers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from sae_lens_maira.checksums import read_parquet, write_parquet
from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.delimited import TEXT, csv_frame
from sae_lens_maira.studies.sequence import IMAGES, SECTIONS, StudySequence
from sae_lens_maira.studies.study import Licence, Study

LINKS = ("view", "taken", "prior_study_id", "prior_taken")
"""Columns that are not part of a `Study`: view of the frontal image, time of the study, and the study before it."""
COLUMNS = ("study_id", "patient_id", *IMAGES, *SECTIONS, *LINKS, "split", "licence", "truth")
REQUIRED = ("study_id", "patient_id", "licence")
logger = logging.getLogger(__name__)


def _checked(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Check a frame and return it with all of `COLUMNS` as Arrow text, blank cells empty."""
    missing = [column for column in REQUIRED if column not in frame]
    unknown = [column for column in frame if column not in COLUMNS]
    if missing or unknown:
        raise StudyError(
            f"The table of studies {where} lacks the columns {missing} and has the unknown columns {unknown}; "
            f"expected {', '.join(COLUMNS)}, of which {', '.join(REQUIRED)} are needed. Rename or drop columns."
        )
    texts = {column: _text(frame, column, where) for column in COLUMNS}
    checked = pd.DataFrame(texts).reset_index(drop=True)
    for column in IMAGES:
        bad = checked[column].str.contains(r"(?:^|/)\.\.(?:/|$)|\\", regex=True).fillna(False)
        _refuse(
            checked,
            bad,
            column,
            where,
            "a path below the root, with forward slashes and without '..'. Cut the root off and give it when "
            "opening, or write an absolute path",
        )
    for column in ("study_id", "patient_id"):
        _refuse(checked, checked[column].isna(), column, where, "an id in every row. Fill it in")
    licences = [member.value for member in Licence]
    _refuse(
        checked,
        ~checked["licence"].isin(licences),
        "licence",
        where,
        f"one of {', '.join(licences)}. Use credentialed when in doubt",
    )
    return checked


def _text(frame: pd.DataFrame, column: str, where: str) -> pd.Series:
    if column not in frame:
        return pd.Series(pd.NA, index=frame.index, dtype=TEXT)
    values = frame[column]
    if pd.api.types.is_integer_dtype(values.dtype):  # ids are often read as numbers
        return values.astype(TEXT)
    if not isinstance(values.dtype, pd.StringDtype):
        kept = values.loc[values.notna()]
        wrong = ~kept.map(lambda value: isinstance(value, str)).astype(bool)
        if wrong.any():
            row = int(frame.index.get_indexer([wrong.index[wrong.to_numpy().argmax()]])[0])
            raise StudyError(
                f"Row {row} of the table of studies {where} has {column}={values.iloc[row]!r}; expected text or "
                f"nothing. Write ids, paths and truth (as JSON) as text."
            )
    values = values.astype(TEXT)
    return values.mask(values.str.len() == 0)


def _refuse(frame: pd.DataFrame, bad: pd.Series, column: str, where: str, expected: str) -> None:
    rows = np.flatnonzero(bad.to_numpy(dtype=bool))
    if len(rows):
        value = frame[column].iloc[rows[0]]
        raise StudyError(
            f"Row {rows[0]} of the table of studies {where} has {column}={None if value is pd.NA else value!r}"
            f"{f', as have {len(rows) - 1} further rows' if len(rows) > 1 else ''}; expected {expected}."
        )


@dataclass(frozen=True, eq=False)
class StudyTable:
    """Table of studies: rows of `COLUMNS` as text, and the folder that image paths are relative to."""

    frame: pd.DataFrame
    root: Path

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, root: Path | str, where: str = "in memory") -> StudyTable:
        """Make a table from a frame; missing columns are empty. Raises StudyError on bad columns or values."""
        checked = _checked(frame.reset_index(drop=True), where)
        alone = int((checked["prior_report"].notna() & checked["prior_frontal"].isna()).sum())
        if alone:
            logger.warning(
                "%s: %d of %d studies have a prior report without a prior image; MAIRA-2's prompt cannot contain "
                "it, so these prior reports are not read.",
                where,
                alone,
                len(checked),
            )
        return cls(checked, Path(root))

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, str | None]], root: Path | str) -> StudyTable:
        """Make a table from rows; columns that a row does not name are empty. Raises StudyError on bad columns or
        values.
        """
        frame = pd.DataFrame(list(rows))
        if frame.empty:
            frame = pd.DataFrame(columns=list(COLUMNS), dtype=object)
        return cls.from_frame(frame, root)

    @classmethod
    def open(cls, path: Path | str, root: Path | str | None = None) -> StudyTable:
        """Open a Parquet file; the root is the file's folder if not given. Raises StudyError if it cannot be read."""
        path = Path(path)
        try:
            frame = read_parquet(path)
        except (OSError, ValueError) as error:
            raise StudyError(
                f"The table of studies {path} could not be read ({error}); expected a Parquet file that "
                f"`StudyTable.save` wrote. Check the path, or make the table again."
            ) from error
        return cls.from_frame(frame, path.parent if root is None else Path(root), str(path))

    def save(self, path: Path | str) -> Path:
        """Write the table as Parquet, atomically; the root is not written."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(self.frame.reset_index(drop=True), path)
        return path

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def studies(self) -> StudySequence:
        """The studies as a sequence that builds each record on access, so that they are never all in memory."""
        return StudySequence({name: self.frame[name].array for name in self.frame}, self.root)

    def without(self, rows: Iterable[int]) -> StudyTable:
        """Table without the rows of these numbers, counted from 0."""
        kept = np.ones(len(self), dtype=bool)
        kept[list(set(rows))] = False
        return StudyTable(self.frame.loc[kept].reset_index(drop=True), self.root)

    def where(self, **equal: str) -> StudyTable:
        """Table of the rows whose columns have the given values, for instance `where(split="test")`.

        Raises:
            StudyError: There is no such column.
        """
        kept = pd.Series(True, index=self.frame.index)
        for column, value in equal.items():
            if column not in COLUMNS:
                raise StudyError(f"There is no column {column!r}; expected one of {', '.join(COLUMNS)}.")
            kept &= (self.frame[column] == value).fillna(False).astype(bool)
        return StudyTable(self.frame.loc[kept].reset_index(drop=True), self.root)

    def rows(self) -> Iterator[dict[str, str | None]]:
        """The rows as dictionaries of text, None where empty."""
        columns = {name: self.frame[name].array for name in COLUMNS}
        for row in range(len(self)):
            values = {name: column[row] for name, column in columns.items()}
            yield {name: value if isinstance(value, str) else None for name, value in values.items()}

    def counts(self) -> dict[str, Any]:
        """Number of studies, patients, images and reports, and studies per split, view and licence."""
        frame = self.frame
        filled = (*IMAGES, *SECTIONS, "truth")
        return {
            "studies": len(frame),
            "patients": int(frame["patient_id"].nunique()),
            **{name: int(frame[name].notna().sum()) for name in filled},
            **{
                name: {str(k): int(v) for k, v in frame[name].fillna("none").value_counts().items()}
                for name in ("split", "view", "licence")
            },
        }


def read_table(path: Path | str, root: Path | str | None = None, errors: str = "strict") -> StudyTable:
    """Open a table of studies, Parquet or CSV. Every command reads its `--table` with this function.

    Args:
        path: Parquet file that `StudyTable.save` wrote, or a CSV file of the same columns (see `csv_frame`). A CSV
            without the column `licence` counts as credentialed.
        root: Folder that image paths are relative to; the table's folder if not given.
        errors: "strict", or "replace" to read a CSV's bytes that are not UTF-8 as U+FFFD, for `validate_table` to find.

    Returns:
        The table. Its `studies` are built on access. Prior reports of rows without a prior image are left out of the
        records, since the prompt cannot contain them; a warning reports how many.

    Raises:
        StudyError: The file is missing, of another kind or not UTF-8, a row does not fit the header, or a value is not
            valid.
    """
    path = Path(path)
    if not path.is_file():
        raise StudyError(f"There is no table {path}; give a Parquet or CSV file with one row per study.")
    kind = path.suffix.lower()
    if kind in (".parquet", ".pq"):
        return StudyTable.open(path, root)
    if kind not in (".csv", ".tsv") and not path.name.lower().endswith((".csv.gz", ".tsv.gz")):
        raise StudyError(
            f"The table {path} ends in {path.suffix or 'nothing'}; expected .parquet or .csv. Rename or convert it."
        )
    frame = csv_frame(path, errors, COLUMNS)
    if "licence" not in frame:
        frame["licence"] = Licence.CREDENTIALED.value
    return StudyTable.from_frame(frame, path.parent if root is None else root, str(path))


def table_of_studies(studies: Iterable[Study], root: Path | str) -> StudyTable:
    """Make a table of studies in memory, for instance of the phantom.

    Array and PIL images are written as PNG files below `root`, under names that are safe for any study id. Grounded
    reports are not kept.

    Args:
        studies: The studies.
        root: Folder of the images; created if missing.

    Raises:
        StudyError: An image path is outside the root.
    """
    root = Path(root)
    rows: list[dict[str, str | None]] = []
    for study in studies:
        row: dict[str, str | None] = {name: getattr(study, name) for name in SECTIONS}
        row |= {"study_id": study.study_id, "patient_id": study.patient_id, "split": study.split}
        stem = safe_name(study.study_id)
        row |= {name: _relative(getattr(study, name), f"{stem}_{name}.png", root) for name in IMAGES}
        row["licence"] = study.licence.value
        row["truth"] = (
            None if study.truth is None else json.dumps([asdict(finding) for finding in study.truth])
        )
        rows.append(row)
    return StudyTable.from_rows(rows, root)


def safe_name(study_id: str, length: int = 100) -> str:
    """Make a file name from a study id: the id itself if it is a valid name, else a cleaned, shortened id with a hash.

    Args:
        study_id: Any text.
        length: Largest size in bytes of an id that is used unchanged.
    """
    clean = re.sub(r"[^A-Za-z0-9._-]", "_", study_id)
    if clean == study_id and len(clean) <= length and clean.strip("."):
        return clean
    digest = hashlib.blake2b(study_id.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return f"{clean[: length - 13].lstrip('.')}-{digest}"


def _relative(image: Any, name: str, root: Path) -> str | None:
    if image is None:
        return None
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        (root / "images").mkdir(parents=True, exist_ok=True)
        image.save(root / "images" / name)
        return f"images/{name}"
    try:
        return Path(image).resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise StudyError(
            f"The image {image} is outside the table's root {root}; expected it below. Give a root that holds every "
            "image."
        ) from None

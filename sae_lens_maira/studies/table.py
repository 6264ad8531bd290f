"""A table of studies: one Parquet row per study, image paths relative to a root that is given when it is opened.

Since the root is no part of the file, a table made on one machine works on another; an absolute image path is taken
as it is, and ties the table to its machine. The table checks columns, licences and paths, not whether images exist
or splits are clean (`validate_table` does). Text is kept in Arrow buffers. It knows no data set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from sae_lens_maira.errors import StudyError
from sae_lens_maira.io import atomic_file
from sae_lens_maira.studies.sequence import IMAGES, SECTIONS, StudySequence
from sae_lens_maira.studies.study import Licence, Study

LINKS = ("view", "taken", "prior_study_id", "prior_taken")
"""What a table says beside the record: view of the frontal image, when it was taken, and the study before."""
COLUMNS = ("study_id", "patient_id", *IMAGES, *SECTIONS, *LINKS, "split", "licence", "truth")
REQUIRED = ("study_id", "patient_id", "licence")
TEXT = pd.StringDtype("pyarrow")


def _checked(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The frame with all of `COLUMNS` as Arrow text, blank cells empty."""
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
            f"Row {rows[0]} of the table of studies {where} has {column}={None if value is pd.NA else value!r}, "
            f"as have {len(rows) - 1} further rows; expected {expected}."
        )


@dataclass(frozen=True, eq=False)
class StudyTable:
    """Rows of `COLUMNS` as text; `root` is the folder that image paths are relative to."""

    frame: pd.DataFrame
    root: Path

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, root: Path | str, where: str = "in memory") -> StudyTable:
        """A table of a frame; columns it lacks are empty. Raises StudyError on bad columns or values."""
        return cls(_checked(frame.reset_index(drop=True), where), Path(root))

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, str | None]], root: Path | str) -> StudyTable:
        """Build a table; columns that a row does not name are empty. Raises StudyError on bad columns or values."""
        frame = pd.DataFrame(list(rows))
        if frame.empty:
            frame = pd.DataFrame(columns=list(COLUMNS), dtype=object)
        return cls.from_frame(frame, root)

    @classmethod
    def open(cls, path: Path | str, root: Path | str | None = None) -> StudyTable:
        """Open a Parquet file; the root is the file's own folder if not given. Raises StudyError if unreadable."""
        path = Path(path)
        try:
            frame = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise StudyError(
                f"The table of studies {path} could not be read ({error}); expected a Parquet file that "
                f"`StudyTable.save` wrote. Check the path, or make the table again."
            ) from error
        return cls.from_frame(frame, path.parent if root is None else Path(root), str(path))

    def save(self, path: Path | str) -> Path:
        """Write the table as Parquet, in one piece or not at all; the root is not written."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as draft:
            self.frame.to_parquet(draft, index=False)
        return path

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def studies(self) -> StudySequence:
        """The records, each built on access: indexing, slicing and iterating never hold them all."""
        return StudySequence({name: self.frame[name].array for name in self.frame}, self.root)

    def where(self, **equal: str) -> StudyTable:
        """The rows whose columns have the given values, for instance `where(split="test")`.

        Raises:
            StudyError: no such column.
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

    def to_studies(self) -> Iterator[Study]:
        """Study records in row order, images as paths under the root; images are not opened."""
        return iter(self.studies)

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
    """Open a table of studies, Parquet or CSV; the one way in for every command.

    Args:
        path: Parquet that `StudyTable.save` wrote, or a CSV (UTF-8, with a header line) of the same columns. A CSV
            without the column `licence` is taken as credentialed.
        root: folder that relative image paths are below; the table's own folder if not given. Absolute paths are
            taken as they are.
        errors: "strict", or "replace" to read a CSV's bytes that are no UTF-8 as U+FFFD, for `validate_table` to find.

    Returns:
        The table; its `studies` are built on access.

    Raises:
        StudyError: no such file, another kind of file, bytes that are no UTF-8 (the line is named), or bad values.
    """
    path = Path(path)
    if not path.is_file():
        raise StudyError(f"There is no table {path}; give a Parquet or CSV file with one study a row.")
    kind = path.suffix.lower()
    if kind in (".parquet", ".pq"):
        return StudyTable.open(path, root)
    if kind != ".csv":
        raise StudyError(
            f"The table {path} ends in {path.suffix or 'nothing'}; expected .parquet or .csv. Rename or convert it."
        )
    frame = csv_frame(path, errors)
    if "licence" not in frame:
        frame["licence"] = Licence.CREDENTIALED.value
    return StudyTable.from_frame(frame, path.parent if root is None else root, str(path))


def csv_frame(path: Path, errors: str = "strict") -> pd.DataFrame:
    """The cells of a CSV as text, "" where empty; "NA" and "None" stay what they are.

    Args:
        path: UTF-8, with or without byte order mark, with a header line.
        errors: "strict", or "replace" to read bytes that are no UTF-8 as U+FFFD.

    Raises:
        StudyError: the file is missing, no CSV, or no UTF-8 (the line is named).
    """
    try:
        return pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", encoding_errors=errors
        )
    except UnicodeDecodeError as error:
        raise StudyError(
            f"Line {_undecodable_line(path)} of the table {path} is no UTF-8 ({error.reason}); expected UTF-8. "
            f"Save it as UTF-8, for instance with `iconv -f WINDOWS-1252 -t UTF-8`."
        ) from error
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise StudyError(
            f"The table {path} could not be read as CSV ({error}); expected a header line and one study a row. "
            f"Quote cells that hold commas or line breaks."
        ) from error


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def table_of_studies(studies: Iterable[Study], root: Path | str) -> StudyTable:
    """Table of studies in memory, for instance the phantom's; array and PIL images are written as PNGs under root.

    Grounded reports are not kept. Raises StudyError where an image path lies outside the root.
    """
    root = Path(root)
    rows: list[dict[str, str | None]] = []
    for study in studies:
        row: dict[str, str | None] = {name: getattr(study, name) for name in SECTIONS}
        row |= {"study_id": study.study_id, "patient_id": study.patient_id, "split": study.split}
        row |= {
            name: _relative(getattr(study, name), f"{study.study_id}_{name}.png", root) for name in IMAGES
        }
        row["licence"] = study.licence.value
        row["truth"] = (
            None if study.truth is None else json.dumps([asdict(finding) for finding in study.truth])
        )
        rows.append(row)
    return StudyTable.from_rows(rows, root)


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
            f"The image {image} lies outside the table's root {root}; expected it below. Give a root that holds "
            f"every image."
        ) from None

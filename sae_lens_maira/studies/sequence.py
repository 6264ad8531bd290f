"""Studies of a table, built one at a time on access.

    sequence[i] = Study of row i;   sequence[a:b] = another sequence over the same columns

Only the text of the columns is in memory (Arrow buffers, about one kilobyte per study), never all records at once;
slices and copies share it. Images are paths below the root and are not opened. A prior report without a prior image is
left out of the record, since MAIRA-2's prompt cannot contain it; opening a table reports how many there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.study import Finding, Study

IMAGES = ("frontal", "lateral", "prior_frontal")
SECTIONS = ("indication", "technique", "comparison", "prior_report", "report")
RECORD = ("study_id", "patient_id", *IMAGES, *SECTIONS, "split", "licence", "truth")
"""Columns that a `Study` is made from."""


class StudySequence(Sequence[Study]):
    """Sequence of studies that builds each record on access.

    Args:
        columns: Name in `RECORD` -> array of text, None or NA where empty; all arrays have the same length.
        root: Folder that image paths are relative to.
        rows: Row numbers to use, in this order; all rows if not given.
    """

    def __init__(self, columns: Mapping[str, Any], root: Path, rows: np.ndarray | None = None) -> None:
        self._columns = {name: columns[name] for name in RECORD}
        self._root = root
        self._rows = np.arange(len(self._columns["study_id"])) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Study: ...
    @overload
    def __getitem__(self, index: slice) -> StudySequence: ...
    def __getitem__(self, index: int | slice) -> Study | StudySequence:
        if isinstance(index, slice):
            return StudySequence(self._columns, self._root, self._rows[index])
        row = int(self._rows[index])
        return study_of_row({name: column[row] for name, column in self._columns.items()}, self._root, row)


def study_of_row(row: Mapping[str, Any], root: Path, number: int) -> Study:
    """Build the `Study` of one row.

    Args:
        row: Name in `RECORD` -> value; a value that is not text counts as empty.
        root: Folder that image paths are relative to; an absolute path is kept.
        number: Row number for the error message.

    Raises:
        StudyError: The truth cannot be read, or the record is not valid.
    """
    values = {name: value if isinstance(value, str) and value else None for name, value in row.items()}
    truth = values.pop("truth")
    images = {name: root / path if (path := values.pop(name)) else None for name in IMAGES}
    if images["prior_frontal"] is None:
        values["prior_report"] = None
    try:
        found = None if truth is None else _findings(json.loads(truth))
        return Study(**images, **values, truth=found)  # pyright: ignore[reportArgumentType]  # Study checks them
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, StudyError):
            raise StudyError(f"Row {number} of the table of studies is not a valid study. {error}") from error
        raise StudyError(
            f"Row {number} (study {values['study_id']}) has a truth that could not be read: {error}. Expected a JSON "
            f"list of findings; write it with `table_of_studies`."
        ) from error


def _findings(entries: Any) -> tuple[Finding, ...]:
    if not isinstance(entries, list):
        raise TypeError(f"it is a {type(entries).__name__}")
    boxes = [tuple(box) if (box := entry.get("box")) is not None else None for entry in entries]
    return tuple(Finding(**{**entry, "box": box}) for entry, box in zip(entries, boxes, strict=True))

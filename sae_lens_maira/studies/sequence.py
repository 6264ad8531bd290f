"""Studies of a table, built one at a time when they are asked for.

    sequence[i] = Study of row i;   sequence[a:b] = another sequence over the same columns

Only the columns' text is held (Arrow buffers, about one kilobyte a study), never 227,835 records at once; slices and
copies share it. Images are paths under the root and are not opened. It knows nothing about files of tables.
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
"""The columns that a `Study` is made of."""


class StudySequence(Sequence[Study]):
    """A list of studies that makes each record on access.

    Args:
        columns: arrays of text, None or NA where empty, all of one length, by the names in `RECORD`.
        root: folder that relative image paths are below.
        rows: which rows of the columns, in which order; all of them if not given.
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
    """The record of one row.

    Args:
        row: values by the names in `RECORD`; what is no text counts as empty.
        root: folder that relative image paths are below; an absolute path stays as it is.
        number: the row's number, for the error.

    Raises:
        StudyError: the truth cannot be read, or the record is not valid.
    """
    told = {name: value if isinstance(value, str) and value else None for name, value in row.items()}
    truth = told.pop("truth")
    images = {name: root / path if (path := told.pop(name)) else None for name in IMAGES}
    try:
        found = None if truth is None else _findings(json.loads(truth))
        return Study(**images, **told, truth=found)  # pyright: ignore[reportArgumentType]  # Study checks them
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, StudyError):
            raise StudyError(f"Row {number} of the table of studies holds no valid study. {error}") from error
        raise StudyError(
            f"Row {number} (study {told['study_id']}) has a truth that could not be read: {error}. Expected a JSON "
            f"list of findings; write it with `table_of_studies`."
        ) from error


def _findings(told: Any) -> tuple[Finding, ...]:
    if not isinstance(told, list):
        raise TypeError(f"it is a {type(told).__name__}")
    boxes = [tuple(box) if (box := entry.get("box")) is not None else None for entry in told]
    return tuple(Finding(**{**entry, "box": box}) for entry, box in zip(told, boxes, strict=True))

"""A table of studies: one Parquet row per study, image paths relative to a root that is given when it is opened.

Since the root is no part of the file, a table made on one machine works on another. The table checks its columns,
licences and paths, not whether images exist or splits are clean. It knows no data set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.study import Finding, Licence, Study

IMAGES = ("frontal", "lateral", "prior_frontal")
SECTIONS = ("indication", "technique", "comparison", "prior_report", "report")
COLUMNS = ("study_id", "patient_id", *IMAGES, *SECTIONS, "prior_study_id", "split", "licence", "truth")
REQUIRED = ("study_id", "patient_id", "licence")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _finding(told: dict[str, Any]) -> Finding:
    box = told.get("box")
    return Finding(**{**told, "box": tuple(box) if box is not None else None})


def _checked(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    missing = [column for column in REQUIRED if column not in frame]
    unknown = [column for column in frame if column not in COLUMNS]
    if missing or unknown:
        raise StudyError(
            f"The table of studies {where} lacks the columns {missing} and has the unknown columns {unknown}; "
            f"expected {', '.join(COLUMNS)}, of which {', '.join(REQUIRED)} are needed. Rename or drop columns."
        )
    frame = frame.reindex(columns=list(COLUMNS)).reset_index(drop=True).astype(object)
    frame = frame.where(frame.notna(), None)
    for column in COLUMNS:
        for row, value in enumerate(frame[column]):
            if value is not None and not isinstance(value, str):
                raise StudyError(
                    f"Row {row} of the table of studies {where} has {column}={value!r}; expected text or nothing. "
                    f"Write ids, paths and truth (as JSON) as text."
                )
            if column in IMAGES and value and (_is_absolute(value) or ".." in PurePosixPath(value).parts):
                raise StudyError(
                    f"Row {row} of the table of studies {where} has the {column} path {value!r}; expected a path "
                    f"relative to the root, with forward slashes. Cut the root off and give it when opening."
                )
    for row, licence in enumerate(frame["licence"]):
        if licence not in {member.value for member in Licence}:
            raise StudyError(
                f"Row {row} of the table of studies {where} has licence {licence!r}; expected public, credentialed "
                f"or synthetic. Use credentialed when in doubt."
            )
    return frame


def _is_absolute(path: str) -> bool:
    return path.startswith(("/", "\\")) or path[1:2] == ":"


@dataclass(frozen=True, eq=False)
class StudyTable:
    """Rows of `COLUMNS` as text; `root` is the folder that image paths are relative to."""

    frame: pd.DataFrame
    root: Path

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, str | None]], root: Path | str) -> StudyTable:
        """Build a table; columns that a row does not name are empty. Raises StudyError on bad columns or values."""
        frame = pd.DataFrame(list(rows))
        if frame.empty:
            frame = pd.DataFrame(columns=list(COLUMNS))
        return cls(_checked(frame, "in memory"), Path(root))

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
        return cls(_checked(frame, str(path)), path.parent if root is None else Path(root))

    def save(self, path: Path | str) -> Path:
        """Write the table as Parquet, in one piece or not at all; the root is not written."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
        self.frame.astype("string").to_parquet(scratch, index=False)
        scratch.replace(path)
        return path

    def __len__(self) -> int:
        return len(self.frame)

    def rows(self) -> Iterator[dict[str, str | None]]:
        """The rows as dictionaries of text, None where empty."""
        for row in self.frame.to_dict("records"):
            yield {str(key): _text(value) for key, value in row.items()}

    def to_studies(self) -> Iterator[Study]:
        """Study records in row order, images as paths under the root; images are not opened."""
        for number, row in enumerate(self.rows()):
            prior = row.pop("prior_study_id")
            truth = row.pop("truth")
            images = {name: self.root / path if (path := row.pop(name)) else None for name in IMAGES}
            try:
                found = None if truth is None else tuple(_finding(told) for told in json.loads(truth))
            except (ValueError, TypeError) as error:
                raise StudyError(
                    f"Row {number} (study {row['study_id']}, prior {prior}) has a truth that could not be read: "
                    f"{error}. Expected a JSON list of findings; write it with `table_of_studies`."
                ) from error
            yield Study(**images, **row, truth=found)  # pyright: ignore[reportArgumentType]  # checked on opening

    def counts(self) -> dict[str, Any]:
        """Number of studies, patients, images and reports, and studies per split and licence."""
        frame = self.frame
        return {
            "studies": len(frame),
            "patients": int(frame["patient_id"].nunique()),
            **{name: int(frame[name].notna().sum()) for name in (*IMAGES, "report", "truth")},
            "split": {str(k): int(v) for k, v in frame["split"].fillna("none").value_counts().items()},
            "licence": {str(k): int(v) for k, v in frame["licence"].value_counts().items()},
        }


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

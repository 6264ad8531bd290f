"""Issues of a table's images: missing, unreadable, or of another study.

An image is of another study when one file serves two studies, when two files have the same content, when a prior image
belongs to a study that is not the prior, or when a path in MIMIC-CXR's layout names other ids than its row.
The files themselves are read by `image_files`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from sae_lens_maira.studies.image_files import ImageFiles
from sae_lens_maira.studies.issues import IssueKind, TableIssue
from sae_lens_maira.studies.sequence import IMAGES


def image_issues(frame: pd.DataFrame, root: Path, files: ImageFiles) -> Iterator[TableIssue]:
    """Yield all issues of the images of a table, given the result of the check of its files."""
    yield from _bad_files(frame, root, files)
    named = {column: frame[column].dropna() for column in IMAGES}
    seen = {
        column: pd.DataFrame(
            {
                "row": paths.index,
                "path": paths.to_numpy(),
                "image": [_image(root, path, files) for path in paths],
            }
        )
        for column, paths in named.items()
    }
    own = pd.concat([seen["frontal"], seen["lateral"]], ignore_index=True)
    yield from _shared(frame, own)
    yield from _wrong_priors(frame, own, seen["prior_frontal"])
    yield from _foreign_paths(frame)


def _image(root: Path, path: str, files: ImageFiles) -> str:
    """Name shared by all files of the same content."""
    return str(files.same.get(root / path, root / path))


def _bad_files(frame: pd.DataFrame, root: Path, files: ImageFiles) -> Iterator[TableIssue]:
    wrong = dict.fromkeys(files.missing, (IssueKind.MISSING_IMAGE, "no such file"))
    wrong |= {path: (IssueKind.UNREADABLE_IMAGE, why) for path, why in files.unreadable.items()}
    if not wrong:
        return
    for column in IMAGES:
        for row, path in frame[column].dropna().items():
            if (root / path) in wrong:
                kind, why = wrong[root / path]
                yield TableIssue(kind, (int(row),), f"{column} {path}: {why}")  # pyright: ignore[reportArgumentType]


def _shared(frame: pd.DataFrame, own: pd.DataFrame) -> Iterator[TableIssue]:
    for _, group in own.loc[own["image"].duplicated(keep=False)].groupby("image", sort=False):
        rows = tuple(sorted(int(row) for row in group["row"].unique()))
        paths = " and ".join(group["path"].unique())
        ids = ", ".join(frame["study_id"].iloc[row] for row in rows)
        if len(rows) == 1:
            detail = f"{paths} is frontal and lateral image of study {ids}"
        elif group["path"].nunique() == 1:
            detail = f"{paths} is an image of the studies {ids}"
        else:
            detail = f"{paths} hold the same image, in the studies {ids}"
        yield TableIssue(IssueKind.FOREIGN_IMAGE, rows, detail)


def _wrong_priors(frame: pd.DataFrame, own: pd.DataFrame, priors: pd.DataFrame) -> Iterator[TableIssue]:
    first = own.drop_duplicates("image").set_index("image")["row"]
    owner = priors["image"].map(first)
    study, patient = frame["study_id"].to_numpy(), frame["patient_id"].to_numpy()
    wanted = frame["prior_study_id"].to_numpy()
    for place in np.flatnonzero(owner.notna()):
        row, whose, path = int(priors["row"].iloc[place]), int(owner.iloc[place]), priors["path"].iloc[place]
        if whose == row:
            yield TableIssue(
                IssueKind.FOREIGN_IMAGE, (row,), f"prior_frontal {path} is the study's own image"
            )
        elif patient[whose] != patient[row] or (isinstance(wanted[row], str) and study[whose] != wanted[row]):
            detail = f"prior_frontal {path} is an image of study {study[whose]}"
            yield TableIssue(IssueKind.FOREIGN_IMAGE, (row, whose), detail)


def _foreign_paths(frame: pd.DataFrame) -> Iterator[TableIssue]:
    """Paths in MIMIC-CXR's layout, .../p10000032/s50414267/x.jpg, whose ids are not the row's."""
    for column, ids in zip(IMAGES, ("study_id", "study_id", "prior_study_id"), strict=True):
        named = frame[column].str.extract(r"(?:^|/)p(?P<patient>\d{8})/s(?P<study>\d{8})/")
        digits = frame["patient_id"].str.fullmatch(r"\d{8}").fillna(False)
        other = (named["patient"] != frame["patient_id"]) | (named["study"] != frame[ids])
        for row in np.flatnonzero((named["study"].notna() & digits & other.fillna(False)).fillna(False)):
            detail = (
                f"{column} {frame[column].iloc[row]}: the row is study {frame[ids].iloc[row]} of patient "
            )
            yield TableIssue(
                IssueKind.FOREIGN_IMAGE, (int(row),), detail + str(frame["patient_id"].iloc[row])
            )

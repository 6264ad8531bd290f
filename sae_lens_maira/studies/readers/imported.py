"""Result of an import: a table, the studies left out, and the files not used, each with its reason.

    studies read = studies in the table + studies left out        (each left out once, for its first reason)

All readers share these reasons, so that counts of different data sets can be compared.
"""

from __future__ import annotations

import csv
import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sae_lens_maira.io import atomic_file, csv_cell
from sae_lens_maira.studies.table import StudyTable


class SkipReason(str, enum.Enum):
    """Why a study was left out, in the order in which the reasons are checked."""

    NO_SPLIT = "no split"
    TWO_SPLITS = "images in two splits"
    NO_IMAGE_NAMED = "no image named"
    UNKNOWN_VIEW = "view unknown"
    NO_FRONTAL = "no frontal view"
    NO_IMAGE_FILE = "no image file"
    NO_REPORT = "no report file"
    NOT_TEXT = "report is not UTF-8 text"
    EMPTY_REPORT = "empty report"
    NO_FINDINGS = "no findings section"
    EMPTY_FINDINGS = "empty findings section"


class Skipped(NamedTuple):
    """One study that was left out."""

    study_id: str
    reason: SkipReason


class UnusedFile(NamedTuple):
    """One file that was found and is not part of any study of the table."""

    file: str
    """Path relative to the folder that was read."""
    reason: str


@dataclass(frozen=True)
class Imported:
    """A table, the studies left out, the files not used, and remarks on the studies in the table."""

    table: StudyTable
    skipped: Sequence[Skipped]
    notes: Mapping[str, int] = field(default_factory=dict)
    """Remark -> number of studies in the table that it applies to."""
    unused: Sequence[UnusedFile] = ()
    examples: Mapping[SkipReason, str] = field(default_factory=dict)
    """Reason such as NO_IMAGE_FILE -> one path that was not found."""

    def counts(self) -> dict[SkipReason, int]:
        """Studies left out per reason, in the order of the reasons; reasons that did not occur are missing."""
        found = Counter(entry.reason for entry in self.skipped)
        return {reason: found[reason] for reason in SkipReason if found[reason]}

    def unused_counts(self) -> dict[str, int]:
        """Files not used per reason, the most frequent first."""
        return dict(Counter(entry.reason for entry in self.unused).most_common())

    def save_skipped(self, path: Path | str) -> Path:
        """Write studies left out and files not used as CSV (study_id, file, reason), atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("study_id", "file", "reason"))
            rows.writerows((csv_cell(entry.study_id), "", entry.reason.value) for entry in self.skipped)
            rows.writerows(("", csv_cell(entry.file), entry.reason) for entry in self.unused)
        return path

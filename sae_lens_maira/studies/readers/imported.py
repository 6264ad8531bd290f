"""What an import gives: a table, and every study that is not in it with the reason.

    studies read = studies in the table + studies left out        (each left out once, for its first reason)

Readers share the reasons, so that their counts can be compared. It knows no data set.
"""

from __future__ import annotations

import csv
import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sae_lens_maira.io import atomic_file
from sae_lens_maira.studies.table import StudyTable


class SkipReason(str, enum.Enum):
    """Why a study was left out, in the order in which the reasons are looked at."""

    NO_SPLIT = "no split"
    TWO_SPLITS = "images in two splits"
    NO_IMAGE_NAMED = "no image named"
    NO_FRONTAL = "no frontal view"
    NO_IMAGE_FILE = "no image file"
    NO_REPORT = "no report file"
    NOT_TEXT = "report is no UTF-8 text"
    EMPTY_REPORT = "empty report"
    NO_FINDINGS = "no findings section"
    EMPTY_FINDINGS = "empty findings section"


class Skipped(NamedTuple):
    """One study that was left out."""

    study_id: str
    reason: SkipReason


@dataclass(frozen=True)
class Imported:
    """A table, the studies left out, and what else a user should know of the import."""

    table: StudyTable
    skipped: Sequence[Skipped]
    notes: Mapping[str, int] = field(default_factory=dict)
    """Remark -> number of studies it holds for; these studies are in the table."""

    def counts(self) -> dict[SkipReason, int]:
        """Studies left out by reason, in the order of the reasons; those that did not occur are missing."""
        found = Counter(entry.reason for entry in self.skipped)
        return {reason: found[reason] for reason in SkipReason if found[reason]}

    def save_skipped(self, path: Path | str) -> Path:
        """Write the studies left out as CSV (study_id, reason), in one piece or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("study_id", "reason"))
            rows.writerows((entry.study_id, entry.reason.value) for entry in self.skipped)
        return path

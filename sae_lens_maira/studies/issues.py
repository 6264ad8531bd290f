"""Kinds of issue of a table of studies, and the report that holds them.

Every issue names its rows, counted from 0. A report with an error has exit code 2. The checks are in `validate`.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass


class IssueKind(str, enum.Enum):
    """Kinds of issue. Those before NO_FRONTAL are errors, the others are warnings."""

    DUPLICATE_ID = "duplicate id"
    TWO_SPLITS = "patient in two splits"
    MISSING_IMAGE = "missing image"
    UNREADABLE_IMAGE = "unreadable image"
    FOREIGN_IMAGE = "image of another study"
    ENCODING = "text in the wrong encoding"
    EMPTY_REPORT = "empty report"
    PLACEHOLDER = "placeholder instead of a text"
    SPECIAL_TOKEN = "special token in a text"
    LONG_TEXT = "text too long for the model"
    PRIOR_ORDER = "prior not before the study"
    FOREIGN_PRIOR = "prior of another patient"
    BAD_TIME = "unreadable time"
    BAD_RECORD = "record not valid"
    NO_FRONTAL = "no frontal image"
    ABSOLUTE_PATH = "absolute image path"
    MIXED_LICENCES = "several licences"

    @property
    def is_error(self) -> bool:
        """Whether later steps would fail or give wrong results; otherwise the issue is a warning."""
        return self not in (IssueKind.NO_FRONTAL, IssueKind.ABSOLUTE_PATH, IssueKind.MIXED_LICENCES)


@dataclass(frozen=True)
class TableIssue:
    """One issue of a table, with its rows."""

    kind: IssueKind
    rows: tuple[int, ...]
    """Rows of the table, counted from 0."""
    detail: str

    def __str__(self) -> str:
        rows = ", ".join(map(str, self.rows[:10])) + (", ..." if len(self.rows) > 10 else "")
        severity = "error" if self.kind.is_error else "warning"
        return f"{severity}: {self.kind.value}: row {rows}: {self.detail}"


@dataclass(frozen=True)
class ValidationReport:
    """All issues of a table, by kind and row."""

    studies: int
    images: int
    """Number of distinct image files that were checked."""
    issues: tuple[TableIssue, ...]

    @property
    def errors(self) -> tuple[TableIssue, ...]:
        """The issues that are errors, not warnings."""
        return tuple(issue for issue in self.issues if issue.kind.is_error)

    @property
    def exit_code(self) -> int:
        """0 for a table without errors, else 2, as the command exits."""
        return 2 if self.errors else 0

    def counts(self) -> dict[IssueKind, int]:
        """Number of issues per kind, in the order of the kinds; kinds that did not occur are missing."""
        found = Counter(issue.kind for issue in self.issues)
        return {kind: found[kind] for kind in IssueKind if found[kind]}

"""Rule reader of phantom reports: which findings a text states, denies or compares.

A text is cut into clauses; in each clause patterns name findings, a negation cue makes them absent, a
comparison word gives the change, and side words choose the key. It reads the phantom's own phrasings exactly
and generated text sensibly; it is a scorer for this test bench, not a labeller for clinical reports.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from sae_lens_maira.phantom.sampling import FINDING_KEYS, zone_at
from sae_lens_maira.studies.findings import FindingReader
from sae_lens_maira.studies.statements import (
    COMPARES,
    NO_FINDING,
    REMOVED,
    Statement,
    StatementReader,
    merged,
)
from sae_lens_maira.studies.study import SIDED_KEYS, Finding

_FINDINGS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("pleural effusion", r"\beffusions?\b"),
        ("pneumothorax", r"\bpneumothora(x|ces)\b"),
        ("consolidation", r"\bconsolidations?\b"),
        (
            "cardiomegaly",
            r"\bcardiomegaly\b|\b(heart|silhouette)\b.*\benlarged\b|\benlarged (heart|cardiac)\b",
        ),
        ("oedema", r"\b(o?edema)\b"),
        ("atelectasis", r"\batelecta(sis|ses|tic)\b"),
        ("nodule", r"\bnodules?\b"),
        ("pacemaker", r"\bpacemaker\b"),
        ("endotracheal tube", r"\bendotracheal\b"),
        ("central venous line", r"\bcentral venous\b|\binternal jugular\b|\bsubclavian\b"),
        ("nasogastric tube", r"\bnasogastric\b"),
        ("rib fracture", r"\bfractures?\b"),
    )
)
_NORMAL = re.compile(r"\b(clear|normal)\b")
_GONE = re.compile(r"\b(resolved|resolution|no longer|removed|removal)\b")
_ABSENT = re.compile(r"\b(no|not|without|absence of|free of|negative for|neither)\b")
_NOT_A_DENIAL = re.compile(r"\b(no|without) (interval |significant )?change\b|\bnot changed\b")
_CHANGES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "unchanged",
        re.compile(r"\b(unchanged|stable|remains|no (interval |significant )?change|not changed)\b"),
    ),
    ("new", re.compile(r"\b(new|newly)\b")),
    ("larger", re.compile(r"\b(increased?|increasing|larger|worsened)\b")),
    ("smaller", re.compile(r"\b(decreased?|decreasing|smaller|improved)\b")),
)
_CLAUSES = re.compile(r"[.;\n]+|,? but\b|,? (?=without\b|with no\b)")
_ZONE = re.compile(r"\b(upper|mid|lower) zone\b")
_ZONED = ("consolidation", "nodule")
_SIDED_NAMES = (*SIDED_KEYS, "atelectasis", "nodule", "rib fracture")


@dataclass(frozen=True)
class ReportLabels:
    """What a report says; keys are those of FINDING_KEYS."""

    present: frozenset[str]
    """Findings stated as present, doubtful ones included."""
    changes: dict[str, str] = field(default_factory=dict)
    """Key -> "new", "larger", "smaller", "unchanged" or "removed", where the text compares."""
    sides: dict[str, str] = field(default_factory=dict)
    """Key -> "left" or "right" for one-sided findings, also those whose key carries no side."""
    denied: frozenset[str] = frozenset()
    """Findings the text says are absent; both sides of a sided one where no side is named."""


@dataclass(frozen=True)
class _Clause:
    """A clause, the findings it names, whether it denies them, and the change it states."""

    text: str
    names: tuple[str, ...]
    absent: bool
    change: str | None


def _read_clauses(text: str) -> Iterator[_Clause]:
    for clause in _CLAUSES.split(text.lower()):
        gone = bool(_GONE.search(clause))
        absent = gone or bool(_ABSENT.search(_NOT_A_DENIAL.sub(" ", clause)))
        change = REMOVED if gone else next((word for word, cue in _CHANGES if cue.search(clause)), None)
        names = tuple(name for name, pattern in _FINDINGS if pattern.search(clause))
        yield _Clause(clause, names, absent, change)


def _sides_of(clause: str) -> list[str]:
    if re.search(r"\b(bilateral|both)\b", clause):
        return ["left", "right"]
    return [side for side in ("left", "right") if re.search(rf"\b{side}\b", clause)]


def read_report(text: str) -> ReportLabels:
    """Read a report in the phantom's language.

    A sided finding without a side word is not counted as present; a finding both denied and stated counts as
    stated. An empty text yields empty labels.
    """
    present: set[str] = set()
    denied: set[str] = set()
    changes: dict[str, str] = {}
    sides: dict[str, str] = {}
    for clause in _read_clauses(text):
        for name in clause.names:
            stem = name.replace(" ", "_")
            here = _sides_of(clause.text) if name in _SIDED_NAMES else []
            if name in SIDED_KEYS:
                keys = [f"{stem}_{side}" for side in (here or (["left", "right"] if clause.absent else []))]
            else:
                keys = [stem]
            for key, side in zip(keys, here if name in SIDED_KEYS else here[:1], strict=False):
                sides[key] = side
            (denied if clause.absent else present).update(keys)
            if clause.change is not None and (clause.change == REMOVED or not clause.absent):
                changes.update(dict.fromkeys(keys, clause.change))
    gone_again = {key for key, word in changes.items() if word == "removed"}
    return ReportLabels(
        frozenset(present - gone_again), changes, sides, frozenset(denied - present | gone_again)
    )


def read_statements(text: str) -> tuple[Statement, ...]:
    """Statements of a report in the phantom's language, for `studies.report_metrics`."""
    found: list[Statement] = []
    for clause in _read_clauses(text):
        stated = clause.names if clause.change == REMOVED or not clause.absent else ()
        for name in stated:
            zone = _ZONE.search(clause.text) if name in _ZONED else None
            sides = _sides_of(clause.text) if name in _SIDED_NAMES else []
            found += [
                Statement(name.replace(" ", "_"), side, zone and zone[1], clause.change)
                for side in (sides or [None])
            ]
        if not stated and COMPARES.search(clause.text):
            found.append(Statement(NO_FINDING, change="compared"))
    return merged(found)


def place_of(finding: Finding) -> str | None:
    """Zone of a true finding, where the phantom's reports name one."""
    if finding.name not in _ZONED or finding.box is None:
        return None
    return zone_at((finding.box[1] + finding.box[3]) / 2)


def phantom_statements() -> StatementReader:
    """Reader of statements in the phantom's language and of its truth."""
    return StatementReader(tuple(name.replace(" ", "_") for name, _ in _FINDINGS), read_statements, place_of)


def is_readable(text: str) -> bool:
    """Whether a text names a finding of the phantom, or calls something clear or normal."""
    return any(clause.names or _NORMAL.search(clause.text) for clause in _read_clauses(text))


def phantom_reader() -> FindingReader:
    """Reader of the phantom's language, for `studies.findings`."""
    return FindingReader(
        FINDING_KEYS, lambda text: read_report(text).present, "phantom", is_readable, phantom_statements()
    )

"""Statements of a report: each finding with its side, place and change since the prior.

A `StatementReader` reads them from text and from a study's truth in one vocabulary, so that both can be compared
(`report_metrics`). A side, place or change that is not stated is None and never counts as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.labels import RuleStatus, rule_labels
from sae_lens_maira.studies.phrases import OBSERVATIONS
from sae_lens_maira.studies.study import Finding, Study

REMOVED = "removed"
NO_FINDING = ""
"""Name of the finding for a comparison that names none, such as "No interval change"."""


@dataclass(frozen=True)
class Statement:
    """One finding that a report states, or a finding that the prior had and this study does not.

    Attributes:
        finding: Name without a side, such as "pleural_effusion"; `NO_FINDING` for a comparison that names none.
        side: "left" or "right".
        place: "upper", "mid" or "lower".
        change: "new", "larger", "smaller", "unchanged" or "removed"; "compared" where only a prior is mentioned.
    """

    finding: str
    side: str | None = None
    place: str | None = None
    change: str | None = None

    @property
    def present(self) -> bool:
        """Whether the statement says that the finding is present."""
        return bool(self.finding) and self.change != REMOVED


@dataclass(frozen=True)
class StatementReader:
    """Reads statements from report text and from the truth of studies.

    Attributes:
        findings: Names of the findings, without sides.
        read: Function from a report to its statements.
        place_of: Function from a finding of the truth to its place.
    """

    findings: tuple[str, ...]
    read: Callable[[str], tuple[Statement, ...]]
    place_of: Callable[[Finding], str | None] = lambda finding: None

    def truth(self, study: Study) -> tuple[Statement, ...]:
        """Statements of a study's truth. Raises StudyError if it has no truth in this vocabulary."""
        names = {finding.name.replace(" ", "_") for finding in study.truth or ()}
        if study.truth is None or not names <= set(self.findings):
            raise StudyError(
                f"Study {study.study_id} has no truth in the words of this reader ({', '.join(self.findings)}). "
                "Compare with its report, or use the reader of its truth."
            )
        return tuple(
            Statement(f.name.replace(" ", "_"), f.side, self.place_of(f), f.change) for f in study.truth
        )

    def references(self, studies: Sequence[Study]) -> tuple[list[tuple[Statement, ...]], str]:
        """Statements that the reports of some studies are compared with.

        Returns:
            The truth of every study and "truth", if all studies have one in this vocabulary; else the statements of
            their own reports and "report".

        Raises:
            StudyError: A study has neither.
        """
        known = set(self.findings)
        if all(s.truth is not None and {f.name.replace(" ", "_") for f in s.truth} <= known for s in studies):
            return [self.truth(study) for study in studies], "truth"
        silent = [study.study_id for study in studies if not study.report]
        if silent:
            raise StudyError(
                f"{len(silent)} of {len(studies)} studies have neither a truth nor a report; the first is {silent[0]}. "
                "Leave them out, or add their reports."
            )
        return [self.read(study.report or "") for study in studies], "report"


def merged(statements: Iterable[Statement]) -> tuple[Statement, ...]:
    """Merge statements to one per finding and side, with the first place and change; "removed" takes precedence."""
    found: dict[tuple[str, str | None], Statement] = {}
    for one in statements:
        key = (one.finding, one.side)
        known = found.setdefault(key, one)
        change = REMOVED if REMOVED in (known.change, one.change) else known.change or one.change
        found[key] = replace(known, place=known.place or one.place, change=change)
    return tuple(found.values())


# Free text is read by the rule labels; attributes come from the sentence that states the observation.

CHANGES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (change, re.compile(rf"\b(?:{words})\b"))
    for change, words in (
        (
            "unchanged",
            "unchanged|stable|similar|remains?|persist(?:s|ent|ing)|no (?:interval |significant )*changes?|not changed",
        ),
        ("new", "new|newly|interval (?:development|appearance)"),
        ("larger", "increas(?:e|ed|ing)|larger|worsen(?:ed|ing)?|enlarging|progress(?:ed|ion|ing)"),
        ("smaller", "decreas(?:e|ed|ing)|smaller|improv(?:ed|ement|ing)|partial resolution"),
    )
)
COMPARES = re.compile(r"\b(?:prior|previous(?:ly)?|compar(?:ed|ison|ing)|interval|since|unchanged)\b")
_GONE = re.compile(r"\b(?:resolved|resolution of|no longer|has been removed|removal of|cleared)\b")
_PLACES = (
    ("upper", re.compile(r"\b(?:upper|apical|apex)\b")),
    ("mid", re.compile(r"\b(?:mid|middle)\b")),
    ("lower", re.compile(r"\b(?:lower|basilar|bibasilar|bases?|basal)\b")),
)
_PLACED = ("lung_opacity", "lung_lesion", "consolidation", "pneumonia", "atelectasis")
_SIDED = (*_PLACED, "pneumothorax", "pleural_effusion", "pleural_other", "fracture")


def rule_statements() -> StatementReader:
    """Make a reader of free report text by `rule_labels`: observations that are stated as present or as resolved."""
    return StatementReader(tuple(name for name in OBSERVATIONS if name != "no_finding"), _read_rules)


def _read_rules(text: str) -> tuple[Statement, ...]:
    found: list[Statement] = []
    for name, label in rule_labels(text).items():
        sentence = label.evidence.lower()
        gone = label.status is RuleStatus.ABSENT and _GONE.search(sentence) is not None
        if name == "no_finding" or not (gone or label.status is RuleStatus.PRESENT):
            continue
        change = REMOVED if gone else next((word for word, cue in CHANGES if cue.search(sentence)), None)
        places = [place for place, words in _PLACES if words.search(sentence)] if name in _PLACED else []
        place = places[0] if len(places) == 1 else None
        found += [
            Statement(name, side, place, change) for side in sides_of(sentence if name in _SIDED else "")
        ]
    if not any(one.change for one in found) and COMPARES.search(text.lower()):
        found.append(Statement(NO_FINDING, change="compared"))
    return merged(found)


def sides_of(text: str) -> tuple[str | None, ...]:
    """Sides that lower-case words name; (None,) if they name none."""
    if re.search(r"\b(?:bilateral(?:ly)?|both|bibasilar)\b", text):
        return "left", "right"
    return tuple(side for side in ("left", "right") if re.search(rf"\b{side}\b", text)) or (None,)


__all__ = ["NO_FINDING", "REMOVED", "Statement", "StatementReader", "merged", "rule_statements", "sides_of"]

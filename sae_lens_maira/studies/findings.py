"""Findings of studies (their truth) and of report text (what a report states).

    truth_table     (n, F) findings that the studies are known to have
    FindingReader   text -> findings that it states, by one vocabulary

A reader and the truth use the same names. Where a table has no truth, the reader labels the studies' own reports; such
labels repeat what a report states, and are not a diagnosis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.labels import RuleStatus, is_unknown, rule_labels
from sae_lens_maira.studies.phrases import OBSERVATIONS
from sae_lens_maira.studies.statements import StatementReader, rule_statements
from sae_lens_maira.studies.study import Study


@dataclass(frozen=True)
class FindingReader:
    """Reads findings from report text.

    Attributes:
        names: Names of the findings it can read, in label order.
        read: Function from a report to the names that it states as present. Use `stated` for generated text.
        source: Name of the method, for tables: "phantom", "rules", or your own.
        readable: Function that returns whether a report can be read. Unreadable reports are left out of every score.
        statements: Reader of findings with side, place and change, for `report_metrics`; None where there is none.
    """

    names: tuple[str, ...]
    read: Callable[[str], frozenset[str]]
    source: str
    readable: Callable[[str], bool] = bool
    statements: StatementReader | None = None

    def index(self, finding: str) -> int:
        """Column of a finding. Raises StudyError for a name that the reader does not know."""
        if finding not in self.names:
            raise StudyError(
                f"There is no finding {finding!r}; reports are read for {', '.join(self.names)}. Name one of these."
            )
        return self.names.index(finding)

    def stated(self, text: str) -> frozenset[str] | None:
        """Findings that a text states as present; None for a text that is empty or cannot be read.

        A generated report that cannot be read has unknown findings, which is not the same as no findings.
        """
        return self.read(text) if text.strip() and self.readable(text) else None

    def table(self, texts: Sequence[str]) -> np.ndarray:
        """(n, F) bool: whether each text states each finding as present."""
        stated = [self.read(text) for text in texts]
        return np.array([[name in one for name in self.names] for one in stated], dtype=bool).reshape(
            len(texts), len(self.names)
        )


def rule_reader() -> FindingReader:
    """Make a reader of free report text by `rule_labels`: which of the 14 usual observations are stated as present."""

    def read(text: str) -> frozenset[str]:
        labels = rule_labels(text)
        return frozenset(name for name, label in labels.items() if label.status is RuleStatus.PRESENT)

    def readable(text: str) -> bool:
        return not is_unknown(rule_labels(text))

    return FindingReader(tuple(OBSERVATIONS), read, "rules", readable, rule_statements())


def truth_table(studies: Sequence[Study], names: Sequence[str]) -> np.ndarray:
    """Findings that studies are known to have.

    Args:
        studies: Studies with a truth.
        names: Names of findings.

    Returns:
        (n, F) bool.

    Raises:
        StudyError: A study has no truth, or a finding of another vocabulary.
    """
    rows = []
    for study in studies:
        present = study.present_keys
        unknown = sorted(present - set(names))
        if unknown:
            raise StudyError(
                f"Study {study.study_id} has the findings {', '.join(unknown)}; expected only {', '.join(names)}. "
                "Use a reader of reports with these names."
            )
        rows.append([name in present for name in names])
    return np.array(rows, dtype=bool).reshape(len(rows), len(names))


def readable_studies(studies: Sequence[Study], reader: FindingReader) -> list[Study]:
    """Studies whose findings are known: those with a truth, a readable report, or no report at all.

    A report that is not English or states nothing ("None.") differs from one that denies every finding, so its study is
    left out of every score.
    """
    return [s for s in studies if s.truth is not None or not s.report or reader.readable(s.report)]


def known_findings(studies: Sequence[Study], reader: FindingReader) -> tuple[np.ndarray, str]:
    """Findings of studies: their truth where all of them have one in the reader's names, else their reports' labels.

    Args:
        studies: The studies.
        reader: Reader of their reports.

    Returns:
        (n, F) bool, and "truth" or the reader's source.

    Raises:
        StudyError: A study has neither a truth nor a report, or its report cannot be read.
    """
    names = set(reader.names)
    if len(studies) and all(s.truth is not None and s.present_keys <= names for s in studies):
        return truth_table(studies, reader.names), "truth"
    silent = [study.study_id for study in studies if not study.report]
    if silent:
        raise StudyError(
            f"{len(silent)} of {len(studies)} studies have neither a truth nor a report, the first is {silent[0]}. "
            "Leave them out, or add their reports."
        )
    unread = [study.study_id for study in studies if study.report and not reader.readable(study.report)]
    if unread:
        raise StudyError(
            f"The reports of {len(unread)} of {len(studies)} studies cannot be read: they are not English or state "
            f"nothing; the first is {unread[0]}. Their findings are unknown. Leave these studies out."
        )
    return reader.table([study.report or "" for study in studies]), reader.source

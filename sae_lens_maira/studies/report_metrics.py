"""Count the errors of generated reports against their references, and compare two sets of reports.

    false_finding      a finding that the reference does not have on any side
    omission           a finding of the reference that the report states on no side
    wrong_side         a finding on the other side (not counted as false finding and omission as well)
    wrong_place        right finding and side, another zone of the lung
    wrong_change       a comparison with the prior that the reference contradicts
    false_comparison   a comparison in a study without a prior

    F1 = 2 TP / (stated + present)      a finding on the wrong side is stated and present, but not a true positive

A side, place or change that a report or reference does not state is never an error. Differences between two sets of
reports of the same studies have 95 % intervals by the paired bootstrap over studies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sae_lens_maira.errors import StudyError
from sae_lens_maira.stats import bootstrap, f1
from sae_lens_maira.studies.statements import REMOVED, Statement, StatementReader
from sae_lens_maira.studies.study import Study

ERRORS = ("false_finding", "omission", "wrong_side", "wrong_place", "wrong_change", "false_comparison")
COMPARISON = "comparison"
"""Name in tables for comparisons that name no finding."""


@dataclass(frozen=True)
class ReportErrors:
    """Counts of n reports.

    Attributes:
        findings: Names of the F findings.
        errors: (n, F + 1, 6) errors in the order of `ERRORS`; the last row counts comparisons that name no finding.
        agreed: (n, F) findings that are stated and present on the same side.
        stated: (n, F) findings that the reports state as present, sides counted separately.
        present: (n, F) findings that the references have.
    """

    findings: tuple[str, ...]
    errors: np.ndarray
    agreed: np.ndarray
    stated: np.ndarray
    present: np.ndarray

    def __len__(self) -> int:
        return len(self.errors)

    @property
    def totals(self) -> dict[str, int]:
        """Number of errors of each kind over all reports."""
        return dict(zip(ERRORS, map(int, self.errors.sum((0, 1))), strict=True))

    def measures(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Compute micro F1, macro F1, and errors per report: of all kinds together and of each kind.

        Args:
            weights: (draws, n) weight of every report; all 1 if not given.

        Returns:
            (draws, 9) in the order of `measure_names`. Macro F1 is the mean over findings that a reference has at least
            once in all reports; F1 is 1 where nothing is stated and nothing present.
        """
        weights = np.ones((1, len(self))) if weights is None else weights
        agreed, stated, present = weights @ self.agreed, weights @ self.stated, weights @ self.present
        micro = _f1(agreed.sum(1), stated.sum(1), present.sum(1))
        known = self.present.sum(0) > 0
        macro = (
            _f1(agreed, stated, present)[:, known].mean(1) if known.any() else np.full(len(weights), np.nan)
        )
        rates = weights @ self.errors.sum(1) / weights.sum(1, keepdims=True)
        return np.column_stack([micro, macro, rates.sum(1), rates])

    def without(self, *findings: str) -> ReportErrors:
        """Counts without some findings."""
        kept = [i for i, name in enumerate(self.findings) if name not in findings]
        return ReportErrors(
            tuple(self.findings[i] for i in kept),
            self.errors[:, [*kept, len(self.findings)]],
            *(part[:, kept] for part in (self.agreed, self.stated, self.present)),
        )

    def summary(self, seed: int = 0, draws: int = 2000) -> pd.DataFrame:
        """Table of one row per measure: its value with a 95 % bootstrap interval over studies."""
        samples = bootstrap(self.measures, len(self), draws, seed)
        return pd.DataFrame(
            {
                "measure": measure_names(),
                "value": self.measures()[0],
                "low": samples.low,
                "high": samples.high,
            }
        )

    def by_finding(self) -> pd.DataFrame:
        """Table of one row per finding: how often it is present, stated and agreed, its F1, and its errors of each
        kind.
        """
        totals = [part.sum(0) for part in (self.present, self.stated, self.agreed)]
        table = pd.DataFrame(dict(zip(("present", "stated", "agreed"), totals, strict=True)))
        table.insert(0, "finding", self.findings)
        table["f1"] = _f1(totals[2], totals[1], totals[0])
        errors = pd.DataFrame(self.errors.sum(0), columns=pd.Index(ERRORS))
        named = pd.concat([table, errors.iloc[:-1]], axis=1)
        last = pd.DataFrame([{"finding": COMPARISON, **dict(errors.iloc[-1])}])
        return pd.concat([named, last], ignore_index=True)

    def change_from(self, before: ReportErrors, seed: int = 0, draws: int = 2000) -> pd.DataFrame:
        """Table of one row per measure: the value before, the value of these reports, and the difference with its
        interval.

        Args:
            before: Counts of other reports of the same studies.
            seed: Random seed of the bootstrap, which resamples studies and so keeps the reports paired.
            draws: Number of resamples.

        Raises:
            StudyError: The two are not counts of the same references.
        """
        if before.findings != self.findings or not np.array_equal(before.present, self.present):
            raise StudyError(
                f"Reports of {len(before)} and of {len(self)} studies with other references were compared. Count both "
                "against the same references."
            )
        samples = bootstrap(lambda w: self.measures(w) - before.measures(w), len(self), draws, seed)
        first, last = before.measures()[0], self.measures()[0]
        columns = {
            "before": first,
            "after": last,
            "change": last - first,
            "low": samples.low,
            "high": samples.high,
        }
        return pd.DataFrame({"measure": measure_names(), **columns})


def measure_names() -> tuple[str, ...]:
    """Names of the columns of `ReportErrors.measures`."""
    return ("micro_f1", "macro_f1", "errors_per_report", *(f"{name}_per_report" for name in ERRORS))


def count_errors(
    stated: Sequence[Sequence[Statement]],
    references: Sequence[Sequence[Statement]],
    prior: Sequence[bool],
    findings: Sequence[str],
) -> ReportErrors:
    """Count the errors of reports from their statements.

    Args:
        stated: statements of every report.
        references: statements of every reference, in the same order.
        prior: whether every study has a prior.
        findings: names of all findings.

    Raises:
        StudyError: The numbers differ, or a statement names another finding.
    """
    if not len(stated) == len(references) == len(prior) or not len(stated):
        raise StudyError(
            f"{len(stated)} reports, {len(references)} references and {len(prior)} studies were given; expected as "
            "many of each, and at least one."
        )
    size = (len(stated), len(findings) + 1)
    errors, counts = np.zeros((*size, len(ERRORS)), dtype=np.int64), np.zeros((3, *size), dtype=np.int64)
    rows = {name: i for i, name in enumerate((*findings, ""))}
    for i, (report, reference) in enumerate(zip(stated, references, strict=True)):
        unknown = sorted({one.finding for one in (*report, *reference)} - rows.keys())
        if unknown:
            raise StudyError(
                f"Report {i} or its reference names {', '.join(unknown)}; expected {', '.join(findings)}."
            )
        for name in {one.finding for one in (*report, *reference)}:
            mine, theirs = ([s for s in part if s.finding == name] for part in (report, reference))
            _count(mine, theirs, prior[i], errors[i, rows[name]])
            pairs, _, _ = _paired(mine, theirs)
            counts[:, i, rows[name]] = (
                sum(a.present and b.present and _same_side(a, b) for a, b in pairs),
                sum(one.present for one in mine),
                sum(one.present for one in theirs),
            )
    agreed, in_reports, in_references = counts[:, :, :-1]
    return ReportErrors(tuple(findings), errors, agreed, in_reports, in_references)


def report_errors(
    reports: Sequence[str], studies: Sequence[Study], reader: StatementReader
) -> tuple[ReportErrors, str]:
    """Count the errors of generated reports of some studies.

    Args:
        reports: Text per study.
        studies: The studies.
        reader: Reader of the texts and of the truth.

    Returns:
        The counts, and the name of the reference: "truth", or "report" where a study has no truth.
    """
    references, source = reader.references(studies)
    stated = [reader.read(text) for text in reports]
    return count_errors(stated, references, [s.has_prior for s in studies], reader.findings), source


def _paired(
    mine: Sequence[Statement], theirs: Sequence[Statement]
) -> tuple[list[tuple[Statement, Statement]], list[Statement], list[Statement]]:
    """(pairs, statements only in the report, statements only in the reference) of one finding.

    Equal sides are paired first, then sides that one of them leaves open, then opposite sides.
    """
    left, right = list(mine), list(theirs)
    pairs: list[tuple[Statement, Statement]] = []
    fits: tuple[Callable[[Statement, Statement], bool], ...] = (
        lambda a, b: a.side == b.side and a.present == b.present,
        lambda a, b: a.side == b.side,
        _same_side,
        lambda a, b: a.present and b.present,
    )
    for fit in fits:
        for one in list(left):
            other = next((b for b in right if fit(one, b)), None)
            if other is not None:
                pairs.append((one, other))
                left.remove(one)
                right.remove(other)
    return pairs, left, right


def _count(mine: Sequence[Statement], theirs: Sequence[Statement], prior: bool, errors: np.ndarray) -> None:
    """Add the errors of one finding in one report to (6,) `errors`."""
    pairs, extra, missed = _paired(mine, theirs)
    for one, other in pairs:
        wrong_side = not _same_side(one, other)
        removed = (one.change == REMOVED) != (other.change == REMOVED)
        errors[ERRORS.index("wrong_side")] += wrong_side
        errors[ERRORS.index("wrong_place")] += (
            not wrong_side and not removed and _differ(one.place, other.place)
        )
        errors[ERRORS.index("wrong_change")] += prior and (removed or _contradict(one.change, other.change))
        # Without a prior, a finding that the report calls resolved counts as missing from the report.
        errors[ERRORS.index("omission")] += not prior and one.change == REMOVED and other.present
    for one in extra:
        errors[ERRORS.index("false_finding")] += one.present
        # The report states that the prior had a finding that it did not have.
        errors[ERRORS.index("wrong_change")] += prior and one.change == REMOVED
    errors[ERRORS.index("omission")] += sum(one.present for one in missed)
    if not prior:
        errors[ERRORS.index("false_comparison")] += sum(one.change is not None for one in mine)


def _same_side(one: Statement, other: Statement) -> bool:
    return not _differ(one.side, other.side)


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other


def _contradict(one: str | None, other: str | None) -> bool:
    return _differ(one, other) and "compared" not in (one, other)


def _f1(agreed: np.ndarray, stated: np.ndarray, present: np.ndarray) -> np.ndarray:
    return np.where(stated + present > 0, f1(agreed, stated, present), 1.0)


__all__ = ["ERRORS", "ReportErrors", "count_errors", "measure_names", "report_errors"]

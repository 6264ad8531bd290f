"""Errors of steered reports, counted against the studies, next to those of the unsteered reports.

The steered finding is left out: it is wrong by intention. A row of the table is a method and a measure of
`studies.report_metrics`, with the paired difference between steered and unsteered reports of the same studies.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies import FindingReader, Study
from sae_lens_maira.studies.report_metrics import report_errors


def error_changes(
    reports: Mapping[str, Sequence[str]],
    unsteered: Sequence[str],
    studies: Sequence[Study],
    reader: FindingReader,
    finding: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the errors of steered and unsteered reports.

    Args:
        reports: method -> report per study.
        unsteered: report per study without steering.
        studies: the studies.
        reader: reader of findings whose `statements` are counted.
        finding: the steered finding, which is left out with both of its sides; None counts all.
        seed: random seed of the bootstrap over studies.

    Returns:
        Columns method, measure, before, after, change, low, high, and against ("truth" or "report").

    Raises:
        StudyError: the reader reads no statements.
    """
    if reader.statements is None:
        raise StudyError(
            f"The reader {reader.source!r} reads no sides, places and changes, so errors cannot be counted. Give it "
            "a StatementReader."
        )
    names = reader.statements.findings
    steered = [name for name in names if finding in (name, f"{name}_left", f"{name}_right")]
    before, against = report_errors(unsteered, studies, reader.statements)
    tables = []
    for method, texts in reports.items():
        after, _ = report_errors(texts, studies, reader.statements)
        table = after.without(*steered).change_from(before.without(*steered), seed)
        table.insert(0, "method", method)
        tables.append(table.assign(against=against))
    return pd.concat(tables, ignore_index=True)


__all__ = ["error_changes"]

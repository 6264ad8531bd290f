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
        reports: Method -> report per study.
        unsteered: Report per study without steering.
        studies: Studies of the reports, in their order.
        reader: Reader of findings whose `statements` are counted.
        finding: The steered finding, which is left out with both of its sides; None counts all.
        seed: Random seed of the bootstrap over studies.

    Returns:
        Columns method, measure, before, after, change, low, high, against ("truth" or "report"), and unreadable: the
        number of studies that are left out because one of their two reports cannot be read.

    Raises:
        StudyError: The reader reads no statements, or no study has two readable reports.
    """
    if reader.statements is None:
        raise StudyError(
            f"The reader {reader.source!r} reads no sides, places and changes, so errors cannot be counted. Give it "
            "a StatementReader."
        )
    names = reader.statements.findings
    steered = [name for name in names if finding in (name, f"{name}_left", f"{name}_right")]
    tables = []
    for method, texts in reports.items():
        known = [
            i
            for i, pair in enumerate(zip(texts, unsteered, strict=True))
            if all(reader.stated(text) is not None for text in pair)
        ]
        if not known:
            raise StudyError(
                f"None of the {len(texts)} reports of {method!r} can be read, so their errors are unknown. Steer with "
                "less strength."
            )
        kept = [studies[i] for i in known]
        before, against = report_errors([unsteered[i] for i in known], kept, reader.statements)
        after, _ = report_errors([texts[i] for i in known], kept, reader.statements)
        table = after.without(*steered).change_from(before.without(*steered), seed)
        table.insert(0, "method", method)
        tables.append(table.assign(against=against, unreadable=len(texts) - len(known)))
    return pd.concat(tables, ignore_index=True)


__all__ = ["error_changes"]

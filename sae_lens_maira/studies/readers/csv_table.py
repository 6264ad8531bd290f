"""Import studies from a CSV file, also one with other column names than a table of studies."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.delimited import csv_frame
from sae_lens_maira.studies.readers.imported import Imported
from sae_lens_maira.studies.sections import ReportSections, parse_sections
from sae_lens_maira.studies.study import Licence, licence_of
from sae_lens_maira.studies.table import COLUMNS, StudyTable


def import_csv(
    path: Path | str,
    root: Path | str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    licence: Licence | str | None = None,
    relicense: Mapping[str, str] | None = None,
    cut_reports: bool = False,
) -> Imported:
    """Make a table of studies from a CSV file whose columns may have other names.

    Args:
        path: CSV file with a header line, see `csv_frame`.
        root: Folder that its image paths are below; the CSV's own folder if not given.
        columns: Column of a table of studies -> column of the CSV, for instance {"frontal": "image_path"}; other
            columns keep their names.
        licence: Licence of rows that state none. A stated licence is made stricter, never looser.
        relicense: Stated licence word -> licence, for instance {"open": "public"}; the only way to loosen a licence.
        cut_reports: Cut whole reports (with section headers) in the column `report` into sections.

    Returns:
        The table, with a note for every column that is not used and every licence that was changed.

    Raises:
        StudyError: The file cannot be read, a named column is missing, a value is not valid, or `licence` would
            loosen a stated licence.
    """
    path = Path(path)
    frame = csv_frame(path, known=(*COLUMNS, *(columns or {}).values()))
    for ours, theirs in (columns or {}).items():
        if ours not in COLUMNS:
            raise StudyError(
                f"There is no column {ours!r} in a table of studies; expected {', '.join(COLUMNS)}."
                f"{_hint(ours, COLUMNS)}"
            )
        if theirs not in frame:
            names = [str(name) for name in frame]
            raise StudyError(
                f"{path} has no column {theirs!r}; it has {', '.join(names)}.{_hint(theirs, names)}"
            )
        frame[ours] = frame[theirs]
    others = [name for name in frame if name not in COLUMNS and name not in (columns or {}).values()]
    frame = frame.loc[:, [name for name in COLUMNS if name in frame]]
    notes = {
        f"column {name!r} is not a column of a table of studies and was left out": len(frame)
        for name in others
    }
    frame, changed = _licensed(
        frame, path, None if licence is None else licence_of(licence), dict(relicense or {})
    )
    notes |= changed
    whole = _whole_reports(frame)
    if whole and cut_reports:
        frame = _cut(frame, whole)
        notes["whole report cut into sections"] = len(whole)
        referred = sum(sections.findings_from_impression for sections in whole.values())
        notes |= {"findings taken from the impression": referred} if referred else {}
    elif whole:
        notes["report with section headers, kept whole (--cut-reports true cuts it into sections)"] = len(
            whole
        )
    table = StudyTable.from_frame(frame, path.parent if root is None else root, str(path))
    return Imported(table, [], notes)


_STRICTNESS = {Licence.SYNTHETIC.value: 0, Licence.PUBLIC.value: 1, Licence.CREDENTIALED.value: 2}


def _licensed(
    frame: pd.DataFrame, path: Path, licence: Licence | None, relicense: dict[str, str]
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the frame with a licence in every row, and one note per change."""
    wanted = licence.value if licence else Licence.CREDENTIALED.value
    if "licence" not in frame:
        if relicense:
            raise StudyError(
                f"{path} has no column licence, so there is nothing to relicense. Use --licence."
            )
        return frame.assign(licence=wanted), {}
    stated = frame["licence"].astype(object).map(lambda cell: str(cell).strip())
    notes = {}
    for old, new in relicense.items():
        rows = stated == old
        if not rows.any():
            seen = ", ".join(repr(word) for word in sorted(set(stated))[:8])
            raise StudyError(
                f"No row of {path} has the licence {old!r}; it has {seen}. Give one of these words."
            )
        notes[f"licence changed from {old!r} to {licence_of(new).value}"] = int(rows.sum())
        stated = stated.mask(rows, licence_of(new).value)
    blank, unknown = stated == "", ~stated.isin([*_STRICTNESS, ""])
    if licence is not None:
        rank = stated.map(_STRICTNESS).fillna(
            max(_STRICTNESS.values())
        )  # a blank or misspelt licence counts as credentialed
        looser = rank > _STRICTNESS[wanted]
        if looser.any():
            counts = Counter(stated[looser])
            seen = ", ".join(
                f"{count} {word!r}" if word else f"{count} blank" for word, count in counts.items()
            )
            raise StudyError(
                f"--licence {wanted} would loosen the licence of {int(looser.sum())} of {len(frame)} rows of {path} "
                f"({seen}). --licence only makes licences stricter. If you are allowed to loosen them, use "
                f"--relicense-from WORD --to {wanted}, one word at a time."
            )
        changed = (stated != wanted) & ~unknown
        if changed.any():
            notes[f"licence made stricter: {wanted}"] = int(changed.sum())
        stated = pd.Series(wanted, index=stated.index)
    elif blank.any():
        notes["licence blank, taken as credentialed"] = int(blank.sum())
        stated = stated.mask(blank, Licence.CREDENTIALED.value)
    return frame.assign(licence=stated.astype("string")), notes


def _whole_reports(frame: pd.DataFrame) -> dict[int, ReportSections]:
    """Row -> sections, for reports that contain a findings header and another header, or an impression header."""
    if "report" not in frame:
        return {}
    found = {}
    for row, text in enumerate(frame["report"]):
        if isinstance(text, str) and ":" in text and is_whole_report(sections := parse_sections(text)):
            found[row] = sections
    return found


def is_whole_report(sections: ReportSections) -> bool:
    """Whether a text has section headers, so that it is a whole report and not only its findings."""
    return sections.has_findings_header or sections.impression is not None


def _cut(frame: pd.DataFrame, whole: Mapping[int, ReportSections]) -> pd.DataFrame:
    frame = frame.copy()
    for name in ("indication", "technique", "comparison"):
        cells = list(frame[name]) if name in frame else [""] * len(frame)
        for row, sections in whole.items():
            cells[row] = cells[row] or getattr(sections, name) or ""
        frame[name] = pd.array(cells, dtype="string")
    reports = list(frame["report"])
    for row, sections in whole.items():
        reports[row] = sections.findings or ""
    frame["report"] = pd.array(reports, dtype="string")
    return frame


def _hint(word: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


__all__ = ["import_csv", "is_whole_report"]

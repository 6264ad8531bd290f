"""A user's own studies: a folder of images with reports of the same name, or a CSV with columns of any names.

    a/x.png  a/x.txt  a/x_lateral.png  a/x_prior.png  a/x_prior.txt    ->    the study "a/x" with lateral and prior

A text with section headers is cut into sections; one without is the report as it stands. Studies count as credentialed
unless told otherwise. It knows no data set and opens no image.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.readers.imported import Imported, Skipped, SkipReason
from sae_lens_maira.studies.sections import ReportSections, parse_sections
from sae_lens_maira.studies.study import Licence, licence_of
from sae_lens_maira.studies.table import COLUMNS, StudyTable, csv_frame

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom")
LATERAL, PRIOR = "_lateral", "_prior"
PATIENTS = ("study", "folder")


def import_folder(
    folder: Path | str,
    *,
    licence: Licence | str = Licence.CREDENTIALED,
    patients: str = "study",
    need_reports: bool = True,
) -> Imported:
    """Table of the images below a folder.

    Args:
        folder: images, each with an optional `.txt` of the same name beside it; searched with its subfolders.
        licence: of all studies.
        patients: "study" makes every study a patient of its own, "folder" makes each folder of images one patient.
        need_reports: leave out images without findings; False keeps them, for models that write the report.

    Returns:
        The table (root = `folder`) and the studies left out: NO_REPORT, NOT_TEXT, EMPTY_REPORT, NO_FINDINGS,
        EMPTY_FINDINGS, and NO_FRONTAL for a lateral or prior image whose frontal one is missing.

    Raises:
        StudyError: no such folder, no image in it, two images of one name, or an unknown word for `patients`.
    """
    root = Path(folder)
    if patients not in PATIENTS:
        raise StudyError(f"patients was {patients!r}; expected one of {', '.join(PATIENTS)}.")
    if not root.is_dir():
        raise StudyError(f"There is no folder {root}; give one that holds images.")
    images: dict[str, str] = {}
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES):
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in images:
            raise StudyError(
                f"{root} holds both {images[name]} and {path.relative_to(root).as_posix()}; expected one image a name, "
                f"since the name is the study's id. Rename or remove one."
            )
        images[name] = path.relative_to(root).as_posix()
    if not images:
        raise StudyError(
            f"{root} holds no image; expected files ending in {', '.join(SUFFIXES)}. Check the folder."
        )
    rows: list[dict[str, str | None]] = []
    skipped: list[Skipped] = []
    notes: Counter[str] = Counter()
    for name, image in images.items():
        stem = next((name.removesuffix(end) for end in (LATERAL, PRIOR) if name.endswith(end)), None)
        if stem is not None:
            if stem not in images:
                skipped.append(Skipped(name, SkipReason.NO_FRONTAL))
            continue
        parsed = _parsed(root / f"{name}.txt")
        report = parsed if isinstance(parsed, SkipReason) else _findings(parsed)
        if isinstance(report, SkipReason):
            if need_reports:
                skipped.append(Skipped(name, report))
                continue
            notes[f"kept without a report: {report.value}"] += 1
            report = None
        sections = None if isinstance(parsed, SkipReason) else parsed
        prior = _parsed(root / f"{name}{PRIOR}.txt")
        rows.append(
            {
                "study_id": name,
                "patient_id": name if patients == "study" else Path(name).parent.as_posix(),
                "frontal": image,
                "lateral": images.get(name + LATERAL),
                "prior_frontal": images.get(name + PRIOR),
                "prior_report": None if isinstance(prior, SkipReason) else prior.as_prior,
                "indication": sections and sections.indication,
                "technique": sections and sections.technique,
                "comparison": sections and sections.comparison,
                "report": report,
                "licence": licence_of(licence).value,
            }
        )
    return Imported(StudyTable.from_rows(rows, root), skipped, notes)


def _parsed(path: Path) -> ReportSections | SkipReason:
    """The sections of a report file, or why there are none."""
    try:
        found = parse_sections(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        return SkipReason.NO_REPORT
    except UnicodeDecodeError:
        return SkipReason.NOT_TEXT
    return found if found.body else SkipReason.EMPTY_REPORT


def _findings(found: ReportSections) -> str | SkipReason:
    """The findings of a report; the whole text where it has no headers at all."""
    if found.findings:
        return found.findings
    if found.has_findings_header:
        return SkipReason.EMPTY_FINDINGS
    named = (found.impression, found.indication, found.technique, found.comparison)
    return SkipReason.NO_FINDINGS if any(named) else found.body


def import_csv(
    path: Path | str,
    root: Path | str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    licence: Licence | str | None = None,
) -> Imported:
    """Table of a CSV whose columns may have names of their own.

    Args:
        path: UTF-8 CSV with a header line.
        root: folder that its image paths are below; the CSV's own if not given.
        columns: our name -> the CSV's name, for instance {"frontal": "image_path"}; others keep their names.
        licence: of all studies; needed only where the CSV has no such column and is not credentialed.

    Returns:
        The table, with a note for every column that is none of ours and was left out.

    Raises:
        StudyError: the file cannot be read, a named column is missing, or a value is not valid.
    """
    path = Path(path)
    frame = csv_frame(path)
    for ours, theirs in (columns or {}).items():
        if ours not in COLUMNS:
            close = difflib.get_close_matches(ours, COLUMNS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise StudyError(
                f"There is no column {ours!r} in a table of studies; expected {', '.join(COLUMNS)}.{hint}"
            )
        if theirs not in frame:
            close = difflib.get_close_matches(theirs, [str(name) for name in frame], n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise StudyError(f"{path} has no column {theirs!r}; it has {', '.join(map(str, frame))}.{hint}")
        frame[ours] = frame[theirs]
    others = [name for name in frame if name not in COLUMNS and name not in (columns or {}).values()]
    frame = frame.loc[:, [name for name in COLUMNS if name in frame]]
    if licence is not None:
        frame = frame.assign(licence=licence_of(licence).value)
    elif "licence" not in frame:
        frame = frame.assign(licence=Licence.CREDENTIALED.value)
    table = StudyTable.from_frame(frame, path.parent if root is None else root, str(path))
    return Imported(
        table, [], {f"column {name!r} is none of ours and was left out": len(table) for name in others}
    )

"""Import studies from DICOM files, grouped and ordered by their headers; pixels are not read.

    study     StudyInstanceUID (else patient, date and folder)        patient   PatientID (else the study)
    view      ViewPosition, view codes, series description, patient orientation, file name; else unknown
    prior     the patient's last study strictly before, by StudyDate and StudyTime

Other body parts, other modalities and images without pixels are left out and counted. A view is never guessed: an
image of unknown view is used only with `assume_frontal`. Needs pydicom (the extra `dicom`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.readers.imported import Skipped, SkipReason, UnusedFile
from sae_lens_maira.studies.readers.report_files import findings_of, read_report_file

DICOM_SUFFIXES = (".dcm", ".dicom")
RADIOGRAPHS = ("CR", "DX", "RG", "XR")
FRONTAL_ORDER = ("PA", "AP", "FRONTAL")
LATERAL_ORDER = ("LATERAL", "LL", "RL")
_TAGS = """
    PatientID StudyInstanceUID AccessionNumber Modality BodyPartExamined ViewPosition ViewCodeSequence
    SeriesDescription StudyDescription ProtocolName PatientOrientation Laterality ImageLaterality
    StudyDate StudyTime AcquisitionDate AcquisitionTime NumberOfFrames Rows Columns
    PresentationIntentType SeriesNumber InstanceNumber SOPClassUID AnatomicRegionSequence
    AcquisitionDeviceProcessingDescription
""".split()  # noqa: SIM905
_CHEST = re.compile(r"chest|thora|\blungs?\b|\bcxr\b|\bt?x?thx\b|heart", re.IGNORECASE)
_OTHER_PART = re.compile(
    r"hand|wrist|finger|thumb|elbow|forearm|humerus|shoulder|clavicle|foot|toe|ankle|tibia|fibula|knee|femur|hip|pelvis"
    r"|abdomen|spine|skull|head|neck|sinus|breast|leg|arm|extrem|sacrum|jaw",
    re.IGNORECASE,
)
_WORDS = {
    "PA": re.compile(r"\bp\.?a\.?\b|postero-?\s?anterior", re.IGNORECASE),
    "AP": re.compile(r"\ba\.?p\.?\b|antero-?\s?posterior", re.IGNORECASE),
    "FRONTAL": re.compile(r"\bfrontal\b", re.IGNORECASE),
    "LATERAL": re.compile(r"\blat(?:eral)?\b|\bll\b|\brl\b|profile", re.IGNORECASE),
}


@dataclass(frozen=True)
class DicomFile:
    """Header of one DICOM file."""

    file: str
    study: str
    patient: str | None
    accession: str
    view: str | None
    """"PA", "AP", "FRONTAL" (either of these), "LATERAL", "LL" or "RL"; None if no source names it."""
    taken: str | None
    """ISO time to the second, or to the day where no time is stored; None without a date."""
    order: tuple[int, int, int, str]
    """Sort key: images for presentation first, then series and instance number."""


@dataclass
class DicomStudies:
    """Rows without a licence, studies left out, files not used, and the reports that were used."""

    rows: list[dict[str, str | None]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    unused: list[UnusedFile] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    texts: set[str] = field(default_factory=set)


def read_header(root: Path, file: str) -> DicomFile | str:
    """Read the header of a file, or return the reason why the file is not used.

    Args:
        root: Folder that `file` is relative to.
        file: Path of a DICOM file.

    Raises:
        StudyError: Pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise StudyError(
            f"{root / file} is a DICOM file and pydicom is not installed; its header names the study, patient and "
            'view. Install it with `pip install "sae-lens-maira[dicom]"`.'
        ) from error
    try:
        tags: Any = list(_TAGS)
        header: Any = pydicom.dcmread(root / file, stop_before_pixels=True, specific_tags=tags, force=True)
        words = {name: _word(header, name) for name in _TAGS if not name.endswith("Sequence")}
        codes = _meanings(header, "ViewCodeSequence")
        region = _meanings(header, "AnatomicRegionSequence")
    except Exception as error:  # pydicom raises many types
        return f"not readable as DICOM ({type(error).__name__})"
    if not words["Rows"] or not words["Columns"]:
        return "DICOM without an image, or not DICOM"
    if words["Modality"] and words["Modality"].upper() not in RADIOGRAPHS:
        return f"modality {words['Modality'].upper()}, not a radiograph"
    if words["NumberOfFrames"] not in ("", "0", "1"):
        return "DICOM of several frames"
    part = _other_part(words, region)
    if part:
        return f"body part {part}, not the chest"
    taken = _taken(words)
    folder = PurePosixPath(file).parent.as_posix()
    study = words["StudyInstanceUID"] or "/".join((words["PatientID"] or folder, (taken or "")[:10], folder))
    processing = words["PresentationIntentType"].upper() == "FOR PROCESSING"
    order = (int(processing), _number(words["SeriesNumber"]), _number(words["InstanceNumber"]), file)
    view = _view(words, codes, PurePosixPath(file).stem)
    return DicomFile(file, study, words["PatientID"] or None, words["AccessionNumber"], view, taken, order)


def dicom_studies(
    root: Path,
    files: Sequence[str],
    texts: Mapping[str, str],
    *,
    need_reports: bool = True,
    assume_frontal: bool = False,
) -> DicomStudies:
    """Group DICOM files into studies.

    Args:
        root: Folder that the files are relative to.
        files: DICOM files.
        texts: Lower-case name without suffix -> report file, relative to the root.
        need_reports: Leave out studies without findings.
        assume_frontal: Take images of unknown view as frontal where a study has no frontal image.

    Returns:
        Rows ordered by patient and time. A study's report is the text named like one of its images, its folder, its
        StudyInstanceUID or its AccessionNumber.
    """
    made = DicomStudies()
    studies: dict[str, list[DicomFile]] = {}
    for file in files:
        header = read_header(root, file)
        if isinstance(header, str):
            made.unused.append(UnusedFile(file, header))
        else:
            studies.setdefault(header.study, []).append(header)
    rows = [
        _row(root, study, sorted(images, key=lambda image: image.order), texts, assume_frontal, made)
        for study, images in studies.items()
    ]
    rows.sort(key=lambda row: (row["patient_id"], row["taken"] or "~", row["study_id"]))
    _link_priors(rows)
    for row in rows:
        reason = row.pop("reason")
        row.pop("as_prior")
        if reason in (SkipReason.UNKNOWN_VIEW, SkipReason.NO_FRONTAL) or (reason and need_reports):
            made.skipped.append(Skipped(row["study_id"], reason))
            continue
        if reason:
            made.notes[f"kept without a report: {reason.value}"] += 1
        made.rows.append(row)
    return made


def _row(
    root: Path,
    study: str,
    images: Sequence[DicomFile],
    texts: Mapping[str, str],
    assume_frontal: bool,
    made: DicomStudies,
) -> dict[str, Any]:
    """Make the row of one study, with two more keys: `reason` (why it is left out, or None), `as_prior` (its text as
    prior report).
    """
    frontal = _first(images, FRONTAL_ORDER)
    lateral = _first(images, LATERAL_ORDER)
    unknown = [image for image in images if image.view is None]
    reason = None
    if frontal is None and unknown and assume_frontal:
        frontal = unknown[0]
        made.notes["frontal view assumed, not known"] += 1
    if frontal is None:
        reason = SkipReason.UNKNOWN_VIEW if unknown else SkipReason.NO_FRONTAL
    for image in images:
        if image not in (frontal, lateral):
            why = "view unknown" if image.view is None else "another image of a study"
            made.unused.append(UnusedFile(image.file, why))
    row: dict[str, Any] = {
        "study_id": study,
        "patient_id": next((image.patient for image in images if image.patient), study),
        "frontal": frontal and frontal.file,
        "lateral": lateral and lateral.file,
        "view": frontal and frontal.view,
        "taken": min((image.taken for image in images if image.taken), default=None),
        "as_prior": None,
    }
    text = next((texts[name] for name in _report_names(study, images) if name in texts), None)
    parsed = read_report_file(root / text) if text else SkipReason.NO_REPORT
    made.texts |= {text} if text else set()
    if isinstance(parsed, SkipReason):
        return row | {"reason": reason or parsed}
    row["as_prior"] = parsed.as_prior
    row |= {name: getattr(parsed, name) for name in ("indication", "technique", "comparison")}
    report = findings_of(parsed)
    if isinstance(report, SkipReason):
        return row | {"reason": reason or report}
    if report.remark and reason is None:
        made.notes[report.remark] += 1
    return row | {"report": report.text, "reason": reason}


def _link_priors(rows: Sequence[dict[str, Any]]) -> None:
    """Set each study's prior: the patient's last study strictly before it. Rows are ordered by patient and time."""
    last: dict[str, dict[str, Any]] = {}
    same: list[dict[str, Any]] = []
    for row in rows:
        if same and (same[0]["patient_id"], same[0]["taken"]) != (row["patient_id"], row["taken"]):
            if same[0]["taken"]:
                last[same[0]["patient_id"]] = same[-1]
            same = []
        same.append(row)
        prior = last.get(row["patient_id"]) if row["taken"] else None
        # A date without a time is not before a time of the same day.
        if (
            prior
            and prior["taken"][:10] == row["taken"][:10]
            and 10 in (len(prior["taken"]), len(row["taken"]))
        ):
            prior = None
        row["prior_study_id"] = prior and prior["study_id"]
        row["prior_taken"] = prior and prior["taken"]
        row["prior_frontal"] = prior and prior["frontal"]
        row["prior_report"] = prior and prior["as_prior"]


def _first(images: Iterable[DicomFile], views: Sequence[str]) -> DicomFile | None:
    """The first image of the first of these views that occurs; images for presentation come first."""
    found = [image for image in images if image.view in views]
    found.sort(key=lambda image: (image.order[0], views.index(str(image.view))))
    return found[0] if found else None


def _report_names(study: str, images: Sequence[DicomFile]) -> Iterable[str]:
    for image in images:
        yield PurePosixPath(image.file).with_suffix("").as_posix().lower()
    folders = {PurePosixPath(image.file).parent.as_posix() for image in images}
    for name in (study, *{image.accession for image in images if image.accession}):
        yield name.lower()
        yield from (f"{folder}/{name}".lower() for folder in folders)
    for folder in folders - {"."}:
        yield folder.lower()
        yield f"{folder}/report".lower()


def _word(header: Any, name: str) -> str:
    value = header.get(name, "")
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value).strip()
    return (
        "\\".join(str(part) for part in value)
        if isinstance(value, Sequence | Iterable)
        else str(value).strip()
    )


def _meanings(header: Any, name: str) -> str:
    return " ".join(str(item.get("CodeMeaning", "")) for item in header.get(name) or ())


def _number(word: str) -> int:
    return int(word) if word.lstrip("-").isdigit() else 0


def _taken(words: Mapping[str, str]) -> str | None:
    day = words["StudyDate"] or words["AcquisitionDate"]
    clock = words["StudyTime"] or words["AcquisitionTime"]
    found = re.fullmatch(r"(\d{4})[.-]?(\d\d)[.-]?(\d\d)", day)
    if not found:
        return None
    time = re.match(r"(\d\d):?(\d\d)?:?(\d\d)?", clock)
    date = "-".join(found.groups())
    return f"{date}T{time[1]}:{time[2] or '00'}:{time[3] or '00'}" if time else date


def _other_part(words: Mapping[str, str], region: str) -> str | None:
    """Body part that a header names, if it is not the chest."""
    named = words["BodyPartExamined"] or region
    if named:
        return None if _CHEST.search(named) else named.upper()
    described = " ".join((words["SeriesDescription"], words["StudyDescription"], words["ProtocolName"]))
    if _CHEST.search(described):
        return None
    other = _OTHER_PART.search(described)
    if other:
        return other[0].upper()
    sided = (words["Laterality"] or words["ImageLaterality"]).upper()
    return f"paired ({sided})" if sided in ("L", "R") else None


def _view(words: Mapping[str, str], codes: str, stem: str) -> str | None:
    """View of a chest radiograph from the most direct source that names one."""
    stated = words["ViewPosition"].upper().replace(".", "")
    for view in (*FRONTAL_ORDER, *LATERAL_ORDER):
        if (
            stated == view
            or stated.startswith(f"{view} ")
            or stated in (f"{view}_HORIZONTAL", f"{view}_SUPINE")
        ):
            return view
    if stated in ("LAT", "LLAT", "RLAT", "LLO", "LARGE LATERAL", "LEFT LATERAL", "RIGHT LATERAL"):
        return "LATERAL"
    if stated and not stated.isspace():
        return None  # an oblique or another view that the model does not accept
    descriptions = (
        codes,
        words["SeriesDescription"],
        words["AcquisitionDeviceProcessingDescription"],
        words["ProtocolName"],
        stem.replace("_", " "),
    )
    for text in descriptions:
        named = [view for view, pattern in _WORDS.items() if pattern.search(text)]
        if len(named) == 1:
            return named[0]
        if named:
            return None  # "PA and LAT" describes the study, not this image
    # Direction of the rows: towards the patient's left in a frontal image, forwards or backwards in a lateral one.
    first = words["PatientOrientation"].split("\\")[0].upper()[:1]
    return {"L": "FRONTAL", "A": "LATERAL", "P": "LATERAL"}.get(first)


__all__ = ["DICOM_SUFFIXES", "DicomFile", "DicomStudies", "dicom_studies", "read_header"]

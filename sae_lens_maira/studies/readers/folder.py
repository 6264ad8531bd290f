"""Import studies from a folder: images and reports of the same name, CheXpert's layout, and DICOM files.

    a/x.png  a/x.txt  a/x_lateral.png  a/x_prior.png  a/x_prior.txt      ->  study "a/x"
    patient00001/study1/view1_frontal.jpg  view2_lateral.jpg             ->  study "patient00001/study1"
    *.dcm                                                                ->  grouped by their headers (`dicom.py`)

A report with section headers is cut into sections; a report without headers is used whole. Studies count as
credentialed unless a licence is given. Every file that is not used is listed with a reason. Images are not opened.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.readers.dicom import DICOM_SUFFIXES, dicom_studies
from sae_lens_maira.studies.readers.imported import Imported, Skipped, SkipReason, UnusedFile
from sae_lens_maira.studies.readers.report_files import findings_of, read_report_file
from sae_lens_maira.studies.study import Licence, licence_of
from sae_lens_maira.studies.table import StudyTable

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
SUFFIXES = (*PICTURES, *DICOM_SUFFIXES)
PATIENTS = ("study", "folder")
_ROLE = re.compile(r"(?P<stem>.+)_(?P<role>frontal|lateral|prior)", re.IGNORECASE)
_VIEW = re.compile(r"view\d+_(?P<role>frontal|lateral)", re.IGNORECASE)
_CHEXPERT = re.compile(r"(?:^|/)(?P<patient>patient\d+)/study\d+$", re.IGNORECASE)
_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\0": ".tif", b"MM\0*": ".tif", b"BM": ".bmp"}


@dataclass
class _Group:
    """Image files of one study by role, in the order of their names."""

    frontal: list[str] = field(default_factory=list)
    lateral: list[str] = field(default_factory=list)
    prior: list[str] = field(default_factory=list)


def import_folder(
    folder: Path | str,
    *,
    licence: Licence | str = Licence.CREDENTIALED,
    patients: str = "study",
    need_reports: bool = True,
    assume_frontal: bool = False,
) -> Imported:
    """Make a table of studies from the images below a folder.

    Args:
        folder: Images, each with an optional `.txt` report of the same name; searched with its subfolders.
        licence: Licence of all studies.
        patients: "study" makes every study of pictures its own patient, "folder" makes each folder of pictures one
            patient. CheXpert's patient folders and DICOM patient ids are always used.
        need_reports: Leave out studies without findings; False keeps them, for models that write the report.
        assume_frontal: Take DICOM images whose view is unknown as frontal.

    Returns:
        The table (root = `folder`), the studies left out and the files not used.

    Raises:
        StudyError: The folder is missing or has no image, two images have the same name, `patients` is another word, or
            there are DICOM files and pydicom is not installed.
    """
    root = Path(folder)
    if patients not in PATIENTS:
        raise StudyError(f"patients was {patients!r}; expected one of {', '.join(PATIENTS)}.")
    if not root.is_dir():
        raise StudyError(f"There is no folder {root}; expected a folder of images. Check the path.")
    unused: list[UnusedFile] = []
    images, texts = _list_files(root, unused)
    if not images:
        raise StudyError(
            f"{root} holds no image; expected files ending in {', '.join(SUFFIXES)}. Check the folder."
        )
    groups, dicom = _grouped(root, images)
    rows: list[dict[str, str | None]] = []
    skipped: list[Skipped] = []
    notes: Counter[str] = Counter()
    used: set[str] = set()
    for name, group in sorted(groups.items()):
        if not group.frontal:
            unused += [
                UnusedFile(file, "lateral image without a frontal one of its study") for file in group.lateral
            ]
            unused += [UnusedFile(file, "prior image without an image of its study") for file in group.prior]
            skipped.append(Skipped(name, SkipReason.NO_FRONTAL))
            continue
        for role in ("frontal", "lateral", "prior"):
            unused += [
                UnusedFile(file, f"another {role} image of a study") for file in getattr(group, role)[1:]
            ]
        text = next((texts[key] for key in _report_names(name, group) if key in texts), None)
        prior_text = texts.get(f"{name}_prior".lower())
        used.update(file for file in (text, prior_text) if file)
        parsed = read_report_file(root / text) if text else SkipReason.NO_REPORT
        report = parsed if isinstance(parsed, SkipReason) else findings_of(parsed)
        if isinstance(report, SkipReason):
            if need_reports:
                skipped.append(Skipped(name, report))
                continue
            notes[f"kept without a report: {report.value}"] += 1
        elif report.remark:
            notes[report.remark] += 1
        sections = None if isinstance(parsed, SkipReason) else parsed
        prior = read_report_file(root / prior_text) if prior_text else SkipReason.NO_REPORT
        rows.append(
            {
                "study_id": name,
                "patient_id": _patient(name, patients),
                "frontal": group.frontal[0],
                "lateral": next(iter(group.lateral), None),
                "prior_frontal": next(iter(group.prior), None),
                "prior_report": None if isinstance(prior, SkipReason) else prior.as_prior,
                "indication": sections and sections.indication,
                "technique": sections and sections.technique,
                "comparison": sections and sections.comparison,
                "report": None if isinstance(report, SkipReason) else report.text,
                "licence": licence_of(licence).value,
            }
        )
    if dicom:
        more = dicom_studies(root, dicom, texts, need_reports=need_reports, assume_frontal=assume_frontal)
        rows += [row | {"licence": licence_of(licence).value} for row in more.rows]
        skipped += more.skipped
        unused += more.unused
        notes.update(more.notes)
        used |= more.texts
    left_out = {entry.study_id.lower() for entry in skipped}
    unused += [
        UnusedFile(file, "report without an image of its name")
        for key, file in sorted(texts.items())
        if file not in used and key not in left_out
    ]
    return Imported(StudyTable.from_rows(rows, root), skipped, notes, unused)


def _list_files(root: Path, unused: list[UnusedFile]) -> tuple[list[str], dict[str, str]]:
    """Image files and reports (lower-case name without suffix -> file), as paths relative to the root."""
    images: list[str] = []
    texts: dict[str, str] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        file = path.relative_to(root)
        name, suffix = file.as_posix(), path.suffix.lower()
        if any(part.startswith(".") or part == "__MACOSX" for part in file.parts):
            unused.append(UnusedFile(name, "hidden file"))
        elif suffix == ".txt":
            texts.setdefault(file.with_suffix("").as_posix().lower(), name)
        elif suffix in SUFFIXES or (_kind(path) if not suffix else _kind(path) == ".dcm"):
            images.append(name)
        else:
            unused.append(UnusedFile(name, "neither an image nor a .txt report"))
    return images, texts


def _kind(path: Path) -> str | None:
    """Suffix of the image format that a file's first bytes show; None for other content."""
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:132] == b"DICM":
        return ".dcm"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), None)


def _grouped(root: Path, images: Sequence[str]) -> tuple[dict[str, _Group], list[str]]:
    """Group images by study name; also return the DICOM files that are not an extra view of such a study."""
    dicom = {file for file in images if _is_dicom_name(root, file)}
    _refuse_two_of_a_name(root, [file for file in images if file not in dicom])
    names = {file: _study_and_role(file) for file in images}
    groups: dict[str, _Group] = {}
    for file, (study, role) in names.items():
        if role == "frontal" and file not in dicom:
            groups.setdefault(study, _Group()).frontal.append(file)
    spelled = {study.lower(): study for study in groups}
    left = []
    for file, (study, role) in names.items():
        known = study if study in groups else spelled.get(study.lower())
        if file in dicom and (known is None or role == "frontal"):
            left.append(file)
        elif role != "frontal":
            getattr(groups.setdefault(known or study, _Group()), role).append(file)
    return groups, left


def _refuse_two_of_a_name(root: Path, pictures: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for file in pictures:
        key = PurePosixPath(file).with_suffix("").as_posix()
        if seen.setdefault(key, file) != file:
            raise StudyError(
                f"{root} holds both {seen[key]} and {file}; expected one image per name, since the name is the "
                "study's id. Rename or remove one."
            )


def _is_dicom_name(root: Path, file: str) -> bool:
    suffix = PurePosixPath(file).suffix.lower()
    return suffix in DICOM_SUFFIXES or (suffix not in PICTURES and _kind(root / file) == ".dcm")


def _study_and_role(file: str) -> tuple[str, str]:
    """Study name and role of an image file."""
    path = (
        PurePosixPath(file).with_suffix("")
        if PurePosixPath(file).suffix.lower() in SUFFIXES
        else PurePosixPath(file)
    )
    numbered = _VIEW.fullmatch(path.name)
    if numbered and path.parent.as_posix() != ".":
        return path.parent.as_posix(), numbered["role"].lower()
    named = _ROLE.fullmatch(path.name)
    if named:
        return path.with_name(named["stem"]).as_posix(), named["role"].lower()
    return path.as_posix(), "frontal"


def _report_names(name: str, group: _Group) -> Iterator[str]:
    """Names, in lower case without suffix, that the report of a study may have."""
    yield name.lower()
    yield PurePosixPath(group.frontal[0]).with_suffix("").as_posix().lower()
    if PurePosixPath(group.frontal[0]).parent.as_posix() == name:  # the folder is the study
        yield f"{name}/report".lower()


def _patient(name: str, patients: str) -> str:
    """Patient id of a study that is not DICOM."""
    chexpert = _CHEXPERT.search(name)
    if chexpert:
        return chexpert["patient"]
    return name if patients == "study" else PurePosixPath(name).parent.as_posix()


__all__ = ["PATIENTS", "SUFFIXES", "import_folder"]

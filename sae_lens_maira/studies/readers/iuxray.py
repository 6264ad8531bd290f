"""Open-I (Indiana University chest X-rays): XML reports in a folder or a tar archive, images found by name.

The XML does not name the views, and the order of images does not show them: of the 3,337 studies with findings and
images, 488 list a lateral image first. Views therefore come from a projection table; without one they are unknown:

    filename,projection            Kaggle's indiana_projections.csv          "1_IM-0001-4001.dcm.png,Frontal"
    imageid,tsne-view              torchxrayvision's nlmcxr_tsne_pa.csv.gz   "CXR10_IM-0002-1001,L"
    imageid,View Position          torchxrayvision's nlmcxr_dicom_metadata.csv.gz (noisy; use it after the one above)

The collection has no patient ids, so every report counts as a separate patient.
"""

from __future__ import annotations

import re
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.delimited import csv_frame
from sae_lens_maira.studies.readers.imported import Imported, Skipped, SkipReason
from sae_lens_maira.studies.study import Licence
from sae_lens_maira.studies.table import StudyTable

SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm")
_COLUMNS = (("filename", "projection"), ("imageid", "tsne-view"), ("imageid", "View Position"))
_VIEWS = {
    "frontal": ("FRONTAL", "PA", "AP"),
    "lateral": ("LATERAL", "L", "LL", "RL", "LARGE LATERAL"),
}


@dataclass(frozen=True)
class IUXrayReport:
    """One XML report."""

    report_id: str
    """Report id, such as "CXR1"."""
    sections: dict[str, str]
    """Lower-case section name -> text, without empty sections."""
    images: tuple[str, ...]
    """Image ids in the order of the report."""
    major: tuple[str, ...]
    """Major MeSH terms; ("normal",) for a normal image."""


def parse_report(data: bytes, name: str = "report") -> IUXrayReport:
    """Read one XML report. Raises StudyError where it is not an Open-I report."""
    try:
        tree = ET.fromstring(data)
        uid = tree.find("uId")
        report_id = "" if uid is None else uid.attrib["id"]
    except (ET.ParseError, KeyError) as error:
        raise StudyError(
            f"{name} could not be read as XML ({error}); expected an Open-I report. Download it again."
        ) from error
    if not report_id:
        raise StudyError(
            f"{name} has no uId; expected an Open-I report. Remove other XML files from the folder."
        )
    sections = {}
    for element in tree.iter("AbstractText"):
        text = " ".join("".join(element.itertext()).split())
        if text:
            sections[element.attrib.get("Label", "").lower()] = text
    images = tuple(image.attrib["id"] for image in tree.iter("parentImage"))
    major = tuple(term.text.strip() for term in tree.iterfind(".//MeSH/major") if term.text)
    return IUXrayReport(report_id, sections, images, major)


def read_reports(source: Path | str) -> Iterator[IUXrayReport]:
    """Read every XML report of a folder or of a .tgz/.tar archive, in the order of their numbers."""
    source = Path(source)
    if source.is_dir():
        files = sorted(source.rglob("*.xml"), key=lambda path: _number(path.name))
        yield from (parse_report(path.read_bytes(), str(path)) for path in files)
        return
    try:
        with tarfile.open(source) as archive:
            members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(".xml")]
            found = {m.name: handle.read() for m in members if (handle := archive.extractfile(m))}
    except (OSError, tarfile.TarError, EOFError) as error:
        raise StudyError(
            f"The Open-I reports {source} could not be read ({error}); expected a folder of XML files or a .tgz "
            f"archive of them. Check the path."
        ) from error
    for name in sorted(found, key=_number):
        yield parse_report(found[name], f"{source}:{name}")


def _number(name: str) -> tuple[int, str]:
    digits = re.search(r"(\d+)\.xml$", name)
    return (int(digits[1]) if digits else 0, name)


def read_projections(tables: Sequence[Path | str]) -> dict[str, str]:
    """Read the views of images from projection tables.

    Args:
        tables: CSV files (also .gz) with the columns of this module's docstring. Where several name an image, the
            first one decides.

    Returns:
        Image key (`image_key`) -> "frontal" or "lateral". Images whose view a table leaves blank are missing.

    Raises:
        StudyError: A table cannot be read, or has none of the known pairs of columns.
    """
    views: dict[str, str] = {}
    for path in map(Path, tables):
        frame = csv_frame(path)
        pair = next((pair for pair in _COLUMNS if set(pair) <= set(frame)), None)
        if pair is None:
            raise StudyError(
                f"{path} has the columns {', '.join(map(str, list(frame)[:8]))}; expected a projection table of "
                f"Open-I with {' or '.join(f'{a},{b}' for a, b in _COLUMNS)}. Give indiana_projections.csv or "
                "nlmcxr_tsne_pa.csv.gz."
            )
        for image, word in zip(frame[pair[0]], frame[pair[1]], strict=True):
            view = next((view for view, words in _VIEWS.items() if str(word).strip().upper() in words), None)
            if view is not None:
                views.setdefault(image_key(str(image)), view)
    return views


def image_key(name: str) -> str:
    """The part of an image's name that the XML, Open-I's PNGs and Kaggle's PNGs share.

    "CXR10_IM-0002-1001", "CXR10_IM-0002-1001.png" and "10_IM-0002-1001.dcm.png" all give "10_IM-0002-1001"; so do
    "CXR1_1_IM-0001-3001" and "1_IM-0001-3001.dcm.png" with "1_IM-0001-3001".
    """
    stem = re.sub(r"(?:\.(?:png|jpe?g|dcm))+$", "", name.rsplit("/", 1)[-1], flags=re.IGNORECASE)
    return re.sub(r"^CXR(?:(\d+)_(?=\1_))?", "", stem)


def import_iuxray(
    reports: Path | str,
    images: Path | str | None = None,
    *,
    projections: Sequence[Path | str] | Path | str = (),
    assume_frontal: bool = False,
    need_images: bool = True,
) -> Imported:
    """Make a table of the Open-I studies with findings and a frontal image.

    Args:
        reports: Folder or .tgz archive of XML reports.
        images: Folder of image files, searched with its subfolders; None for a table of the reports alone.
        projections: Projection tables, see `read_projections`; the first that names an image decides its view.
        assume_frontal: Take the first image of a study whose views are all unknown as frontal.
        need_images: Leave out studies without an image file; ignored without `images`.

    Returns:
        The table (root = `images`) and the studies left out: NO_FINDINGS, NO_IMAGE_NAMED, NO_IMAGE_FILE, NO_FRONTAL
        (all views known, none frontal) and UNKNOWN_VIEW (no view known to be frontal).
    """
    root = Path(images) if images is not None else Path(reports).parent
    files: dict[str, str] = {}
    if images is not None:
        for path in sorted(root.rglob("*")):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                files.setdefault(image_key(path.name), path.relative_to(root).as_posix())
    views = read_projections([projections] if isinstance(projections, str | Path) else projections)
    rows: list[dict[str, str | None]] = []
    skipped: list[Skipped] = []
    notes: Counter[str] = Counter()
    examples: dict[SkipReason, str] = {}
    for report in read_reports(reports):
        reason, frontal, lateral = None, None, None
        if "findings" not in report.sections:
            reason = SkipReason.NO_FINDINGS
        elif images is not None:
            found = [image for image in report.images if image_key(image) in files]
            if found:
                reason, frontal, lateral, remark = _choose(found, views, assume_frontal)
                notes.update([remark] if remark and reason is None else [])
            elif need_images:
                reason = SkipReason.NO_IMAGE_FILE if report.images else SkipReason.NO_IMAGE_NAMED
                if report.images:
                    examples.setdefault(reason, f"{root}/{report.images[0]}.png")
        if reason is not None:
            skipped.append(Skipped(report.report_id, reason))
            continue
        rows.append(
            {
                "study_id": report.report_id,
                "patient_id": report.report_id,
                "frontal": frontal and files[image_key(frontal)],
                "lateral": lateral and files[image_key(lateral)],
                "indication": report.sections.get("indication"),
                "comparison": report.sections.get("comparison"),
                "report": report.sections["findings"],
                "licence": Licence.PUBLIC.value,
            }
        )
    return Imported(StudyTable.from_rows(rows, root), skipped, notes, examples=examples)


def _choose(
    images: Sequence[str], views: Mapping[str, str], assume_frontal: bool
) -> tuple[SkipReason | None, str | None, str | None, str | None]:
    """Return the reason why no frontal image is known (or None), the frontal image, the lateral image, and a remark."""
    known = {image: views.get(image_key(image)) for image in images}
    frontal = next((image for image, view in known.items() if view == "frontal"), None)
    lateral = next((image for image, view in known.items() if view == "lateral"), None)
    unknown = [image for image, view in known.items() if view is None]
    if frontal is None and unknown and assume_frontal:
        return None, unknown[0], lateral, "frontal view assumed, not known"
    if frontal is None:
        return (SkipReason.UNKNOWN_VIEW if unknown else SkipReason.NO_FRONTAL), None, None, None
    remark = "image of unknown view not used" if unknown and lateral is None else None
    return None, frontal, lateral, remark


__all__ = ["IUXrayReport", "image_key", "import_iuxray", "parse_report", "read_projections", "read_reports"]

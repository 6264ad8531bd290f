"""Open-I (Indiana University) chest X-rays: XML reports from a folder or a tar archive, images by file name.

A report names its images (`parentImage`) by id; the file is that id where such a file exists, else a shortened
form. The collection has no patient ids and no views in its XML, so every report is a
patient of its own, and the first image is taken as frontal unless its caption calls it lateral. It knows no model.
"""

from __future__ import annotations

import re
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.readers.imported import Imported, Skipped, SkipReason
from sae_lens_maira.studies.study import Licence
from sae_lens_maira.studies.table import StudyTable

SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm")


@dataclass(frozen=True)
class IUXrayReport:
    """One XML report."""

    report_id: str
    """"CXR1" and so on."""
    sections: dict[str, str]
    """Lower-case section name -> text, only those that are not empty."""
    images: tuple[tuple[str, str], ...]
    """(image id, caption) in the order of the report."""
    major: tuple[str, ...]
    """Major MeSH terms; ("normal",) for a normal film."""


def parse_report(data: bytes, name: str = "report") -> IUXrayReport:
    """Read one XML report. Raises StudyError where it is not an Open-I report."""
    try:
        tree = ET.fromstring(data)
        uid = tree.find("uId")
        report_id = "" if uid is None else uid.attrib["id"]
    except (ET.ParseError, KeyError) as error:
        raise StudyError(
            f"{name} could not be read as XML ({error}); expected an Open-I report. Fetch it again."
        ) from error
    if not report_id:
        raise StudyError(
            f"{name} has no uId; expected an Open-I report. Leave other XML files out of the folder."
        )
    sections = {}
    for element in tree.iter("AbstractText"):
        text = " ".join("".join(element.itertext()).split())
        if text:
            sections[element.attrib.get("Label", "").lower()] = text
    images = tuple((i.attrib["id"], (i.findtext("caption") or "").strip()) for i in tree.iter("parentImage"))
    major = tuple(term.text.strip() for term in tree.iterfind(".//MeSH/major") if term.text)
    return IUXrayReport(report_id, sections, images, major)


def read_reports(source: Path | str) -> Iterator[IUXrayReport]:
    """Every XML report of a folder or of a .tgz/.tar archive, in the order of their numbers."""
    source = Path(source)
    if source.is_dir():
        files = sorted(source.rglob("*.xml"), key=lambda path: _number(path.name))
        yield from (parse_report(path.read_bytes(), str(path)) for path in files)
        return
    try:
        with tarfile.open(source) as archive:
            members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(".xml")]
            found = {m.name: handle.read() for m in members if (handle := archive.extractfile(m))}
    except (OSError, tarfile.TarError) as error:
        raise StudyError(
            f"The Open-I reports {source} could not be read ({error}); expected a folder of XML files or the .tgz "
            f"of them. Check the path."
        ) from error
    for name in sorted(found, key=_number):
        yield parse_report(found[name], f"{source}:{name}")


def _number(name: str) -> tuple[int, str]:
    digits = re.search(r"(\d+)\.xml$", name)
    return (int(digits[1]) if digits else 0, name)


def import_iuxray(
    reports: Path | str, images: Path | str | None = None, need_images: bool = True
) -> Imported:
    """Table of the Open-I studies with findings.

    Args:
        reports: folder or .tgz of XML reports.
        images: folder of image files, searched with its subfolders; None for a table of reports alone.
        need_images: skip studies of which no image file is found; ignored without `images`.

    Returns:
        The table (root = `images`), and studies left out: NO_FINDINGS, NO_IMAGE_NAMED, NO_IMAGE_FILE.
    """
    root = Path(images) if images is not None else Path(reports).parent
    files = {}
    if images is not None:
        files = {
            p.stem: p.relative_to(root).as_posix()
            for p in sorted(root.rglob("*"))
            if p.suffix.lower() in SUFFIXES
        }
    rows: list[dict[str, str | None]] = []
    skipped: list[Skipped] = []
    for report in read_reports(reports):
        if "findings" not in report.sections:
            skipped.append(Skipped(report.report_id, SkipReason.NO_FINDINGS))
            continue
        found = [(path, caption) for image, caption in report.images if (path := _file(image, files))]
        if images is not None and need_images and not found:
            reason = SkipReason.NO_IMAGE_FILE if report.images else SkipReason.NO_IMAGE_NAMED
            skipped.append(Skipped(report.report_id, reason))
            continue
        lateral = [p for p, caption in found if caption.lower() == "lateral"]
        frontal = [p for p, _ in found if p not in lateral]
        if not lateral and len(frontal) > 1:
            lateral = frontal[1:]
        rows.append(
            {
                "study_id": report.report_id,
                "patient_id": report.report_id,
                "frontal": frontal[0] if frontal else None,
                "lateral": lateral[0] if lateral else None,
                "indication": report.sections.get("indication"),
                "comparison": report.sections.get("comparison"),
                "report": report.sections["findings"],
                "licence": Licence.PUBLIC.value,
            }
        )
    return Imported(StudyTable.from_rows(rows, root), skipped)


def _file(image: str, files: dict[str, str]) -> str | None:
    short = re.sub(r"^CXR\d+_(?=\d+_)", "CXR", image)
    return files.get(image) or files.get(short) or files.get(re.sub(r"^CXR\d+_", "", image))

"""Open-I: the whole corpus of the torchxrayvision wheel parses; images are found by name."""

import importlib.util
from pathlib import Path

import pytest

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.readers.imported import SkipReason
from sae_lens_maira.studies.readers.iuxray import import_iuxray, parse_report, read_reports

XML = """<eCitation><uId id="CXR{n}"/><Abstract><AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="INDICATION">Cough</AbstractText></Abstract>
<parentImage id="CXR{n}_1_IM-0001-3001"><caption>PA</caption></parentImage>
<parentImage id="CXR{n}_1_IM-0001-4001"/></eCitation>"""


def test_all_reports_of_the_wheel_parse() -> None:
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("torchxrayvision is not installed")
    archive = Path(spec.submodule_search_locations[0]) / "data" / "NLMCXR_reports.tgz"
    reports = list(read_reports(archive))
    assert len(reports) == 3955
    assert len({report.report_id for report in reports}) == 3955
    assert sum(len(report.images) for report in reports) == 7470
    imported = import_iuxray(archive)
    assert len(imported.table) == 3425
    assert imported.counts() == {SkipReason.NO_FINDINGS: 530}


def test_images_are_found_by_name_and_missing_ones_counted(tmp_path: Path) -> None:
    reports, images = tmp_path / "xml", tmp_path / "png"
    reports.mkdir()
    images.mkdir()
    for n, findings in ((1, "Clear."), (2, ""), (3, "Clear too.")):
        (reports / f"{n}.xml").write_text(XML.format(n=n, findings=findings))
    (images / "CXR1_1_IM-0001-3001.png").touch()
    (images / "CXR1_1_IM-0001-4001.png").touch()
    imported = import_iuxray(reports, images)
    (row,) = imported.table.rows()
    assert (row["frontal"], row["lateral"]) == ("CXR1_1_IM-0001-3001.png", "CXR1_1_IM-0001-4001.png")
    assert imported.skipped == [("CXR2", SkipReason.NO_FINDINGS), ("CXR3", SkipReason.NO_IMAGE_FILE)]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="uId"):
        parse_report(b"<a/>")
    (tmp_path / "x.tgz").write_bytes(b"no archive")
    with pytest.raises(StudyError, match="could not be read"):
        list(read_reports(tmp_path / "x.tgz"))

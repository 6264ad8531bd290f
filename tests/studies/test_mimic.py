"""MIMIC-CXR in the official layout: every skipped study has its reason, priors follow date and time."""

from pathlib import Path

import pandas as pd
import pytest

from sae_lens_maira.cli import main
from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies import Licence, read_table
from sae_lens_maira.studies.readers.imported import SkipReason
from sae_lens_maira.studies.readers.mimic import import_mimic, taken_at

pytestmark = pytest.mark.compat


@pytest.fixture
def imported(tmp_path, mimic_tree):
    return import_mimic(mimic_tree(tmp_path / "mimic"), progress=False)


def test_every_study_is_in_the_table_or_left_out_with_its_reason(imported, mimic_quirks) -> None:
    expected = {case.study: case.skipped for case in mimic_quirks if case.skipped}
    assert dict(imported.skipped) == expected
    kept = set(imported.table.frame["study_id"])
    assert kept == {case.study for case in mimic_quirks} - set(expected)
    assert len(imported.table) + sum(imported.counts().values()) == len(mimic_quirks)
    assert imported.counts()[SkipReason.NO_FINDINGS] == 2
    assert list(imported.counts()) == [r for r in SkipReason if r in set(expected.values())]


def test_sections_views_and_paths_of_a_study(imported) -> None:
    studies = {study.study_id: study for study in imported.table.studies}
    rows = {row["study_id"]: row for row in imported.table.rows()}
    full = studies["50414267"]
    assert full.indication == "___F with new onset ascites // eval for infection"
    assert full.technique == "Chest PA and lateral"
    assert full.comparison == "None."
    assert full.report is not None
    assert full.report.endswith("LUNGS: Clear otherwise. Clips from ___ project over the left breast.")
    assert full.licence is Licence.CREDENTIALED
    assert isinstance(full.frontal, Path)
    assert full.frontal.parent == imported.table.root / "files/p10/p10000032/s50414267"
    assert full.frontal.is_file()
    assert studies["53189527"].report == full.report  # the addendum above it is no part of it
    assert rows["53189527"]["view"] == "PA"  # though an AP image is listed first
    assert rows["53189527"]["lateral"] is not None
    assert (rows["56699142"]["view"], rows["56699142"]["lateral"]) == ("AP", None)
    assert studies["56699142"].report == "The heart is enlarged and there is edema in both lungs."


def test_the_prior_is_the_patients_previous_study_by_date_and_time(imported) -> None:
    rows = {row["study_id"]: row for row in imported.table.rows()}
    assert rows["53189527"]["taken"] == "2180-05-06T08:05:56.875"
    assert rows["53189527"]["prior_study_id"] is None
    noon = rows["50414267"]
    assert (noon["prior_study_id"], noon["prior_taken"]) == ("53189527", "2180-05-06T08:05:56.875")
    assert noon["prior_frontal"] == rows["53189527"]["frontal"]
    assert noon["prior_report"].startswith("FINDINGS: There is no focal consolidation")
    assert noon["prior_report"].endswith("IMPRESSION: No acute cardiopulmonary process.")
    # Its prior is no row of the table itself, since it has no findings section.
    assert rows["56699142"]["prior_study_id"] == "53911762"
    assert rows["56699142"]["prior_report"].endswith("The lungs are clear of effusion.")
    assert [rows[i]["prior_study_id"] for i in ("51178377", "50578979", "55697293")] == [
        None,
        None,
        "51178377",
    ]
    # The prior's image file is missing: its report stays, the image does not.
    last = rows["59999999"]
    assert (last["prior_study_id"], last["prior_frontal"]) == ("59988438", None)
    assert last["prior_report"]
    assert imported.notes["prior without a frontal image"] == 1
    assert imported.notes["without prior: date or time is missing"] == 1
    assert rows["57966011"]["taken"] is None


def test_times_have_lost_their_leading_zeros() -> None:
    times = ["213014.531", "80556.875", "93.25", "0", "1000", "", "250000", "12x", "5."]
    dates = ["21800506"] * 8 + ["21800506.0"]
    printed = taken_at(pd.Series(dates), pd.Series(times))
    assert [None if pd.isna(t) else t.strftime("%H:%M:%S.%f") for t in printed] == [
        "21:30:14.531000",
        "08:05:56.875000",
        None,  # 93 seconds are no time of day
        "00:00:00.000000",
        "00:10:00.000000",
        None,
        None,
        None,
        "00:00:05.000000",
    ]
    assert taken_at(pd.Series([""]), pd.Series(["1"])).isna().all()


def test_the_table_works_where_the_tree_was_moved_to(imported, tmp_path) -> None:
    imported.table.save(tmp_path / "studies.parquet")
    (tmp_path / "mimic").rename(tmp_path / "elsewhere")
    moved = read_table(tmp_path / "studies.parquet", tmp_path / "elsewhere").studies
    assert len(moved) == len(imported.table)
    for study in moved:
        images = [study.frontal, study.lateral, study.prior_frontal]
        paths = [Path(str(image)) for image in images if image is not None]
        assert paths
        assert all(path.is_file() for path in paths)


def test_reports_of_their_own_root_unpacked_tables_and_no_images(tmp_path, mimic_tree, mimic_quirks) -> None:
    """Both layouts give the same table; without images no file of them is looked for."""
    together = import_mimic(mimic_tree(tmp_path / "one"), progress=False).table.frame
    mimic_tree(tmp_path / "jpg", reports=tmp_path / "txt", packed=False)
    apart = import_mimic(tmp_path / "jpg", tmp_path / "txt", progress=False, workers=1).table.frame
    pd.testing.assert_frame_equal(together, apart)
    for file in (tmp_path / "jpg").rglob("*.jpg"):
        file.unlink()
    blind = import_mimic(tmp_path / "jpg", tmp_path / "txt", need_images=False, progress=False)
    assert SkipReason.NO_IMAGE_FILE not in blind.counts()
    assert len(blind.table) == len(apart) + 1
    seeing = import_mimic(tmp_path / "jpg", tmp_path / "txt", progress=False)
    assert len(seeing.table) == 0
    assert sum(seeing.counts().values()) == len(mimic_quirks)


def test_what_is_missing_is_named(tmp_path, mimic_tree, mimic_case) -> None:
    with pytest.raises(StudyError, match="no folder `files`"):
        import_mimic(tmp_path)
    root = mimic_tree(tmp_path / "m", [mimic_case("10000032", "50414267", "21800506", "1")], packed=False)
    split = root / "mimic-cxr-2.0.0-split.csv"
    text = split.read_text()
    split.write_text(text.replace("split", "part"))
    with pytest.raises(StudyError, match="split"):
        import_mimic(root, progress=False)
    split.write_text(text + "x,50414267,10000032,test\n")
    assert import_mimic(root, progress=False).counts() == {SkipReason.TWO_SPLITS: 1}
    (root / "mimic-cxr-2.0.0-metadata.csv").unlink()
    with pytest.raises(StudyError, match="metadata"):
        import_mimic(root)


def test_the_command_counts_what_is_left_out_and_the_moved_table_validates(
    tmp_path, mimic_tree, capsys
) -> None:
    root, out = mimic_tree(tmp_path / "jpg", reports=tmp_path / "txt"), tmp_path / "mimic.parquet"
    words = ["--images", str(root), "--reports", str(tmp_path / "txt"), "--out", str(out)]
    assert main(["studies", "import", "--source", "mimic", *words]) == 0
    printed = capsys.readouterr().out
    assert "left out: 9 studies" in printed
    assert "2 no findings section" in printed
    assert "1 prior without a frontal image" in printed
    assert f"give --root {root}" in printed
    root.rename(tmp_path / "elsewhere")
    assert main(["studies", "validate", "--table", str(out), "--root", str(tmp_path / "elsewhere")]) == 0
    assert "8 studies, " in capsys.readouterr().out


def test_the_next_frontal_file_is_taken_where_the_first_is_missing(tmp_path, mimic_tree, mimic_case) -> None:
    """The study stays, and so does the next study's prior."""
    cases = [
        mimic_case("10000032", "50414267", "21800506", "1", views=("AP", "AP")),
        mimic_case("10000032", "50414268", "21800507", "1", views=("PA",)),
    ]
    root = mimic_tree(tmp_path / "m", cases)
    first, second = sorted((root / "files/p10/p10000032/s50414267").glob("*.jpg"))
    first.unlink()
    imported = import_mimic(root, progress=False)
    rows = {row["study_id"]: row for row in imported.table.rows()}
    assert str(rows["50414267"]["frontal"]).endswith(second.name)
    assert rows["50414268"]["prior_frontal"] == rows["50414267"]["frontal"]
    assert imported.notes == {"first frontal file missing: another frontal image of the study taken": 1}
    second.unlink()
    gone = import_mimic(root, progress=False)
    assert gone.counts() == {SkipReason.NO_IMAGE_FILE: 1}
    assert gone.examples == {SkipReason.NO_IMAGE_FILE: str(first)}


def test_png_copies_float_ids_and_the_table_of_sections(tmp_path, mimic_tree) -> None:
    """The same studies as from the .jpg files and .txt reports, but for indications, which the table does not have."""
    root = mimic_tree(tmp_path / "m", packed=False)
    wanted = import_mimic(root, progress=False).table.frame
    for file in root.rglob("*.jpg"):
        file.rename(file.with_suffix(".png"))
    for kind in ("metadata", "split"):
        path = root / f"mimic-cxr-2.0.0-{kind}.csv"
        pd.read_csv(path, dtype={"StudyDate": str, "StudyTime": str}).astype(
            {"study_id": float, "subject_id": float}
        ).to_csv(path, index=False)
    found = import_mimic(root, progress=False).table.frame
    pd.testing.assert_frame_equal(
        found.drop(columns=["frontal", "lateral", "prior_frontal"]),
        wanted.drop(columns=["frontal", "lateral", "prior_frontal"]),
    )
    assert found["frontal"].str.replace(".png", ".jpg").tolist() == wanted["frontal"].tolist()
    lines = ["study,impression,findings,last_paragraph,comparison"]
    lines += [f's{row["study_id"]},,"{row["report"]}",,' for row in wanted.to_dict("records")]
    (tmp_path / "mimic_cxr_sectioned.csv").write_text("\n".join(lines) + "\n")
    for reports in (tmp_path, tmp_path / "mimic_cxr_sectioned.csv"):
        cut = import_mimic(root, reports, progress=False)
        assert cut.table.frame["report"].tolist() == wanted["report"].tolist()
        assert SkipReason.NO_REPORT in cut.counts()


def test_findings_that_refer_to_the_impression_are_counted(tmp_path, mimic_tree) -> None:
    root = mimic_tree(tmp_path / "mimic", packed=False)
    plain = import_mimic(root, progress=False)
    study = plain.table.frame["study_id"].iloc[0]
    (path,) = root.glob(f"files/*/*/s{study}.txt")
    path.write_text(" FINAL REPORT\n FINDINGS: See impression.\n\n IMPRESSION: Small effusion.\n")
    found = import_mimic(root, progress=False)
    assert found.notes["findings taken from the impression"] == 1
    assert "findings taken from the impression" not in plain.notes
    row = found.table.frame.set_index("study_id").loc[study]
    assert row["report"] == "Small effusion."
    (tmp_path / "mimic_cxr_sectioned.csv").write_text(
        f'study,impression,findings,last_paragraph,comparison\ns{study},"Big heart.","None.",,\n'
    )
    cut = import_mimic(root, tmp_path, progress=False)
    assert (cut.table.frame["report"].tolist(), cut.notes["findings taken from the impression"]) == (
        ["Big heart."],
        1,
    )

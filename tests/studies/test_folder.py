"""A user's own studies: a folder of images and texts, a CSV with names of its own."""

from pathlib import Path

import pytest

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies import Licence
from sae_lens_maira.studies.readers import import_csv, import_folder
from sae_lens_maira.studies.readers.imported import SkipReason

pytestmark = pytest.mark.compat


def write(root: Path, files: dict[str, str | bytes | None]) -> Path:
    """Images are named only: no reader opens them."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else (text or "").encode())
    return root


FILES: dict[str, str | bytes | None] = {
    "a/one.png": None,
    "a/one.txt": "The lungs are\nclear.",
    "a/one_lateral.JPG": None,
    "a/one_prior.dcm": None,
    "a/one_prior.txt": "Effusion.",
    "a/two.jpg": None,
    "a/two.txt": "INDICATION: Cough.\n\nFINDINGS: Clear.\n\nIMPRESSION: Normal.\n",
    "b/no_text.png": None,
    "b/blank.png": None,
    "b/blank.txt": " \n",
    "b/latin.png": None,
    "b/latin.txt": b"d\xe9j\xe0",
    "b/asks.png": None,
    "b/asks.txt": "IMPRESSION: Normal.",
    "b/hollow.png": None,
    "b/hollow.txt": "FINDINGS:\n",
    "b/stray_lateral.png": None,
    "notes.md": "no image",
}


def test_a_folder_of_images_and_texts(tmp_path: Path) -> None:
    imported = import_folder(write(tmp_path, FILES))
    one, two = imported.table.studies
    assert (one.study_id, one.patient_id, one.report) == ("a/one", "a/one", "The lungs are clear.")
    assert one.lateral == tmp_path / "a/one_lateral.JPG"
    assert one.prior_frontal == tmp_path / "a/one_prior.dcm"
    assert (one.prior_report, one.licence) == ("Effusion.", Licence.CREDENTIALED)
    assert (two.indication, two.report) == ("Cough.", "Clear.")
    assert dict(imported.skipped) == {
        "b/no_text": SkipReason.NO_REPORT,
        "b/blank": SkipReason.EMPTY_REPORT,
        "b/latin": SkipReason.NOT_TEXT,
        "b/asks": SkipReason.NO_FINDINGS,
        "b/hollow": SkipReason.EMPTY_FINDINGS,
        "b/stray": SkipReason.NO_FRONTAL,
    }


def test_images_without_reports_are_kept_on_demand_and_folders_can_be_patients(tmp_path: Path) -> None:
    imported = import_folder(write(tmp_path, FILES), licence="public", patients="folder", need_reports=False)
    assert imported.table.frame["patient_id"].tolist() == ["a"] * 2 + ["b"] * 5
    assert imported.table.counts()["report"] == 2
    assert imported.table.counts()["licence"] == {"public": 7}
    assert imported.notes["kept without a report: report is not UTF-8 text"] == 1
    assert [entry.study_id for entry in imported.skipped] == ["b/stray"]


def test_folder_refusals(tmp_path: Path) -> None:
    """A missing folder, one without images, and two images of one name are errors."""
    with pytest.raises(StudyError, match="no folder"):
        import_folder(tmp_path / "absent")
    with pytest.raises(StudyError, match="no image"):
        import_folder(tmp_path)
    write(tmp_path, {"x.png": None, "x.jpg": None})
    with pytest.raises(StudyError, match=r"x\.jpg and x\.png"):
        import_folder(tmp_path)
    with pytest.raises(StudyError, match="licence was 'free'"):
        import_folder(write(tmp_path / "f", {"x.png": None, "x.txt": "Clear."}), licence="free")
    with pytest.raises(StudyError, match="patients was 'none'"):
        import_folder(tmp_path, patients="none")


def test_a_csv_with_names_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": "id,who,file,text,age\n1,p,a.png,Clear.,60\n2,p,/x/b.png,,61\n"})
    names = {"study_id": "id", "patient_id": "who", "frontal": "file", "report": "text"}
    imported = import_csv(tmp_path / "t.csv", columns=names)
    one, two = imported.table.studies
    assert (one.frontal, two.frontal, two.report) == (tmp_path / "a.png", Path("/x/b.png"), None)
    assert one.licence is Licence.CREDENTIALED
    assert imported.notes == {"column 'age' is not a column of a table of studies and was left out": 2}
    public = import_csv(tmp_path / "t.csv", "/data", columns=names, licence="public").table.studies
    assert (public[0].licence, public[0].frontal) == (Licence.PUBLIC, Path("/data/a.png"))


def test_csv_refusals_name_the_closest_column(tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": "study_id,patient_id,picture\n1,p,a.png\n"})
    with pytest.raises(StudyError, match="Did you mean frontal"):
        import_csv(tmp_path / "t.csv", columns={"frontl": "picture"})
    with pytest.raises(StudyError, match="Did you mean picture"):
        import_csv(tmp_path / "t.csv", columns={"frontal": "pictur"})
    with pytest.raises(StudyError, match="lacks the columns"):
        import_csv(write(tmp_path, {"u.csv": "a,b\n1,2\n"}) / "u.csv")


def test_chexpert_layout_and_every_unused_file_with_a_true_reason(tmp_path: Path) -> None:
    files: dict[str, str | bytes | None] = {
        "patient00001/study1/view1_frontal.jpg": None,
        "patient00001/study1/view2_lateral.jpg": None,
        "patient00001/study1/view3_frontal.jpg": None,
        "patient00001/study1.txt": "Clear lungs.",
        "patient00001/study2/view1_lateral.jpg": None,
        "patient00002/study1/view1_frontal.jpg": None,
        "patient00002/study1/report.TXT": "Small effusion.",
        "x.PNG": None,
        "x_LATERAL.png": None,
        "x.TXT": "Large heart.",
        "w.webp": None,
        "w.txt": "Edema.",
        "plain": b"\x89PNG\r\n\x1a\n",
        "plain.txt": "No effusion.",
        "._x.png": None,
        ".cache/y.png": None,
        "__MACOSX/z.png": None,
        "lonely.txt": "Nothing here.",
        "notes.md": "no image",
        "q_prior.png": None,
    }
    imported = import_folder(write(tmp_path, files))
    studies = {study.study_id: study for study in imported.table.studies}
    assert set(studies) == {"patient00001/study1", "patient00002/study1", "x", "w", "plain"}
    first = studies["patient00001/study1"]
    assert (first.patient_id, first.report) == ("patient00001", "Clear lungs.")
    assert (Path(str(first.frontal)).name, Path(str(first.lateral)).name) == (
        "view1_frontal.jpg",
        "view2_lateral.jpg",
    )
    assert (studies["x"].report, studies["x"].lateral) == ("Large heart.", tmp_path / "x_LATERAL.png")
    assert dict(imported.skipped) == {
        "patient00001/study2": SkipReason.NO_FRONTAL,
        "q": SkipReason.NO_FRONTAL,
    }
    assert dict(imported.unused) == {
        "patient00001/study1/view3_frontal.jpg": "another frontal image of a study",
        "patient00001/study2/view1_lateral.jpg": "lateral image without a frontal one of its study",
        "q_prior.png": "prior image without an image of its study",
        "._x.png": "hidden file",
        ".cache/y.png": "hidden file",
        "__MACOSX/z.png": "hidden file",
        "lonely.txt": "report without an image of its name",
        "notes.md": "neither an image nor a .txt report",
    }


def test_a_licence_is_never_loosened_except_word_by_word(tmp_path: Path) -> None:
    rows = ["a,p,credentialed", "b,p,public", "c,p,", "d,p,Credentailed", "e,p,credentialed"]
    path = write(tmp_path, {"t.csv": "study_id,patient_id,licence\n" + "\n".join(rows) + "\n"}) / "t.csv"
    with pytest.raises(
        StudyError, match=r"loosen the licence of 4 of 5 rows .*2 'credentialed', 1 blank, 1 'Credentailed'"
    ):
        import_csv(path, licence="public")
    strict = import_csv(path, licence="credentialed")
    assert set(strict.table.frame["licence"]) == {"credentialed"}
    assert strict.notes == {"licence made stricter: credentialed": 2}
    with pytest.raises(StudyError, match="Credentailed"):
        import_csv(path)
    fixed = import_csv(path, relicense={"Credentailed": "credentialed"})
    assert fixed.table.frame["licence"].tolist() == ["credentialed", "public"] + ["credentialed"] * 3
    assert fixed.notes == {
        "licence changed from 'Credentailed' to credentialed": 1,
        "licence blank, taken as credentialed": 1,
    }
    with pytest.raises(StudyError, match=r"No row of .* has the licence 'mine'"):
        import_csv(path, relicense={"mine": "public"})


def test_whole_reports_in_a_column_are_named_and_cut_on_demand(tmp_path: Path) -> None:
    report = '"INDICATION: Cough.\n\nFINDINGS: Clear.\n\nIMPRESSION: Normal."'
    text = f"study_id,patient_id,indication,report\n1,p,,{report}\n2,p,Pain,The heart: normal.\n"
    path = write(tmp_path, {"t.csv": text}) / "t.csv"
    (note,) = import_csv(path).notes.items()
    assert note == ("report with section headers, kept whole (--cut-reports true cuts it into sections)", 1)
    cut = import_csv(path, cut_reports=True)
    first, second = cut.table.studies
    assert (first.indication, first.report) == ("Cough.", "Clear.")
    assert (second.indication, second.report) == ("Pain", "The heart: normal.")

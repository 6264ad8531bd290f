"""A user's own studies: a folder of images and texts, a CSV with names of its own."""

from pathlib import Path

import pytest

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies import Licence
from sae_lens_maira.studies.readers.folder import import_csv, import_folder
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
        "b/stray_lateral": SkipReason.NO_FRONTAL,
    }


def test_images_without_reports_are_kept_on_demand_and_folders_can_be_patients(tmp_path: Path) -> None:
    imported = import_folder(write(tmp_path, FILES), licence="public", patients="folder", need_reports=False)
    assert imported.table.frame["patient_id"].tolist() == ["a"] * 2 + ["b"] * 5
    assert imported.table.counts()["report"] == 2
    assert imported.table.counts()["licence"] == {"public": 7}
    assert imported.notes["kept without a report: report is no UTF-8 text"] == 1
    assert [entry.study_id for entry in imported.skipped] == ["b/stray_lateral"]


def test_folder_refusals(tmp_path: Path) -> None:
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
    assert imported.notes == {"column 'age' is none of ours and was left out": 2}
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

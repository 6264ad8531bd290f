"""Validation: each thing that can be wrong with a table is found, with its rows, and nothing else is."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sae_lens_maira.errors import StudyError
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.studies import StudyTable, read_table, table_of_studies
from sae_lens_maira.studies.image_files import look_at
from sae_lens_maira.studies.issues import IssueKind
from sae_lens_maira.studies.readers.mimic import import_mimic
from sae_lens_maira.studies.validate import validate_table, wrong_encoding

pytestmark = pytest.mark.compat


@pytest.fixture
def rows(tmp_path):
    """Four sound studies of two patients; the second is the first's later study."""
    rng = np.random.default_rng(0)
    for name in "abcdef":
        Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(tmp_path / f"{name}.png")
    shared = {"licence": "public", "report": "The lungs are clear."}
    times = ("2180-05-06T08:05:56.875", "2180-05-06T12:00:00", "2180-05-07", None)
    return [
        shared
        | {"study_id": f"s{i}", "patient_id": f"p{i // 2}", "frontal": f"{name}.png", "taken": time}
        | {"split": "test" if i // 2 else "train"}
        | ({"prior_study_id": "s0", "prior_frontal": "a.png", "prior_taken": times[0]} if i == 1 else {})
        for i, (name, time) in enumerate(zip("abcd", times, strict=True))
    ]


def issues(rows, root, **words):
    report = validate_table(StudyTable.from_rows(rows, root), progress=False, workers=2, **words)
    return [(issue.kind, issue.rows) for issue in report.issues]


def test_a_sound_table_has_no_fault(rows, tmp_path) -> None:
    report = validate_table(StudyTable.from_rows(rows, tmp_path), progress=False)
    assert (report.issues, report.exit_code, report.studies, report.images) == ((), 0, 4, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({2: {"frontal": "absent.png"}}, (IssueKind.MISSING_IMAGE, (2,))),
        ({1: {"lateral": "sub/absent.png"}}, (IssueKind.MISSING_IMAGE, (1,))),
        ({3: {"lateral": "a.png"}}, (IssueKind.FOREIGN_IMAGE, (0, 3))),
        ({3: {"lateral": "d.png"}}, (IssueKind.FOREIGN_IMAGE, (3,))),
        ({2: {"prior_frontal": "a.png"}}, (IssueKind.FOREIGN_IMAGE, (2, 0))),
        ({1: {"prior_frontal": "b.png"}}, (IssueKind.FOREIGN_IMAGE, (1,))),
        ({3: {"study_id": "s0"}}, (IssueKind.DUPLICATE_ID, (0, 3))),
        ({3: {"split": "train"}}, (IssueKind.TWO_SPLITS, (2, 3))),
        ({1: {"report": "Aorta is dÃ©roulÃ©e."}}, (IssueKind.ENCODING, (1,))),
        ({2: {"indication": "65 \ufffd old"}}, (IssueKind.ENCODING, (2,))),
        ({0: {"report": "C\x00l\x00"}}, (IssueKind.ENCODING, (0,))),
        ({0: {"report": " ___ .\n"}}, (IssueKind.EMPTY_REPORT, (0,))),
        ({0: {"report": None}}, (IssueKind.EMPTY_REPORT, (0,))),
        ({1: {"prior_taken": "2180-05-06T12:00:00.000"}}, (IssueKind.PRIOR_ORDER, (1,))),
        ({1: {"prior_taken": "2181-05-06"}}, (IssueKind.PRIOR_ORDER, (1,))),
        ({0: {"prior_study_id": "s1"}}, (IssueKind.PRIOR_ORDER, (0, 1))),
        ({3: {"prior_study_id": "s3"}}, (IssueKind.PRIOR_ORDER, (3,))),
        ({3: {"prior_study_id": "s0"}}, (IssueKind.FOREIGN_PRIOR, (3, 0))),
        ({2: {"taken": "yesterday"}}, (IssueKind.BAD_TIME, (2,))),
        ({2: {"truth": '[{"name": "Big"}]'}}, (IssueKind.BAD_RECORD, (2,))),
        ({1: {"frontal": None}, 2: {"frontal": None}}, (IssueKind.NO_FRONTAL, (1, 2))),
        ({2: {"licence": "credentialed"}}, (IssueKind.MIXED_LICENCES, (2,))),
    ],
)
def test_each_fault_is_found_with_its_rows_and_alone(rows, tmp_path, changes, expected) -> None:
    for row, change in changes.items():
        rows[row] |= change
    assert issues(rows, tmp_path) == [expected]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"report": "nan"}, "PLACEHOLDER"),
        ({"report": "None."}, "PLACEHOLDER"),
        ({"indication": "NaN"}, "PLACEHOLDER"),
        ({"technique": "null"}, "PLACEHOLDER"),
        ({"comparison": "<NA>"}, "PLACEHOLDER"),
        *(
            ({"report": f"The heart {token} is normal."}, "SPECIAL_TOKEN")
            for token in (
                "<unk>",
                "<s>",
                "</s>",
                "<image>",
                "<box>",
                "<obj>",
                "<lat_image>",
                "<0x0A>",
                "<x17>",
            )
        ),
        ({"report": "No effusion. " * 2000}, "LONG_TEXT"),
        ({"report": "x" * 200_000}, "LONG_TEXT"),
        ({"indication": "x" * 1000}, "LONG_TEXT"),
    ],
)
def test_texts_that_no_one_wrote_for_a_reader(rows, tmp_path, change, kind) -> None:
    rows[1] |= change
    assert issues(rows, tmp_path) == [(IssueKind[kind], (1,))]


def test_texts_that_are_meant_are_not_placeholders(rows, tmp_path) -> None:
    rows[1] |= {"comparison": "None.", "indication": "Nan Smith, <3 months of cough, null findings before"}
    assert issues(rows, tmp_path) == []


def test_decoding_is_bounded_by_memory(tmp_path) -> None:
    """Eight threads and a budget of two images: never more than two are decoded at one time."""
    paths = [tmp_path / f"{number}.png" for number in range(24)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number + 1]) * (number + 1))
    lock, now, most = threading.Lock(), [0], [0]

    def read(path: Path) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.003)
        with lock:
            now[0] -= 1

    options = {"read_image": read, "workers": 8, "progress": False}
    seen = look_at(paths, **options, open_image=lambda path: 500, decode_bytes=1000)
    assert most[0] == 2
    assert not seen.unreadable
    most[0] = 0
    look_at(paths, **options, open_image=lambda path: 5000, decode_bytes=1000)
    assert most[0] == 1


def test_damaged_files_are_found_at_the_depth_that_can_see_them(rows, tmp_path) -> None:
    """A file cut short opens well, so only decoding finds it."""
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").write_text("no image")
    (tmp_path / "d.png").write_bytes(b"")
    bad = IssueKind.UNREADABLE_IMAGE
    assert issues(rows, tmp_path) == [(bad, (0,)), (bad, (1,)), (bad, (2,)), (bad, (3,))]
    assert issues(rows, tmp_path, images="open") == [(bad, (2,)), (bad, (3,))]
    assert issues(rows, tmp_path, images="exist") == [(bad, (3,))]
    assert issues(rows, tmp_path, images="none") == []
    with pytest.raises(StudyError, match="'all'"):
        issues(rows, tmp_path, images="all")


def test_the_reader_that_is_given_decides_what_can_be_read(rows, tmp_path) -> None:
    def read(path: Path) -> None:
        if path.name == "d.png":
            raise ValueError("no contrast")

    (tmp_path / "c.png").write_text("not an image to Pillow")
    report = validate_table(StudyTable.from_rows(rows, tmp_path), read_image=read, progress=False)
    (issue,) = report.errors
    assert str(issue) == "error: unreadable image: row 3: frontal d.png: ValueError: no contrast"
    assert report.exit_code == 2


def test_a_copy_of_another_studys_image_is_found_by_its_content(rows, tmp_path) -> None:
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes())
    report = validate_table(StudyTable.from_rows(rows, tmp_path), progress=False)
    (issue,) = report.issues
    assert (issue.kind, issue.rows) == (IssueKind.FOREIGN_IMAGE, (0, 3))
    assert "a.png and d.png hold the same image" in issue.detail
    # The same size and the same last 64 KiB are not yet the same file.
    for name, first in (("c", b"1"), ("d", b"2")):
        (tmp_path / f"{name}.png").write_bytes(first + b"x" * 100_000)
    assert issues(rows, tmp_path, read_image=lambda path: None) == []


def test_absolute_paths_are_warnings(rows, tmp_path) -> None:
    rows[2]["frontal"] = str(tmp_path / "c.png")
    report = validate_table(StudyTable.from_rows(rows, tmp_path), progress=False)
    assert report.counts() == {IssueKind.ABSOLUTE_PATH: 1}
    assert report.exit_code == 0


def test_a_table_without_any_report_has_one_fault(rows, tmp_path) -> None:
    assert issues([row | {"report": None} for row in rows], tmp_path) == [
        (IssueKind.EMPTY_REPORT, (0, 1, 2, 3))
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Clear.\nNo effusion.\t",
        "d\u00e9roul\u00e9e, 37\u00b0C \u2265 3\u00bd cm",
        "\u201cABR\u00c9G\u00c9\u201d",
        "\u80f8\u90e8 X \u7dda",
        "gro\u00dfe M\u00fcdigkeit",
    ],
)
def test_sound_text_in_any_language_is_no_wrong_encoding(text: str) -> None:
    assert wrong_encoding(text) is None


@pytest.mark.parametrize("text", ["patient\u2019s", "d\u00e9j\u00e0", "\u2265 3 cm", "37\u00b0C"])
@pytest.mark.parametrize("codec", ["cp1252", "latin-1"])
def test_utf8_read_as_another_encoding_is_found(text: str, codec: str) -> None:
    """Also next to text that is right."""
    assert wrong_encoding("caf\u00e9: " + text.encode().decode(codec))


def test_bytes_that_are_no_utf8_are_found_with_their_rows(tmp_path) -> None:
    lines = ["study_id,patient_id,report", "1,p,fine", "2,q,d\xe9j\xe0 vu", "3,r,\xb0", ""]
    (tmp_path / "t.csv").write_bytes("\n".join(lines).encode("latin-1"))
    table = read_table(tmp_path / "t.csv", errors="replace")
    report = validate_table(table, images="none")
    assert [issue.rows for issue in report.issues if issue.kind is IssueKind.ENCODING] == [(1,), (2,)]


def test_imported_trees_are_sound_and_exchanged_folders_are_found(tmp_path, mimic_tree) -> None:
    """MIMIC-CXR's layout names ids in its paths: an image of another study is found though each file is used once."""
    table = import_mimic(mimic_tree(tmp_path / "m"), progress=False).table
    assert validate_table(table, progress=False).issues == ()
    frame = table.frame.copy()
    one, two = frame.index[frame["study_id"].isin(["57966011", "59999999"])]
    frame.loc[[one, two], "frontal"] = frame.loc[[two, one], "frontal"].to_numpy()
    report = validate_table(StudyTable.from_frame(frame, table.root), progress=False)
    assert [(issue.kind, issue.rows) for issue in report.issues] == [
        (IssueKind.FOREIGN_IMAGE, (one,)),
        (IssueKind.FOREIGN_IMAGE, (two,)),
    ]


def test_phantom_tables_are_sound(tmp_path) -> None:
    table = table_of_studies(generate_studies(8, seed=2, size=48), tmp_path)
    assert validate_table(table, progress=False).issues == ()

"""Study tables: round trip, another root, records on access, CSV, phantom PNGs, refusals with their row."""

import copy
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sae_lens_maira.errors import StudyError
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.studies import Licence, StudyTable, read_table, table_of_studies
from sae_lens_maira.studies.table import COLUMNS

pytestmark = pytest.mark.compat

ROW: dict[str, str | None] = {"study_id": "s", "patient_id": "p", "licence": "public", "frontal": "a/b.png"}


def test_phantom_studies_survive_a_table_on_another_root(tmp_path: Path) -> None:
    studies = generate_studies(6, seed=3, size=32)
    saved = table_of_studies(studies, tmp_path / "one").save(tmp_path / "one" / "studies.parquet")
    (tmp_path / "one").rename(tmp_path / "two")
    table = StudyTable.open(tmp_path / "two" / saved.name)
    for old, new in zip(studies, table.studies, strict=True):
        assert (new.study_id, new.report, new.truth, new.licence) == (
            old.study_id,
            old.report,
            old.truth,
            old.licence,
        )
        assert isinstance(new.frontal, Path)
        np.testing.assert_array_equal(np.asarray(Image.open(new.frontal)), old.frontal)
    assert table.counts()["studies"] == 6


def test_the_root_is_not_in_the_file(tmp_path: Path) -> None:
    StudyTable.from_rows([ROW], tmp_path).save(tmp_path / "t.parquet")
    (study,) = StudyTable.open(tmp_path / "t.parquet", "/elsewhere").studies
    assert study.frontal == Path("/elsewhere/a/b.png")
    assert study.report is None


def test_an_absolute_image_path_is_taken_as_it_is() -> None:
    (study,) = StudyTable.from_rows([ROW | {"frontal": "/data/x.png"}], "/elsewhere").studies
    assert study.frontal == Path("/data/x.png")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"frontal": "../x.png"}, "below the root"),
        ({"frontal": "a/../../x.png"}, "below the root"),
        ({"lateral": "a\\x.png"}, "forward slashes"),
        ({"licence": "mine"}, "licence"),
        ({"patient_id": ""}, "an id in every row"),
        ({"report": 3.5}, "expected text"),
    ],
)
def test_bad_values_are_refused_with_their_row(change: dict[str, object], word: str) -> None:
    with pytest.raises(StudyError, match=word) as printed:
        StudyTable.from_rows([ROW, ROW | change], ".")  # pyright: ignore[reportArgumentType]: the point
    assert "Row 1" in str(printed.value)


def test_dots_inside_a_name_are_no_way_up() -> None:
    assert len(StudyTable.from_rows([ROW | {"frontal": "a..b/x..png"}], ".")) == 1


def test_ids_that_were_read_as_numbers_become_text() -> None:
    frame = pd.DataFrame({"study_id": [50414267], "patient_id": [10000032], "licence": ["credentialed"]})
    (row,) = StudyTable.from_frame(frame, ".").rows()
    assert (row["study_id"], row["patient_id"]) == ("50414267", "10000032")


def test_unknown_columns_and_other_files_are_refused(tmp_path: Path) -> None:
    pd.DataFrame([ROW | {"colour": "red"}]).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(StudyError, match="colour"):
        StudyTable.open(tmp_path / "t.parquet")
    (tmp_path / "no.parquet").write_bytes(b"nothing")
    with pytest.raises(StudyError, match="could not be read"):
        read_table(tmp_path / "no.parquet")
    (tmp_path / "no.xlsx").touch()
    with pytest.raises(StudyError, match=r"parquet or \.csv"):
        read_table(tmp_path / "no.xlsx")
    with pytest.raises(StudyError, match="There is no table"):
        read_table(tmp_path / "absent.csv")


def test_a_csv_is_a_table_too_and_credentialed_unless_it_says_otherwise(tmp_path: Path) -> None:
    text = '\ufeffstudy_id,patient_id,frontal,report\n007,p,a.png,"None, clear.\nOtherwise NA"\n8,q,/b.png,NA\n9,r,,\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    one, two, three = read_table(tmp_path / "t.csv", "/data").studies
    assert (one.study_id, one.report, one.frontal) == (
        "007",
        "None, clear.\nOtherwise NA",
        Path("/data/a.png"),
    )
    assert (two.report, two.frontal) == ("NA", Path("/b.png"))
    assert (three.report, three.frontal) == (None, None)
    assert one.licence is Licence.CREDENTIALED
    (tmp_path / "latin.csv").write_bytes(
        "study_id,patient_id,report\n1,p,ok\n2,q,d\xe9j\xe0\n".encode("latin-1")
    )
    with pytest.raises(StudyError, match=r"Line 3 .*UTF-8"):
        read_table(tmp_path / "latin.csv")


def test_where_keeps_the_rows_of_a_split() -> None:
    rows = [ROW | {"study_id": str(i), "split": split} for i, split in enumerate(("train", None, "test"))]
    table = StudyTable.from_rows(rows, ".")
    assert [study.study_id for study in table.where(split="test").studies] == ["2"]
    assert table.counts()["split"] == {"train": 1, "none": 1, "test": 1}
    with pytest.raises(StudyError, match="no column 'colour'"):
        table.where(colour="red")


def test_studies_is_a_sequence_that_builds_records_on_access() -> None:
    """227,835 rows: opening the sequence and a slice of it makes no record; indexing makes one."""
    n = 227_835
    ids = np.arange(n).astype(str)
    frame = pd.DataFrame({"study_id": ids, "patient_id": ids, "licence": "credentialed"})
    frame["frontal"] = "files/" + frame["study_id"] + ".jpg"
    table = StudyTable.from_frame(frame, "/data")
    tracemalloc.start()
    studies = table.studies
    part = studies[100:200_000:2]
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < 4e6  # row numbers alone: 8 bytes each
    assert isinstance(studies, Sequence)
    assert (len(studies), len(part)) == (n, 99_950)
    assert part[3].study_id == "106"
    assert part[-1].study_id == "199998"
    assert studies[-1].frontal == Path(f"/data/files/{n - 1}.jpg")
    with pytest.raises(IndexError):
        studies[n]
    assert sys.getsizeof(part) < 1000
    assert copy.deepcopy(part[:2])[1].study_id == "102"


def test_a_truth_that_cannot_be_read_names_its_row() -> None:
    table = StudyTable.from_rows(
        [ROW, ROW | {"truth": "{}"}, ROW | {"truth": "[1]"}, ROW | {"truth": "["}], "."
    )
    assert table.studies[0].truth is None
    for row in (1, 2, 3):
        with pytest.raises(StudyError, match=f"Row {row} "):
            _ = table.studies[row]


def test_every_column_survives_saving(tmp_path: Path) -> None:
    row = {name: f"{name} ✓" for name in COLUMNS} | {"licence": "public", "truth": "[]"}
    StudyTable.from_rows([row, ROW], tmp_path).save(tmp_path / "t.parquet")
    first, second = read_table(tmp_path / "t.parquet").rows()
    assert first == row
    assert second == dict.fromkeys(COLUMNS) | ROW

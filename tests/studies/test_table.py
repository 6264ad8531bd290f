"""Study tables: round trip, another root, phantom PNGs, refusals."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sae_lens_maira.errors import StudyError
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.studies.table import StudyTable, table_of_studies

ROW: dict[str, str | None] = {"study_id": "s", "patient_id": "p", "licence": "public", "frontal": "a/b.png"}


def test_phantom_studies_survive_a_table_on_another_root(tmp_path: Path) -> None:
    studies = generate_studies(6, seed=3, size=32)
    saved = table_of_studies(studies, tmp_path / "one").save(tmp_path / "one" / "studies.parquet")
    (tmp_path / "one").rename(tmp_path / "two")
    table = StudyTable.open(tmp_path / "two" / saved.name)
    for old, new in zip(studies, table.to_studies(), strict=True):
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
    study = next(StudyTable.open(tmp_path / "t.parquet", "/elsewhere").to_studies())
    assert study.frontal == Path("/elsewhere/a/b.png")
    assert study.report is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"frontal": "/abs.png"}, "relative"),
        ({"frontal": "../x.png"}, "relative"),
        ({"licence": "mine"}, "licence"),
    ],
)
def test_bad_values_are_refused_with_their_row(change: dict[str, str], word: str) -> None:
    with pytest.raises(StudyError, match=word) as told:
        StudyTable.from_rows([ROW, ROW | change], ".")
    assert "Row 1" in str(told.value)


def test_unknown_columns_and_other_files_are_refused(tmp_path: Path) -> None:
    pd.DataFrame([ROW | {"colour": "red"}]).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(StudyError, match="colour"):
        StudyTable.open(tmp_path / "t.parquet")
    (tmp_path / "no.parquet").write_bytes(b"nothing")
    with pytest.raises(StudyError, match="could not be read"):
        StudyTable.open(tmp_path / "no.parquet")

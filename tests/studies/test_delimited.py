"""Delimited files are read exactly as written, or refused with the line."""

import gzip
from pathlib import Path

import pytest

from sae_lens_maira.cli import main
from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies import read_table
from sae_lens_maira.studies.delimited import csv_frame

pytestmark = pytest.mark.compat

HEADER = ("study_id", "patient_id", "frontal", "report")
ROWS = [("7", "p", "a.png", "Clear, no effusion; normal.\nSecond\tline."), ("8", "q", "b.png", "NA")]


def written(path: Path, separator: str = ",", encoding: str = "utf-8", end: str = "\n") -> Path:
    quoted = [separator.join(f'"{cell}"' for cell in row) for row in (HEADER, *ROWS)]
    path.write_bytes((end.join(quoted) + end).encode(encoding))
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separator_and_encoding_are_read_from_the_file(
    tmp_path: Path, separator: str, encoding: str, end: str
) -> None:
    frame = read_table(written(tmp_path / "t.csv", separator, encoding, end)).frame
    assert [tuple(row) for row in frame[list(HEADER)].to_numpy()] == ROWS


def test_compressed_files_empty_lines_and_empty_cells(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"\na,b\n\n1,\n,2\n\n"))
    assert csv_frame(tmp_path / "t.csv.gz").to_dict("list") == {"a": ["1", ""], "b": ["", "2"]}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("study_id,patient_id,report\n1,p,Clear, no effusion\n", 2, "comma inside a text that is not quoted"),
        ("study_id,patient_id,report\n1,p,Clear\n\n2,q,Clear, normal, small\n", 4, "5 cells"),
        ('study_id,patient_id,report\n1,p,"a\nb"\n2,q,x,y\n', 4, "4 cells"),
        ("study_id,patient_id,report\n1,p\n", 2, "a line that was cut"),
        ("study_id;patient_id;report\n1;p;a;b\n", 2, "separated by a semicolon"),
        ('study_id,patient_id,report\n1,p,ok\n2,q,"never closed\n3,r,x\n', 3, "must end with a quote"),
        ('study_id,patient_id,report\n1,p,"he said \\"no\\" effusion"\n', 2, "written twice"),
        ("study_id,patient_id,study_id\n1,p,2\n", 0, "'study_id' 2 times"),
        ("\n\n", 0, "is empty"),
        ("", 0, "is empty"),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_their_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(StudyError, match=message) as refused:
        read_table(tmp_path / "t.csv")
    assert f"Line {line} " in str(refused.value) or not line


def test_utf16_without_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        with pytest.raises(StudyError, match="UTF-16 without a byte order mark"):
            read_table(written(tmp_path / "t.csv", encoding=encoding))


def test_cells_of_any_length_and_the_limit_is_put_back(tmp_path: Path) -> None:
    import csv

    limit = csv.field_size_limit()
    (tmp_path / "t.csv").write_text(f"a,b\n1,{'x' * 300_000}\n")
    assert len(csv_frame(tmp_path / "t.csv")["b"][0]) == 300_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    "words",
    [
        ["studies", "show", "--table"],
        ["studies", "validate", "--table"],
        ["studies", "import", "--source", "csv", "--out", "out.parquet", "--table"],
        ["harvest", "--hooks", "blocks.1.hook_resid_post", "--store", "s", "--table"],
    ],
)
def test_commands_refuse_a_shifted_row(tmp_path, monkeypatch, capsys, words) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("study_id,patient_id,frontal,report\n7,p,a.png,Clear, no effusion\n")
    assert main([*words, "t.csv"]) == 2
    error = capsys.readouterr().err
    assert "Line 2 of the table t.csv has 5 cells where the header names 4 columns" in error

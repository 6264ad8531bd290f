"""`studies import|show|validate` as a user types them: one table from any source, usable by `harvest` after a move."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sae_lens_maira.activations import ActivationStore
from sae_lens_maira.cli import main
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.studies import read_table

REPORT = "INDICATION: Cough.\n\nFINDINGS: There is a small left pleural effusion.\n\nIMPRESSION: Effusion.\n"


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main(["studies", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def phantom_folder(tmp_path_factory) -> Path:
    """Eight phantom studies, imported and then moved to where they were not made."""
    made = tmp_path_factory.mktemp("made") / "phantom"
    words = ["--source", "phantom", "--studies", "8", "--split", "train", "--out", str(made / "t.parquet")]
    assert main(["studies", "import", *words]) == 0
    return made.rename(tmp_path_factory.mktemp("moved") / "phantom")


def test_phantom_table_keeps_images_reports_and_truth(phantom_folder) -> None:
    made = read_table(phantom_folder / "t.parquet").studies
    for study, direct in zip(made, generate_studies(8, seed=0), strict=True):
        assert (study.study_id, study.report, study.truth) == (direct.study_id, direct.report, direct.truth)
        np.testing.assert_array_equal(np.asarray(Image.open(study.frontal)), direct.frontal)  # pyright: ignore
    assert {study.split for study in made} == {"train"}


def test_a_moved_phantom_table_gives_the_rows_of_the_phantom_itself(phantom_folder, tmp_path) -> None:
    """`harvest --table` and `harvest` without a table: the same rows, bit for bit."""
    words = ["--hooks", "[blocks.1.hook_resid_post]", "--shard_studies", "4"]
    for name, source in (
        ("table", ["--table", str(phantom_folder / "t.parquet")]),
        ("direct", ["--studies", "8"]),
    ):
        assert main(["harvest", *words, *source, "--store", str(tmp_path / name)]) == 0
    one, two = ActivationStore(tmp_path / "table"), ActivationStore(tmp_path / "direct")
    assert one.study_ids == two.study_ids
    assert len(one) == len(two) > 0
    for shard in (0, 1):
        first, second = (
            sorted((tmp_path / "table").rglob("*.safetensors")),
            sorted((tmp_path / "direct").rglob("*.safetensors")),
        )
        assert first[shard].read_bytes() == second[shard].read_bytes()


def test_show_counts_and_one_study(phantom_folder, capsys, tmp_path) -> None:
    table = phantom_folder / "t.parquet"
    printed = answer(capsys, "show", "--table", table, "--labels", "5")
    assert (printed["studies"], printed["truth"], printed["split"], printed["licence"]) == (
        8,
        8,
        {"train": 8},
        {"synthetic": 8},
    )
    labels = printed["rule_labels"]
    assert labels["n"] == 5
    assert (
        sum(
            sum(count[s] for s in ("present", "uncertain", "absent"))
            for name, count in labels.items()
            if name not in ("n", "unknown")
        )
        > 5
    )
    assert 0 <= labels["edema"]["low"] <= labels["edema"]["present"] / 5 <= labels["edema"]["high"] <= 1
    assert main(["studies", "show", "--table", str(table), "--figure", str(tmp_path / "all.png")]) == 0
    text = capsys.readouterr().out
    assert "8 studies of" in text
    assert "pleural_effusion" in text
    one = answer(capsys, "show", "--table", table, "--study", "phantom-0-3", "--figure", tmp_path / "one.png")
    assert one["rule_labels"]["edema"] == {
        "status": "present",
        "evidence": "Perihilar pulmonary edema is present",
    }
    for name in ("all", "one"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 20  # something is drawn
    assert main(["studies", "show", "--table", str(table), "--study", "nobody"]) == 2
    assert "phantom-0-0" in capsys.readouterr().err


def test_validate_exits_by_what_it_finds(phantom_folder, capsys, tmp_path) -> None:
    table = phantom_folder / "t.parquet"
    printed = answer(capsys, "validate", "--table", table)
    assert (printed["studies"], printed["counts"], printed["issues"]) == (8, {}, [])
    frame = pd.read_parquet(table)
    frame.loc[5, "study_id"] = frame.loc[2, "study_id"]
    frame.loc[6, "frontal"] = "images/none.png"
    frame.loc[7, "report"] = "d\u00c3\u00a9roul\u00c3\u00a9e"
    frame.to_parquet(tmp_path / "bad.parquet")
    Image.new("L", (9, 9), 7).save(tmp_path / "flat.png")
    words = ["--table", str(tmp_path / "bad.parquet"), "--root", str(phantom_folder)]
    assert main(["studies", "validate", *words, "--out", str(tmp_path / "issues.csv")]) == 2
    out, err = capsys.readouterr()
    assert [line.split(": ")[1:3] for line in out.splitlines()[:3]] == [
        ["duplicate id", "row 2, 5"],
        ["missing image", "row 6"],
        ["text in the wrong encoding", "row 7"],
    ]
    assert "3 errors" in err
    assert pd.read_csv(tmp_path / "issues.csv")["rows"].tolist() == ["[2, 5]", "[6]", "[7]"]


def test_an_image_the_model_could_not_read_is_unreadable(tmp_path, capsys) -> None:
    """A constant image decodes, but the model's contrast stretch refuses it; so does validate."""
    Image.new("L", (9, 9), 7).save(tmp_path / "flat.png")
    (tmp_path / "flat.txt").write_text(REPORT)
    words = ["--source", "folder", "--images", str(tmp_path), "--out", str(tmp_path / "t.parquet")]
    assert main(["studies", "import", *words]) == 0
    assert main(["studies", "validate", "--table", str(tmp_path / "t.parquet")]) == 2
    assert "unreadable image: row 0" in capsys.readouterr().out


def test_validate_reads_dicom_at_every_depth(tmp_path, capsys) -> None:
    data = pytest.importorskip("pydicom.data")
    source = Path(data.get_testdata_file("CT_small.dcm", download=False))
    (tmp_path / "a.dcm").write_bytes(source.read_bytes())
    (tmp_path / "b.dcm").write_text("FINDINGS: no image")
    rows = [
        {
            "study_id": name,
            "patient_id": name,
            "licence": "public",
            "frontal": f"{name}.dcm",
            "report": "Clear.",
        }
        for name in "ab"
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    for depth in ("open", "decode"):
        words = ["--table", str(tmp_path / "t.csv"), "--images", depth]
        assert main(["studies", "validate", *words]) == 2
        out = capsys.readouterr().out
        assert "row 1" in out
        assert "is a text file, not DICOM" in out
        assert "row 0" not in out


def test_import_of_a_folder_and_of_a_csv(tmp_path, capsys) -> None:
    for name in ("a", "b", "c"):
        Image.fromarray(np.eye(16, dtype=np.uint8) * 200).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text(REPORT)
    (tmp_path / "b.txt").write_text("IMPRESSION: Effusion.\n")
    out = tmp_path / "out" / "t.parquet"
    printed = answer(
        capsys, "import", "--source", "folder", "--images", tmp_path, "--out", out, "--licence", "public"
    )
    assert (printed["studies"], printed["licence"]) == (1, {"public": 1})
    assert printed["skipped"] == {"no report file": 1, "no findings section": 1}
    skipped = pd.read_csv(out.with_suffix(".skipped.csv"), dtype=str).dropna(subset="study_id")
    assert skipped["study_id"].tolist() == ["b", "c"]
    (tmp_path / "t.csv").write_text("study_id,patient_id,file,age\n1,p,a.png,60\n")
    words = ["--source", "csv", "--table", tmp_path / "t.csv", "--columns", "{frontal: file}", "--out", out]
    printed = answer(capsys, "import", *words)
    assert printed["notes"] == {"column 'age' is not a column of a table of studies and was left out": 1}
    assert read_table(out, tmp_path).studies[0].frontal == tmp_path / "a.png"
    assert main(["studies", "import", *map(str, words)]) == 0
    assert f"give --root {tmp_path}" in capsys.readouterr().out


def test_refusals_say_what_to_do(tmp_path, capsys) -> None:
    out = str(tmp_path / "t.parquet")
    for words, printed in (
        (["--source", "mimic", "--out", out], "needs images"),
        (["--source", "phantom", "--out", out, "--images", "x"], "does not read images"),
        (["--source", "phantom", "--out", "t.csv"], "ending in .parquet"),
        (["--source", "csv", "--table", "none.csv", "--out", out], "could not be read"),
    ):
        assert main(["studies", "import", *words]) == 2
        assert printed in capsys.readouterr().err
    Image.new("L", (9, 9), 7).save(tmp_path / "a.png")
    assert main(["studies", "import", "--source", "folder", "--images", str(tmp_path), "--out", out]) == 2
    assert "1 no report file" in capsys.readouterr().err
    assert not Path(out).exists()

"""Inputs made to harm: terminal escapes, formulas, absurdly deep or aliased files, custom code; one message each."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sae_lens_maira.activations import read_rows
from sae_lens_maira.cli import main, visible
from sae_lens_maira.errors import MairaError
from sae_lens_maira.io import csv_of
from sae_lens_maira.studies import Licence, Study

ESCAPES = "s\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"


@pytest.fixture
def hostile(tmp_path):
    Image.linear_gradient("L").save(tmp_path / "a.png")
    texts = {
        "plain": "Clear lungs.",
        ESCAPES: "Effusion \x1b[31m.",
        "=1+1": "=cmd|' /C calc'!A0",
        "i" * 220: "Clear lungs.",
        "../../escape": "Heart normal.",
    }
    rows = [
        {"study_id": name, "patient_id": name, "frontal": "a.png", "report": text, "licence": "public"}
        for name, text in texts.items()
    ]
    path = tmp_path / "table.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("as_json", [False, True])
def test_no_command_sends_control_characters_of_data_to_the_terminal(
    hostile, capsys, tmp_path, as_json
) -> None:
    flag = ["--json"] if as_json else []
    main(["studies", "validate", "--table", str(hostile), "--out", str(tmp_path / "v.csv"), *flag])
    main(["studies", "show", "--table", str(hostile), *flag])
    main(["studies", "show", "--table", str(hostile), "--study", ESCAPES])
    main(["studies", "show", "--table", str(hostile), "--study", f"no such {ESCAPES}"])
    printed = "".join(capsys.readouterr())
    assert "\\x1b[2J" in printed or "\\u001b[2J" in printed
    assert not re.search(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", printed)
    found = pd.read_csv(tmp_path / "v.csv")
    assert not found["detail"].str.match(r"[=+@\t\r-]").any()


def test_progress_bars_and_text_pass_through() -> None:
    assert (
        visible("\r 3%|\u2588 | \x1b[A\n\tdone \u00e9\u4e2d") == "\r 3%|\u2588 | \x1b[A\n\tdone \u00e9\u4e2d"
    )


def test_no_cell_of_a_table_is_a_formula() -> None:
    frame = pd.DataFrame(
        {"text": ["=1+1", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "plain", "-0.5"], "n": range(-4, 4)}
    )
    read = pd.read_csv(io.StringIO(csv_of(frame)))
    assert [cell[:1] for cell in read["text"].astype(str)] == ["'"] * 6 + ["p", "-"]
    assert read["n"].tolist() == list(range(-4, 4))


def test_ids_that_are_long_or_leave_the_folder_name_no_file_outside(hostile, tmp_path) -> None:
    """Ids become file names in one place, which keeps them in their folder and under the limit of file systems."""
    from sae_lens_maira.studies import table_of_studies

    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    ids = ["../../escape", "/etc/passwd", "i" * 300, "\u00e9" * 200, "..", "a/b", "a\\b", "nul\0"]
    before = set(tmp_path.rglob("*"))
    made = [
        Study(
            study_id=name,
            patient_id="p",
            licence=Licence.PUBLIC,
            frontal=Image.linear_gradient("L"),
            report="Clear.",
        )
        for name in ids
    ]
    table = table_of_studies(made, root)
    new = set(tmp_path.rglob("*")) - before
    assert all(root in file.parents for file in new)
    assert len({str(path) for path in table.frame["frontal"]}) == len(ids)
    assert all((root / path).is_file() for path in table.frame["frontal"])


def _config(kind: str) -> bytes:
    aliases = "".join(f"k{n}: &k{n} [{','.join([f'*k{n - 1}'] * 9)}]\n" for n in range(1, 9))
    return {
        "deep YAML": b"store: " + b"[" * 5000 + b"]" * 5000,
        "deep JSON": b"[" * 200_000 + b"]" * 200_000,
        "latin-1": "store: caf\u00e9".encode("latin-1"),
        "utf-16": "store: x".encode("utf-16"),
        "aliases": f"k0: &k0 [x]\n{aliases}".encode(),
        "binary": bytes(range(256)),
    }[kind]


@pytest.mark.parametrize("kind", ["deep YAML", "deep JSON", "latin-1", "utf-16", "aliases", "binary"])
def test_a_config_that_cannot_be_read_is_one_message(tmp_path, capsys, kind) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(_config(kind))
    assert main(["train", "--config", str(path)]) == 2
    printed = capsys.readouterr().err
    assert "config" in printed
    assert len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["store", "show", "--store"], "store.json"),
        (["interpret", "report", "--records"], "meta.json"),
        (["evaluate", "--table", "{table}", "--model", "phantom", "--sae"], "cfg.json"),
    ],
)
def test_a_json_file_of_absurd_depth_is_one_message(tmp_path, capsys, hostile, command, file) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / file).write_text("[" * 200_000 + "]" * 200_000)
    (folder / "sae_weights.safetensors").write_bytes(json.dumps({}).encode())
    words = [word.format(table=hostile) for word in command]
    assert main([*words, str(folder)]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert file in printed
    assert re.search("recursion|nested too deeply", printed)


CHOKES = {
    "token": {"report": "The heart <unk> is normal."},
    "image token": {"indication": "Cough <image> fever."},
    "grounding token": {"report": "A <box> here."},
    "thin": {"frontal": "thin.png"},
    "long": {"report": "No effusion. " * 2000},
    "beyond the context": {"report": "No effusion. " * 1000},
    "word": {"report": "x" * 200_000},
    "10 MB": {"report": "No effusion. " * 800_000},
    "surrogate": {"report": "Clear \ud800 lungs."},
}
"""Changes of one study that would stop or choke a harvest of all."""


def chokes(root) -> list[dict[str, str]]:
    """A row per change, named after it, between two sound studies."""
    Image.fromarray((np.arange(300_000) % 251).astype(np.uint8)[None]).save(root / "thin.png")
    rows = []
    for number, name in enumerate(("sound", *CHOKES, "also sound")):
        picture = np.random.default_rng(number).integers(0, 255, (128, 128), dtype=np.uint8)
        Image.fromarray(picture).save(root / f"{number}.png")
        sound = {"frontal": f"{number}.png", "report": "Clear lungs.", "licence": "public"}
        rows.append({"study_id": name, "patient_id": name} | sound | CHOKES.get(name, {}))
    return rows


@pytest.mark.parametrize("name", CHOKES)
def test_a_study_that_would_choke_the_model_is_named_before_it_runs(
    name, tmp_path, phantom, monkeypatch
) -> None:
    """By its id, before any forward."""
    row = next(row for row in chokes(tmp_path) if row["study_id"] == name)
    study = Study(
        study_id=name,
        patient_id="p",
        licence=Licence.PUBLIC,
        frontal=tmp_path / row["frontal"],
        indication=row.get("indication"),
        report=row["report"],
    )
    monkeypatch.setattr(type(phantom.model), "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(MairaError, match=name) as caught:
        read_rows(phantom, [study], "blocks.0.hook_resid_post", progress=False)
    assert len(str(caught.value)) < 500


def test_validate_finds_them_all_and_harvest_reads_what_is_left(tmp_path, capsys) -> None:
    """The report beyond the phantom's short context is within MAIRA-2's: only the model knows, and harvest says it."""
    rows = [row for row in chokes(tmp_path) if row["study_id"] not in ("surrogate", "beyond the context")]
    table, kept, store = tmp_path / "t.csv", tmp_path / "kept.parquet", tmp_path / "store"
    pd.DataFrame(rows).to_csv(table, index=False)
    assert main(["studies", "validate", "--table", str(table)]) == 2
    printed = capsys.readouterr().out
    assert all(f"row {number}:" in printed for number in range(1, len(rows) - 1))
    harvest = [
        "harvest",
        "--hooks",
        "blocks.0.hook_resid_post",
        "--device",
        "cpu",
        "--store",
        str(store),
        "--table",
    ]
    assert main([*harvest, str(table)]) == 2
    assert re.search(r"harvest: Study (image )?token: The \w+ contains '<\w+>'", capsys.readouterr().err)
    assert main(["studies", "validate", "--table", str(table), "--without-errors", str(kept)]) == 0
    assert f"2 of {len(rows)} studies; {len(rows) - 2} with errors left out" in capsys.readouterr().err
    assert main([*harvest, str(kept)]) == 0
    assert kept.stat().st_mode & 0o077 == 0

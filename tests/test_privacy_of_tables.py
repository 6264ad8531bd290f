"""Privacy of commands that read a table of studies: refused before a model is made, or their results hold no text."""

import json
from pathlib import Path

import pytest

from sae_lens_maira.cli import main

SECRET = "Zzyzxomegaly"
"""A word of the reports that no other file contains."""
TABLES = {
    "credentialed": "credentialed",
    "unknown": "unknown",
    "misspelt": "Public",
    "padded": "public ",
    "blank": "",
    "null": None,
    "no column": ...,
}


@pytest.fixture
def no_network(monkeypatch):
    """Every connection is an error."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)


def closed_table(folder: Path, licence: object) -> Path:
    """A table of two studies of a class, whose reports hold the secret word."""
    from sae_lens_maira.phantom import generate_studies
    from sae_lens_maira.studies import table_of_studies

    frame = table_of_studies(generate_studies(2, seed=9), folder).frame
    frame["report"] = frame["report"] + f" {SECRET}."
    frame = frame.drop(columns="licence") if licence is ... else frame.assign(licence=licence)
    frame.to_parquet(folder / "studies.parquet", index=False)
    return folder / "studies.parquet"


@pytest.mark.usefixtures("no_network", "no_weights")
@pytest.mark.parametrize("licence", TABLES)
def test_commands_that_read_a_table(licence, tmp_path, capsys):
    """Refused with exit code 2; no file is written and no word of a report is printed."""
    table = str(closed_table(tmp_path / "table", TABLES[licence]))
    classic = "dashboards saedashboard --sae phantom-image --set-name res-1k --studies 2 --latents 0-1"
    for words in (["attribute", "--sentences", "[0]"], classic.split()):
        assert main([*words, "--table", table, "--out", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err
        assert "Traceback" not in printed.err
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_network")
def test_numbers_hold_no_text(tmp_path, capsys):
    """Commands whose results are numbers: no file and no line holds a word of a credentialed report."""
    table = closed_table(tmp_path / "table", "credentialed")
    hook = "blocks.1.hook_resid_post"
    read = ["--hooks", hook, "--table", str(table), "--rates", "{image: 0.1}", "--device", "cpu"]
    steps = {"total_training_samples": 64, "train_batch_size_samples": 32, "lr": 0.001}
    rows = ["--table", str(table), "--studies", "2", "--device", "cpu"]
    sae, out = str(tmp_path / "sae"), tmp_path / "out"
    commands = [
        ["harvest", *read, "--store", str(tmp_path / "store")],
        [*["train", *read, "--store", str(tmp_path / "store"), "--out", sae, "--trainer", json.dumps(steps)],
         "--sae", "{d_sae: 32, k: 4, matryoshka_widths: [8, 32]}"],
        ["evaluate", "--sae", sae, *rows],
        ["match", "--sae", sae, "--other", sae, *rows, "--out", str(out / "match")],
        ["locate", "--sae", sae, *rows, "--out", str(out / "locate.csv")],
    ]  # fmt: skip
    for words in commands:
        assert main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    written = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(table.parent)]
    assert len(written) > 8
    assert [p for p in written if SECRET.encode() in p.read_bytes()] == []

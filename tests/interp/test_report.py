"""The commands, run as a user would, and what they write: figure, table, Neuronpedia rows, counts."""

import json

import pandas as pd
import pytest
from PIL import Image

from sae_lens_maira.cli.interpret import report_scores as report
from sae_lens_maira.cli.interpret import run
from sae_lens_maira.errors import ConfigError, RecordError
from sae_lens_maira.interp.records import load
from sae_lens_maira.interp.report import categories, summary, table, write_figure
from sae_lens_maira.interp.run import interpret_offline

KEYS = ("pleural_effusion_left", "pneumothorax_right", "pacemaker", "nodule")


def test_offline_run_and_report(hand_made, tmp_path, capsys):
    records, control = hand_made(KEYS), hand_made(KEYS[:2], name="untrained")
    run(records.folder)
    run(control.folder)
    assert "no LLM" in capsys.readouterr().out
    report(records.folder, tmp_path / "out", untrained=control.folder, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["categories"] == {
        "device": 1,
        "pathology": 3,
        "longitudinal change": 0,
        "textual": 0,
        "other": 0,
    }
    assert set(told["scores"]) == {"explanations", "untrained SAE"}
    truth = next(row for row in told["scores"]["explanations"] if row["judge"] == "truth")
    assert truth["balanced_accuracy"] == 1.0
    assert truth["control"] < 0.7
    assert Image.open(tmp_path / "out" / "scores.png").size[0] > 900
    assert len(pd.read_csv(tmp_path / "out" / "scores.csv")) == 8
    rows = [json.loads(line) for line in (tmp_path / "out" / "explanations.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["explanationModelName"] == "contrast (no LLM)"
    assert rows[0]["scores"]["detection/truth"]["ci"][0] < 1.0
    report(records.folder)
    assert "Left pleural effusion" in capsys.readouterr().out


def test_a_set_without_scores_has_no_figure(hand_made, tmp_path):
    records = hand_made(KEYS)
    with pytest.raises(RecordError, match="nothing to draw"):
        write_figure({"none": load(records.folder)}, tmp_path / "x.png")
    assert sum(categories([]).values()) == 0
    assert summary(table([])).empty


def test_table_puts_the_control_beside_the_score_of_the_same_judge(hand_made):
    done = interpret_offline(hand_made(KEYS))
    rows = table(done)
    for one in done:
        mine = rows[rows["latent"] == one.latent]
        assert list(mine["control"]) == [score.balanced_accuracy for score in one.control]


@pytest.mark.parametrize("options", [{"latents": "a"}, {"judge": "m", "usd_per_mtok": "1"}])
def test_options_that_cannot_be_read(hand_made, options):
    with pytest.raises(ConfigError):
        run(hand_made(KEYS).folder, **options)


def test_run_and_report_print_json_alone(hand_made, tmp_path, capsys):
    """With --json stdout is one value; `--set-name` gives the rows of the file the name of the source at its layer."""
    records = hand_made(KEYS)
    run(records.folder, as_json=True)
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["latents"] == len(records) == sum(told["statuses"].values())
    assert {row["method"] for row in told["scores"]} >= {"detection"}
    assert "nothing is sent" in said.err
    report(records.folder, tmp_path, set_name="res-1k", model_id="phantom", as_json=True)
    assert json.loads(capsys.readouterr().out)["statuses"] == told["statuses"]
    rows = [json.loads(line) for line in (tmp_path / "explanations.jsonl").read_text().splitlines()]
    assert {(row["modelId"], row["layer"]) for row in rows} == {("phantom", f"{records.meta.layer}-res-1k")}

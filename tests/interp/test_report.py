"""The commands, run as a user would, and what they write: figure, table, Neuronpedia rows, counts."""

import json
from dataclasses import replace

import pandas as pd
import pytest
from PIL import Image

from sae_lens_maira.cli.interpret import report_scores as report
from sae_lens_maira.cli.interpret import run
from sae_lens_maira.errors import ConfigError, RecordError
from sae_lens_maira.interp.records import categories, load, summary, table, write_figure
from sae_lens_maira.interp.run import interpret_offline
from sae_lens_maira.latents.records import FindingAgreement
from sae_lens_maira.latents.space import spatial_of_records
from sae_lens_maira.latents.writing import write_records

KEYS = ("pleural_effusion_left", "pneumothorax_right", "pacemaker", "nodule")


def test_offline_run_and_report(hand_made, tmp_path, capsys):
    records, control = hand_made(KEYS), hand_made(KEYS[:2], name="untrained")
    run(records.folder)
    run(control.folder)
    assert "no LLM" in capsys.readouterr().out
    report(records.folder, tmp_path / "out", untrained=control.folder, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["categories"] == {
        "device": 1,
        "pathology": 3,
        "longitudinal change": 0,
        "textual": 0,
        "other": 0,
    }
    assert set(printed["scores"]) == {"explanations", "untrained SAE"}
    truth = next(row for row in printed["scores"]["explanations"] if row["judge"] == "truth")
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
    assert any(one.control for one in done)
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
    output = capsys.readouterr()
    printed = json.loads(output.out)
    assert printed["latents"] == len(records) == sum(printed["statuses"].values())
    assert {row["method"] for row in printed["scores"]} >= {"detection"}
    assert "nothing is sent" in output.err
    report(records.folder, tmp_path, set_name="res-1k", model_id="phantom", as_json=True)
    assert json.loads(capsys.readouterr().out)["statuses"] == printed["statuses"]
    rows = [json.loads(line) for line in (tmp_path / "explanations.jsonl").read_text().splitlines()]
    assert {(row["modelId"], row["layer"]) for row in rows} == {("phantom", f"{records.meta.layer}-res-1k")}


def test_report_scores_where_image_latents_fire(hand_made, tmp_path, capsys):
    """The nodule's latent fires at patch 54 of 8 by 8: inside the box of every nodule, so all measures are 1."""
    plain = hand_made(("nodule", "pacemaker"), kind="image", name="plain")
    studies = [
        replace(s, boxes=(("nodule", 0.75, 0.75, 0.875, 0.875),)) if "nodule" in s.findings else s
        for s in plain.studies.values()
    ]
    agreed = FindingAgreement("nodule", "image", 1.0, 0.9, 1.0, 1.0, 1.0, 60, 240)
    records = [replace(r, agreement=(agreed,)) if r.latent == 0 else r for r in plain]
    opened = write_records(
        tmp_path / "boxed", plain.meta, studies, [plain.texts[s.study] for s in studies], records
    )
    (row,) = spatial_of_records(opened).to_dict("records")
    assert (row["finding"], row["latent"]) == ("nodule", 0)
    assert row["pointing"] == row["energy"] == row["iou"] == row["fired"] == 1
    assert row["elsewhere_pointing"] == 1  # every nodule is at the same place here
    assert spatial_of_records(plain).empty
    interpret_offline(opened)
    report(opened.folder, tmp_path / "out", frozen_decoder=opened.folder, as_json=True)
    space = json.loads(capsys.readouterr().out)["space"]
    assert set(space) == {"trained", "frozen decoder"}
    assert space["trained"][0]["pointing"] == 1
    assert len(pd.read_csv(tmp_path / "out" / "space.csv")) == 2

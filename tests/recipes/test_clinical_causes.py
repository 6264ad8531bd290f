"""Corrections by cause as a user runs them: planted errors attributed, candidates tried, the chosen one judged."""

import json
import runpy
from pathlib import Path

import pytest

from sae_lens_maira.cli.parser import run_recipe

SCRIPT = Path(__file__).parents[2] / "recipes" / "steering" / "clinical_causes.py"
SMALL = [
    "--studies=80",
    "--tuned=4",
    "--removed=[0,2]",
    "--strengthened=[0,1]",
    "--factors=[2.0]",
    "--random=1",
    "--train_studies=40",
    "--d_sae=128",
    "--steps=100",
    "--max_new_tokens=76",
]


@pytest.mark.slow
def test_every_candidate_is_tried_and_the_chosen_one_is_judged(tmp_path, capsys):
    """No correction is a candidate, the best is judged with its change, and an SAE of other settings is refused."""
    recipe = runpy.run_path(str(SCRIPT), run_name="recipe")
    folders = ["--out", str(tmp_path / "out"), "--saes", str(tmp_path / "saes")]
    arguments = ["--config", str(SCRIPT.with_suffix(".yaml")), *folders, *SMALL]
    assert run_recipe(recipe["Settings"], recipe["report_run"], None, arguments) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    tried = result["candidates, micro F1 on the selection half"]
    assert set(tried) == {"no correction", "remove 2", "strengthen 1 by 2", "remove 2 + strengthen 1 by 2"}
    assert tried[result["chosen"]] == max(tried.values())
    assert result["sentences attributed"]["false"]
    assert result["sentences attributed"]["missed"]
    for arm in result["arms"].values():
        assert arm["low"] <= arm["change"] <= arm["high"]
        assert arm["micro F1"] == pytest.approx(result["unsteered"] + arm["change"])
    if result["chosen"] == "no correction":
        assert result["arms"]["chosen"]["change"] == 0
    else:
        assert "random latents 0" in result["arms"]
    assert run_recipe(recipe["Settings"], recipe["report_run"], None, [*arguments, "--steps=120"]) == 2
    assert "steps 100 there, 120 now" in capsys.readouterr().err

"""The clinical recipe as a user runs it: planted errors found, arms kept in files, other settings refused."""

import json
import runpy
from pathlib import Path

import pytest

from sae_lens_maira.cli.parser import run_recipe
from sae_lens_maira.studies.report_metrics import ERRORS

SCRIPT = Path(__file__).parents[2] / "recipes" / "steering" / "clinical_steering.py"
SMALL = [
    "--studies=100",
    "--tuned=6",
    "--latents=[4]",
    "--shares=[1.0]",
    "--factors=[2.0]",
    "--random=1",
    "--d_sae=128",
    "--steps=150",
    "--specific=1.0",
]


@pytest.mark.slow
def test_runs_goes_on_and_refuses_other_settings(tmp_path, capsys):
    """A small run reports every arm with an interval; the same command reads its arms; other settings are refused."""
    recipe = runpy.run_path(str(SCRIPT), run_name="recipe")
    arguments = ["--config", str(SCRIPT.with_suffix(".yaml")), "--out", str(tmp_path), *SMALL]
    assert run_recipe(recipe["Clinical"], recipe["report_run"], None, arguments) == 0
    first = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert set(first["arms"]) == {"both", "suppress only", "boost only", "random latents 0"}
    assert first["clean model"] > first["unsteered"] + 0.03
    for arm in first["arms"].values():
        assert arm["low"] <= arm["change"] <= arm["high"]
        assert arm["micro F1"] == pytest.approx(first["unsteered"] + arm["change"])
    errors = first["errors"]["both"]
    kinds = [errors[f"{kind}_per_report"]["after"] for kind in ERRORS]
    assert errors["errors_per_report"]["after"] == pytest.approx(sum(kinds))
    assert errors["errors_per_report"]["against"] == "truth"
    assert first["arms"]["random latents 0"]["step"] == pytest.approx(first["arms"]["both"]["step"], rel=1e-3)
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "arms").iterdir()}
    # As if killed behind the first arms: what is there is read, what is missing is made again and is the same.
    (tmp_path / "arms" / "report-both.json").unlink()
    (tmp_path / "result.json").unlink()
    assert run_recipe(recipe["Clinical"], recipe["report_run"], None, arguments) == 0
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == first
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "arms").iterdir()}
    assert {name for name in times if kept[name] != times[name]} == {"report-both.json"}
    assert "random latents 0" in capsys.readouterr().out
    assert run_recipe(recipe["Clinical"], recipe["report_run"], None, [*arguments, "--seed=5"]) == 2
    assert "other settings" in capsys.readouterr().err

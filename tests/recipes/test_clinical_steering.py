"""The clinical recipe as a user runs it: planted errors found, arms kept in files, other settings refused."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from sae_lens_maira.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "recipes" / "clinical_steering.py"
SMALL = [
    "--clinical.studies=100",
    "--clinical.tuned=6",
    "--clinical.latents=[4]",
    "--clinical.shares=[1.0]",
    "--clinical.factors=[2.0]",
    "--clinical.random=1",
    "--clinical.d_sae=128",
    "--clinical.steps=150",
    "--clinical.specific=1.0",
]


@pytest.mark.slow
def test_runs_goes_on_and_refuses_other_settings(tmp_path, capsys):
    """A small run reports every arm with an interval; the same command reads its arms; other settings are refused."""
    recipe = runpy.run_path(str(SCRIPT), run_name="recipe")
    arguments = ["--config", str(SCRIPT.with_suffix(".yaml")), "--out", str(tmp_path), *SMALL]
    assert recipe["main"](arguments) == 0
    first = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert set(first["arms"]) == {"both", "suppress only", "boost only", "random latents 0"}
    assert first["clean model"] > first["unsteered"] + 0.03
    for arm in first["arms"].values():
        assert arm["low"] <= arm["change"] <= arm["high"]
        assert arm["micro F1"] == pytest.approx(first["unsteered"] + arm["change"])
    assert first["arms"]["random latents 0"]["step"] == pytest.approx(first["arms"]["both"]["step"], rel=1e-3)
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "arms").iterdir()}
    # As if killed behind the first arms: what is there is read, what is missing is made again and is the same.
    (tmp_path / "arms" / "report-both.json").unlink()
    (tmp_path / "result.json").unlink()
    assert recipe["main"](arguments) == 0
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == first
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "arms").iterdir()}
    assert {name for name in times if kept[name] != times[name]} == {"report-both.json"}
    assert "random latents 0" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="other settings"):
        recipe["main"]([*arguments, "--clinical.seed=5"])
    assert "sae_lens_maira.recipes.clinical_steering" not in sys.modules

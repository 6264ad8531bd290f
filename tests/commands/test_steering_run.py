"""The run over findings on a small budget: a finding comes, controls do not bring it, and a second run resumes."""

import numpy as np
import pandas as pd
import pytest

from sae_lens_maira.commands import steering_methods as names
from sae_lens_maira.commands.steering_run import SteeringRun, other_side, run_steering
from sae_lens_maira.errors import ConfigError

SMALL = {
    "parts": ("insert", "remove"),
    "findings": ("cardiomegaly",),
    "studies": 240,
    "d_sae": 256,
    "steps": 400,
    "gradients": 4,
    "choose": 6,
    "report": 10,
    "progress": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_steering(SteeringRun(out=tmp_path_factory.mktemp("steering"), **SMALL))


@pytest.mark.slow
def test_latents_put_it_in_and_controls_do_not(folder):
    """Cardiomegaly into studies without it: 16 latents at the patches in 8 of 10 or more, controls in at most 1."""
    table = pd.read_parquet(folder / "table.parquet").set_index(["part", "method"]).loc["insert"]
    assert set(table.n) == {10}
    assert (table.unsteered == 0).all()
    assert max(table.on_target[[names.MAPS, names.EFFECT]]) >= 0.8
    assert table.on_target[names.MEANS] >= 0.8
    assert table.on_target[names.RANDOM_DIRECTION] <= 0.1
    assert table.on_target[names.FLIPPED] <= 0.1
    assert table.on_target[names.CAUSAL] >= 0.8
    assert table.on_target[[names.RANDOM_CAUSAL, names.TWINS_CAUSAL]].max() <= 0.1
    assert table.off_target[names.MAPS] <= 0.1
    assert (table.on_target_high - table.on_target_low > 0.2).all(), "ten studies cannot be this certain"


@pytest.mark.slow
def test_taking_out(folder):
    """Subtracting what puts it in takes it out of 8 of 10 reports or more; random latents do not."""
    table = pd.read_parquet(folder / "table.parquet").set_index(["part", "method"]).loc["remove"]
    assert table.on_target[names.SUBTRACT] >= 0.8
    assert table.on_target[names.RANDOM_ABLATED] <= 0.2


@pytest.mark.slow
def test_tables_are_written_and_a_second_run_resumes(folder):
    """Markdown and figures are there; run again, nothing is steered again and nothing is loaded."""
    for name in ("table.md", "insert.png", "remove.png"):
        assert (folder / name).stat().st_size > 500
    files = sorted(folder.glob("*/*/studies.parquet"))
    before = [file.stat().st_mtime_ns for file in files]
    run_steering(SteeringRun(out=folder, **SMALL))
    assert [file.stat().st_mtime_ns for file in files] == before
    studies = pd.read_parquet(files[0])
    assert np.isfinite(studies.kl[studies.half == "report"]).all()
    assert not set(studies.columns) & {"frontal", "report"}


def test_sides_and_bad_input(tmp_path):
    """The other side of a key, and names that are not known."""
    assert other_side("pneumothorax_left") == "pneumothorax_right"
    assert other_side("nodule") is None
    with pytest.raises(ConfigError, match="known are"):
        SteeringRun(out=tmp_path, findings=("measles",))
    with pytest.raises(ConfigError, match="known are"):
        SteeringRun(out=tmp_path, parts=("enlarge",))

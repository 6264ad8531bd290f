"""The rehearsal at small widths: every command of the path within its bounds of bytes, and the check can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_command_stays_within_its_bytes(tmp_path):
    """`python -m benchmarks.rehearsal --small`, as a developer runs it."""
    command = [sys.executable, "-m", "benchmarks.rehearsal", "--small", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 13
    assert rows[-1].startswith("| steer")
    assert (tmp_path / "steered" / "summary.parquet").is_file()
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["d_sae"] == 512


def test_the_tracker_counts_what_lives_at_once(rehearsal):
    """A copy counts while it lives, a view does not, and a graph keeps its activations alive."""
    layer, x = torch.nn.Linear(100, 100), torch.ones(50, 100)
    with rehearsal("tracker").TensorBytes() as tracker:
        tracker.start()
        y = layer(x)
        z = y.view(100, 50)[3:5]
        assert tracker.now == tracker.peak == y.nbytes
        del y
        assert tracker.now == 50 * 100 * 4
        del z
        assert tracker.now == 0
        with torch.no_grad():
            layer(layer(x).relu())
        without = tracker.peak
        tracker.start()
        layer(layer(x).relu()).sum()
        assert tracker.peak > without


def test_a_step_beyond_its_bound_is_reported(rehearsal):
    step = rehearsal("steps").Step("name", ("words",), 1e6)
    problems = rehearsal("__main__").problems
    within = {"code": 0, "tensors": 999_999, "at_peak": "aten.mm"}
    assert problems(step, within, 8e9) == []
    assert "1.0 MB allowed; aten.mm" in problems(step, within | {"tensors": 1_000_001}, 8e9)[0]
    assert "8 GB allowed" in problems(step, within | {"peak": 9e9}, 8e9)[0]
    assert problems(step, {"code": 2}, 8e9) == ["name: exit code 2"]


def test_the_published_size_is_rehearsed_at_layer_15(rehearsal, tmp_path):
    """Every step of `--full` reads or writes inside the work folder, and the layer is the paper's."""
    found = rehearsal("steps").steps(tmp_path, small=False, full=True)
    assert [step.words[0] for step in found] == ["call", "studies", "call", "harvest", "call"]
    assert sum("blocks.15.hook_resid_post" in " ".join(step.words) for step in found) == 3
    assert all(str(tmp_path) in " ".join(step.words) for step in found)

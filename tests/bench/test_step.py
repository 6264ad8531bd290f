"""The step benchmark runs whole on a small shape and reports what its readers parse; the GPU script runs on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sae_lens_maira.bench.rows import counted_mixing, write_store
from sae_lens_maira.cli import main

KEYS = {
    "saelens_ms",
    "fused_ms",
    "ratio",
    "encoder_gemm_ms",
    "grad_rel_err",
    "peak_bytes",
    "device",
    "versions",
}
SMALL = ["--d-in", "32", "--d-sae", "128", "--batch", "64", "--k", "4", "--rounds", "2", "--warm-up", "1"]


def test_json_table_and_figure(tmp_path, capsys):
    png = tmp_path / "step.png"
    options = ["--json", "--png", str(png), "--scaling", "--device", "cpu", "--widths", "16", "128"]
    assert main(["bench", "step", *SMALL, *options, "--data-path", "--zipf"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report.keys() >= KEYS
    assert report["grad_rel_err"] < 1e-6
    assert report["ratio"] == pytest.approx(report["saelens_ms"] / report["fused_ms"], abs=6e-3)  # two digits
    assert set(report["milliseconds"]) == {"idle", "on"}
    assert [point["d_sae"] for point in report["scaling"]["d_sae"]] == [64, 128, 256]
    assert all(work["launches"] > work["syncs"] > 0 for work in report["host"]["idle"].values())
    assert report["data_path"]["caller_ms"]["prefetch thread"]["p50"] > 0
    assert "SAELens, default" in printed.err
    assert "from a store, this package: " in printed.err
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_an_arm_that_needs_a_gpu_is_refused(capsys):
    assert main(["bench", "step", *SMALL, "--device", "cpu", "--arms", "saelens_tf32"]) == 2
    assert "saelens_tf32 cannot run on a CPU" in capsys.readouterr().err


def test_expected_studies_per_batch_are_those_that_come_out(tmp_path):
    """Three epochs in buffers of a sixth of the store; and the default buffer, which holds all of it."""
    store = write_store(tmp_path / "rows", 2, 768, 32, 64, "float32")
    small = counted_mixing(store, 512, batches=144, buffer_rows=4096)
    assert small["counted"] == pytest.approx(small["expected"], rel=0.05)
    assert small["share"] < 0.75
    whole = counted_mixing(store, 512, batches=48)
    assert whole["counted"] == pytest.approx(whole["ideal"], rel=0.01)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--device", "cpu", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not [name for name, value in found.items() if isinstance(value, str) and "failed" in value]
    assert "tiny: figures mean nothing" in done.stdout

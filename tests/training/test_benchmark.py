"""The step benchmark runs whole on a small shape and reports what its readers parse."""

import json

import pytest

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
    assert main(["bench", "step", *SMALL, *options]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report.keys() >= KEYS
    assert report["grad_rel_err"] < 1e-6
    assert report["ratio"] == pytest.approx(report["saelens_ms"] / report["fused_ms"], abs=6e-3)  # two digits
    assert set(report["milliseconds"]) == {"idle", "on"}
    assert [point["d_sae"] for point in report["scaling"]["d_sae"]] == [64, 128, 256]
    assert "SAELens, default" in printed.err
    assert png.read_bytes()[:4] == b"\x89PNG"

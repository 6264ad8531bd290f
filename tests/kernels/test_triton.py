"""The triton kernels without a GPU: right in the interpreter, and compiled for sm_80 and sm_90 without spills.

Both need a process of their own, since triton decides at import whether it interprets. Speed is not measured here, nor
accuracy in bfloat16; the tests marked gpu measure accuracy where there is a GPU. Launches and host syncs of a step are
counted in the interpreter.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_lens_maira.kernels import AuxSpec, StepSpec, fused_step

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the extra `triton` is not installed"
)


@needs_triton
@pytest.mark.slow
def test_kernels_are_right_in_the_interpreter():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *map(str, sorted(HERE.glob("interpreted_*.py"))),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) == 54


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills_and_with_wide_loads(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compiled_triton.py"), str(capability)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert len(report) == 21
    for name, figures in report.items():
        assert figures["stack"] == 0, (name, figures)
        assert figures["local"] == 0, (name, figures)
        assert figures["occupancy"] >= 37, (name, figures)
    for name in (
        "prefix_decode_fp32",
        "prefix_decode_bf16",
        "adam_rows",
        "adam_unit_rows",
        "add_pieces",
        "round_rows_fp32",
    ):
        assert report[name]["wide_loads"] >= 2, (name, report[name])
    for name in ("latent_backward_fp32", "latent_backward_bf16", "exact_scores_fp32"):
        assert report[name]["copies"] > 0, (name, report[name])  # rows are copied while others are added


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("candidates", ["off", "bf16", "tf32"])
def test_kernels_are_right_on_a_gpu(autocast, candidates, make_weights, assert_equal_steps, relative):
    """float32 to 1e-5 of the reference; autocast to bfloat16's accuracy."""
    if autocast and candidates != "off":
        return
    weights = type(make_weights(8, 8))(*(w.cuda() for w in make_weights(512, 2048, torch.float32)))
    x = torch.randn(300, 512, device="cuda")
    dead = torch.rand(2048, device="cuda") < 0.2
    options = {"k": 20, "widths": (256, 2048), "aux": AuxSpec(kind="topk")}
    spec = StepSpec(autocast=autocast, candidates=candidates, **options)
    ours = fused_step(weights, x, spec, dead, backend="triton")
    expected = fused_step(weights, x, StepSpec(**options), dead, backend="reference")
    if not autocast:
        assert_equal_steps(ours, expected, 1e-5)
        return
    assert relative(ours.loss, expected.loss) < 1e-2
    for gradient, wanted in zip(ours.gradients, expected.gradients, strict=True):
        assert relative(gradient, wanted) < 5e-2

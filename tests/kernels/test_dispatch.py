"""The dispatcher says which backend runs, never switches silently, and imports triton only to run it."""

import subprocess
import sys

import pytest
import torch

from sae_lens_maira.errors import BackendError, ConfigError
from sae_lens_maira.kernels import AuxSpec, StepSpec, dispatch, fused_step, resolve_backend
from sae_lens_maira.kernels.dispatch import say_if_emulated

pytestmark = pytest.mark.compat


def test_auto_is_sparse_on_cpu():
    assert resolve_backend("auto", "cpu") == "sparse"
    assert resolve_backend("reference", "cpu") == "reference"


def test_triton_on_cpu_is_an_error_that_says_so():
    with pytest.raises(BackendError, match="'triton' was requested"):
        resolve_backend("triton", "cpu")


def test_unknown_backends_are_named_with_the_choices():
    with pytest.raises(
        BackendError, match="'cuda' is unknown; choose one of auto, triton, sparse, reference"
    ):
        resolve_backend("cuda", "cpu")


def test_the_result_names_the_backend(make_weights):
    weights = make_weights(8, 16)
    x = torch.randn(4, 8, dtype=torch.float64)
    spec = StepSpec(k=2, widths=(16,), aux=AuxSpec(kind="topk"))
    assert [fused_step(weights, x, spec, backend=b).backend for b in ("auto", "reference")] == [
        "sparse",
        "reference",
    ]


def test_importing_the_kernels_imports_no_triton():
    code = (
        "import sys, sae_lens_maira.kernels; sys.exit(any(m.split('.')[0] == 'triton' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tf32_candidates_need_cuda(make_weights):
    spec = StepSpec(k=2, widths=(16,), candidates="tf32")
    with pytest.raises(BackendError, match="only CUDA has TF32"):
        fused_step(make_weights(8, 16, torch.float32), torch.randn(4, 8), spec)


def test_inconsistent_specs_are_refused():
    with pytest.raises(ConfigError, match="must be positive and increase"):
        StepSpec(k=1, widths=(4, 4))
    with pytest.raises(ConfigError, match="2 level weights for 1"):
        StepSpec(k=1, widths=(4,), level_weights=(1.0, 1.0))
    with pytest.raises(ConfigError, match="autocast"):
        StepSpec(k=1, widths=(4,), autocast=True, candidates="bf16")


@pytest.mark.parametrize(
    ("capability", "candidates", "device", "logged"),
    [
        ("AVX2", "bf16", "cpu", True),
        ("AVX512", "bf16", "cpu", False),
        ("AVX2", "off", "cpu", False),
        ("AVX2", "bf16", "cuda", False),
    ],
)
def test_emulated_bfloat16_is_logged_once(capability, candidates, device, logged, monkeypatch, caplog):
    """Low-precision candidates that this CPU can only emulate are slower, and the log says so, once."""
    monkeypatch.setattr(dispatch, "_said", [])
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for _ in range(2):
        say_if_emulated(candidates, device)
    assert caplog.text.count("emulated") == int(logged)

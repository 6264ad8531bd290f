"""Checks of the triton kernels in triton's interpreter, on CPU tensors; run by test_triton.py in a process of its own.

The interpreter runs programs one after another in Python: shapes are tiny. It cannot show races, alignment faults or
bfloat16 arithmetic; those need a GPU.
"""

import pytest
import torch

from sae_lens_maira.kernels import AuxSpec, LocalCommunicator, StepSpec, Workspace, reference_step
from sae_lens_maira.kernels.layout import build_layout
from sae_lens_maira.kernels.step import run_stages
from sae_lens_maira.kernels.triton_adam import adam_rows
from sae_lens_maira.kernels.triton_latent_backward import cut, latent_backward
from sae_lens_maira.kernels.triton_select import compact_above
from sae_lens_maira.kernels.triton_stages import TRITON
from sae_lens_maira.kernels.triton_stats import record_firing_
from sae_lens_maira.training import RowMajorAdam


def triton_step(weights, x, spec, dead=None):
    return run_stages(TRITON, weights, x, spec, dead, Workspace(), LocalCommunicator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aux", ["none", "topk", "matryoshka", "dictionary_learning"])
def test_the_step_equals_the_reference(dtype, aux, make_weights, assert_equal_steps):
    weights = make_weights(37, 61, dtype)
    x = torch.randn(9, 37, dtype=dtype)
    dead = torch.rand(61) < 0.4
    spec = StepSpec(k=3.3, widths=(10, 30, 61), level_weights=(0.5, 0.2, 2.0), aux=AuxSpec(kind=aux))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert_equal_steps(triton_step(weights, x, spec, dead), reference_step(weights, x, spec, dead), tolerance)


@pytest.mark.parametrize(
    ("batch", "d_in", "widths", "k"),
    [
        (1, 1, (1,), 1.0),
        (5, 13, (31,), 4.0),
        (3, 129, (1, 2, 3, 70), 0.4),
        (6, 8, (8, 32), 32.0),
        (4, 9, (20,), 0.1),
    ],
)
def test_odd_shapes(batch, d_in, widths, k, make_weights, assert_equal_steps):
    """d_in no power of two, one level, empty rows and latents, every positive entry kept, nothing kept."""
    weights = make_weights(d_in, widths[-1])
    x = torch.randn(batch, d_in, dtype=torch.float64)
    spec = StepSpec(k=k, widths=widths)
    assert_equal_steps(triton_step(weights, x, spec), reference_step(weights, x, spec), 1e-13)


def test_a_d_in_of_several_stretches(make_weights, assert_equal_steps):
    weights = make_weights(1500, 12)
    x = torch.randn(3, 1500, dtype=torch.float64)
    spec = StepSpec(k=2, widths=(4, 12))
    assert_equal_steps(triton_step(weights, x, spec), reference_step(weights, x, spec), 1e-13)


@pytest.mark.parametrize("longest", [1, 3, 8, 1000])
def test_hot_latents_are_cut_and_added_up(longest, make_weights, relative):
    """One latent in every row, another in half of them, silent ones between."""
    d_in, d_sae, batch, widths = 20, 12, 17, (5, 12)
    kept = torch.zeros(batch, d_sae, dtype=torch.bool)
    kept[:, 3] = True
    kept[::2, 9] = True
    kept[4, 0] = True
    layout = build_layout(kept.view(-1).nonzero().squeeze(1), batch, d_sae, widths)
    h = torch.rand(int(kept.sum()), dtype=torch.float64)
    suffix, xc = (
        torch.randn(batch, 2, d_in, dtype=torch.float64),
        torch.randn(batch, d_in, dtype=torch.float64),
    )
    W_dec = make_weights(d_in, d_sae).W_dec
    ours = latent_backward(layout, h, suffix, xc, W_dec, longest=longest)

    level = (torch.arange(d_sae) >= 5).long()
    through = torch.where(kept, (suffix[:, level] * W_dec).sum(-1), 0.0)
    coefficients = torch.zeros(batch, d_sae, dtype=torch.float64)
    coefficients[kept] = h
    assert relative(ours.W_dec, torch.einsum("bj,bjd->jd", coefficients, suffix[:, level])) < 1e-13
    assert relative(ours.W_enc_t, through.T @ xc) < 1e-13
    assert relative(ours.b_enc, through.sum(0)) < 1e-13
    pieces = cut(layout.pointers, longest)
    assert int((pieces.last - pieces.first).max()) <= longest
    assert int((pieces.last - pieces.first).sum()) == len(h)


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_compaction_survives_a_full_buffer(density):
    scores = torch.rand(9, 700)
    bounds = torch.full((700,), 1.0 - density)
    assert torch.equal(compact_above(scores, bounds), (scores > bounds).view(-1).nonzero().squeeze(1))


@pytest.mark.parametrize("width", [7, 64, 1030])
def test_adam_equals_clip_and_torch_adam(width):
    torch.manual_seed(0)
    plain = torch.nn.Parameter(torch.randn(5, width))
    ours, mean, square = plain.detach().clone(), torch.zeros(5, width), torch.zeros(5, width)
    reference = torch.optim.Adam([plain], lr=0.1, betas=(0.8, 0.99))
    for step in (1, 2, 3):
        gradient = torch.randn(5, width)
        plain.grad = gradient.clone()
        scale = ((torch.nn.utils.clip_grad_norm_([plain], 1.0) + 1e-6) / 1.0).clamp(min=1.0)
        reference.step()
        norms = adam_rows(ours, gradient, mean, square, scale, step, 0.1, (0.8, 0.99), 1e-8)
        torch.testing.assert_close(ours, plain.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norms, ours.norm(dim=1))


def test_the_optimiser_takes_the_kernel_for_matrices():
    """A transposed matrix, a row-major one and a vector; what the kernel leaves behind is used until a change."""
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((6, 10), (10, 6), (10,))]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in plain]
    ours[0].data = ours[0].data.T.contiguous().T
    reference = torch.optim.Adam(plain, lr=0.1, betas=(0.8, 0.99))
    adam = RowMajorAdam(ours, lr=0.1, betas=(0.8, 0.99))
    adam.use_triton = True
    for _ in range(3):
        for a, b in zip(ours, plain, strict=True):
            b.grad = torch.randn(b.shape)
            a.grad = b.grad.clone()
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        adam.clip_(1.0)
        reference.step()
        adam.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert a.grad is not None
    workspace = Workspace()
    workspace.refreshed["W_dec"] = adam.refreshed[ours[1]]
    assert workspace.norms(ours[1].detach()) is adam.refreshed[ours[1]].norms
    with torch.no_grad():
        ours[1].mul_(2)
    torch.testing.assert_close(workspace.norms(ours[1].detach()), ours[1].detach().norm(dim=1))
    state = adam.state_dict()["state"]
    assert all(float(entry["step"]) == 3 for entry in state.values())
    adam.load_state_dict(adam.state_dict())


def test_firing_statistics():
    counts = torch.tensor([0, 3, 0, 1])
    frequency, since = torch.tensor([5.0, 1.0, 0.0, 0.0]), torch.tensor([7.0, 7.0, 0.0, 1.0])
    record_firing_(counts, frequency, since)
    assert frequency.tolist() == [5, 4, 0, 1]
    assert since.tolist() == [8, 0, 1, 0]

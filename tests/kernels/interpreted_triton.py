"""Checks of the triton kernels in triton's interpreter, on CPU tensors; run by test_triton.py in a separate process.

The interpreter runs programs one after another in Python: shapes are tiny. It cannot show races, alignment faults or
bfloat16 arithmetic; those need a GPU.
"""

import pytest
import torch

from sae_lens_maira.kernels import AuxSpec, LocalCommunicator, StepSpec, Workspace, reference_step
from sae_lens_maira.kernels.layout import build_layout
from sae_lens_maira.kernels.step import run_stages
from sae_lens_maira.kernels.triton_adam import adam_rows, next_step
from sae_lens_maira.kernels.triton_candidates import Table
from sae_lens_maira.kernels.triton_latent_backward import latent_backward
from sae_lens_maira.kernels.triton_select import select_rows
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


@pytest.mark.parametrize("aux", ["matryoshka", "dictionary_learning"])
def test_latents_divided_over_ranks(aux, make_weights, divided_step, assert_equal_steps):
    weights = make_weights(7, 31)
    x = torch.randn(5, 7, dtype=torch.float64)
    dead = torch.rand(31) < 0.5
    spec = StepSpec(k=3.3, widths=(10, 31), aux=AuxSpec(kind=aux))
    ours = divided_step(2, TRITON, weights, x, spec, dead)
    assert_equal_steps(ours, reference_step(weights, x, spec, dead), 1e-13)


def test_a_d_in_of_several_stretches(make_weights, assert_equal_steps):
    weights = make_weights(1500, 12)
    x = torch.randn(3, 1500, dtype=torch.float64)
    spec = StepSpec(k=2, widths=(4, 12))
    assert_equal_steps(triton_step(weights, x, spec), reference_step(weights, x, spec), 1e-13)


@pytest.mark.parametrize("segment", [1, 3, 8, 1000])
def test_hot_latents_are_cut_and_added_up(segment, make_weights, relative):
    """One latent in every row, another in half of them, silent ones between."""
    d_in, d_sae, batch, widths = 20, 12, 17, (5, 12)
    kept = torch.zeros(batch, d_sae, dtype=torch.bool)
    kept[:, 3] = True
    kept[::2, 9] = True
    kept[4, 0] = True
    layout = build_layout(kept.view(-1).nonzero().squeeze(1), batch, widths)
    h = torch.rand(int(kept.sum()), dtype=torch.float64)
    suffix, xc = (
        torch.randn(batch, 2, d_in, dtype=torch.float64),
        torch.randn(batch, d_in, dtype=torch.float64),
    )
    W_dec = make_weights(d_in, d_sae).W_dec
    ours = latent_backward(layout, h, suffix, xc, W_dec, segment=segment)

    level = (torch.arange(d_sae) >= 5).long()
    through = torch.where(kept, (suffix[:, level] * W_dec).sum(-1), 0.0)
    coefficients = torch.zeros(batch, d_sae, dtype=torch.float64)
    coefficients[kept] = h
    assert relative(ours.W_dec, torch.einsum("bj,bjd->jd", coefficients, suffix[:, level])) < 1e-13
    assert relative(ours.W_enc_t, through.T @ xc) < 1e-13
    assert relative(ours.b_enc, through.sum(0)) < 1e-13
    squares = torch.stack((ours.W_dec.square().sum(), ours.W_enc_t.square().sum()))
    torch.testing.assert_close(ours.squares, squares, rtol=1e-12, atol=0)


def sorted_selection(values, n):
    """Flat indices of the n largest positive entries, ascending; ties to the lowest index."""
    order = values.flatten().sort(descending=True, stable=True).indices[:n]
    return order[values.flatten()[order] > 0].sort().values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [1, 60, 200])
def test_selection_and_layout_equal_a_sort(dtype, tied, n):
    """Same entries, same order, same boundaries, with as many ties at the threshold as integers give."""
    torch.manual_seed(n)
    widths, rows = (7, 30, 85), 10
    h = torch.randn(rows, 85, dtype=dtype)
    norms = None if tied else torch.rand(85, dtype=dtype) + 0.5
    h = (h * 2).round() if tied else h
    values = h if norms is None else h * norms
    bound = values.flatten().topk(min(values.numel(), 2 * n)).values[-1].clamp(min=0) * 0.9
    kept = select_rows(Table(h, None, norms), n, widths, LocalCommunicator(), bound, 1.0, 850)
    right, candidates, number, broken = kept.check.tolist()
    assert (right, candidates, number, broken) == (1, int((values > bound).sum()), n, 0)
    flat = sorted_selection(values, n)
    expected = build_layout(flat, rows, widths)
    for name in ("rows", "cols", "offsets", "by_latent", "latents", "pointers"):
        assert torch.equal(getattr(kept.layout, name), getattr(expected, name)), name
    assert torch.equal(kept.values, values.flatten()[flat])
    assert torch.equal(kept.h, h.flatten()[flat])
    assert kept.threshold == kept.values.min()


@pytest.mark.parametrize(("bound", "room"), [(1.5, 2000), (0.1, 300)])
def test_a_bound_that_is_too_high_or_a_buffer_that_is_too_small_is_noticed(bound, room):
    h = torch.randn(20, 90)
    kept = select_rows(Table(h), 180, (90,), LocalCommunicator(), torch.tensor(bound), 1.0, room)
    assert kept.check[0] == 0
    assert kept.check[1] == (h > bound).sum()
    assert kept.layout.offsets.max() <= 180
    assert kept.layout.pointers.max() <= 180


@pytest.mark.parametrize("hint", [1e-6, 1.2, 1e9])
@pytest.mark.parametrize("candidates", ["off", "bf16"])
def test_a_wrong_threshold_hint_changes_nothing(hint, candidates, make_weights, assert_equal_steps):
    """Also the next step, which starts from the threshold that this one left on the device."""
    dtype = torch.float32 if candidates == "bf16" else torch.float64
    weights = make_weights(20, 64, dtype)
    x = torch.randn(6, 20, dtype=dtype)
    spec = StepSpec(k=4, widths=(16, 64), candidates=candidates, aux=AuxSpec(kind="topk"))
    dead = torch.rand(64) < 0.3
    workspace = Workspace()
    workspace.threshold = hint
    expected = reference_step(weights, x, StepSpec(k=4, widths=(16, 64), aux=AuxSpec(kind="topk")), dead)
    for _ in range(2):
        ours = run_stages(TRITON, weights, x, spec, dead, workspace, LocalCommunicator())
        assert_equal_steps(ours, expected, 1e-6 if candidates == "bf16" else 1e-13)


def test_autocast_reads_the_product_and_the_bias_apart(make_weights, relative):
    """The interpreter truncates casts to bfloat16, so equality is to bfloat16's accuracy."""
    weights = make_weights(40, 64, torch.float32)
    x = torch.randn(12, 40)
    spec = StepSpec(k=4, widths=(16, 64), autocast=True, aux=AuxSpec(kind="topk"))
    ours = triton_step(weights, x, spec, torch.rand(64) < 0.3)
    assert ours.acts.values.shape == (48,)
    expected = reference_step(weights, x, StepSpec(k=4, widths=(16, 64)))
    assert relative(ours.level_losses, expected.level_losses) < 3e-2


@pytest.mark.parametrize("width", [7, 64, 1030])
def test_adam_equals_clip_and_torch_adam(width):
    torch.manual_seed(0)
    plain = torch.nn.Parameter(torch.randn(5, width))
    ours, mean, square = plain.detach().clone(), torch.zeros(5, width), torch.zeros(5, width)
    reference = torch.optim.Adam([plain], lr=0.1, betas=(0.8, 0.99))
    number = torch.zeros(())
    for step in (1, 2, 3):
        gradient = torch.randn(5, width)
        gradient[2] = 0  # a row that never has a gradient does not change
        plain.grad = gradient.clone()
        scale = ((torch.nn.utils.clip_grad_norm_([plain], 1.0) + 1e-6) / 1.0).clamp(min=1.0)
        reference.step()
        settings = next_step(number, torch.tensor(0.1), (0.8, 0.99))
        norms = adam_rows(ours, gradient, mean, square, scale, settings, (0.8, 0.99), 1e-8)
        assert number == step
        torch.testing.assert_close(ours, plain.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norms, ours.norm(dim=1))


@pytest.mark.parametrize("width", [7, 64])
def test_adam_holds_rows_at_norm_1(width):
    """Projection of the gradient, clip, torch's Adam and division by the norm, each in a pass of its own."""
    torch.manual_seed(0)
    plain = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(6, width), dim=1))
    with torch.no_grad():
        plain[5] *= 3  # a row that has no gradient and is not of norm 1 yet
    ours = torch.nn.Parameter(plain.detach().clone())
    reference = torch.optim.Adam([plain], lr=0.1, betas=(0.8, 0.99))
    adam = RowMajorAdam([ours], lr=0.1, betas=(0.8, 0.99))
    adam.use_triton = True
    adam.unit.add(ours)
    for _ in range(3):
        gradient = torch.randn(6, width)
        gradient[2] = 0
        gradient[5] = 0
        ours.grad = gradient.clone()
        direction = plain.detach() / (plain.detach().norm(dim=1, keepdim=True) + 1e-6)
        plain.grad = gradient - (gradient * direction).sum(1, keepdim=True) * direction
        expected = torch.nn.utils.clip_grad_norm_([plain], 1.0)
        torch.testing.assert_close(adam.clip_(1.0), expected)
        reference.step()
        adam.step()
        with torch.no_grad():
            plain /= plain.norm(dim=1, keepdim=True)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(adam.refreshed[ours].norms, torch.ones(6), rtol=0, atol=1e-6)


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
    """Frequencies grow by the counts; the steps since a latent fired are reset or counted up."""
    counts = torch.tensor([0, 3, 0, 1])
    frequency, since = torch.tensor([5.0, 1.0, 0.0, 0.0]), torch.tensor([7.0, 7.0, 0.0, 1.0])
    record_firing_(counts, frequency, since)
    assert frequency.tolist() == [5, 4, 0, 1]
    assert since.tolist() == [8, 0, 1, 0]

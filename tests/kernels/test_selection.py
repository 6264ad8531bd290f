"""Selection is exact: against a full sort, for scores from full or low-precision products."""

import pytest
import torch

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels import LocalCommunicator, StepSpec, fused_step
from sae_lens_maira.kernels.scores import BoundedScores, DenseScores, augment, reaches, round_to
from sae_lens_maira.kernels.selection import compact, kth_largest, select

pytestmark = pytest.mark.compat
COMM = LocalCommunicator()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_largest_equals_a_sort(dtype):
    values = torch.rand(1000, dtype=dtype) ** 8 + 1e-12
    values[100:200] = values[100]  # ties
    ordered = values.sort(descending=True).values
    for k in (1, 2, 57, 500, 999, 1000):
        found, ties = kth_largest(values, k, COMM)
        assert found == float(ordered[k - 1])
        assert ties == k - int((values > found).sum())


@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (16, 64), (1, 1)])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_compact_equals_nonzero(shape, density):
    mask = torch.rand(shape) < density
    assert torch.equal(compact(mask), mask.view(-1).nonzero().squeeze(1))


@pytest.mark.parametrize("n", [0, 1, 100, 2000, 5000])
@pytest.mark.parametrize("scaled", [True, False])
def test_selection_is_the_top_of_a_sort(n, scaled):
    h = torch.randn(64, 80)
    norms = torch.rand(80) + 0.1 if scaled else None
    values = (h * norms if norms is not None else h).flatten()
    selection = select(DenseScores(h, norms), n, 64, COMM, None)
    expected = values.sort(descending=True, stable=True).indices[:n]
    expected = expected[values[expected] > 0].sort().values
    assert torch.equal(selection.flat, expected)
    assert torch.equal(selection.values, values[expected])


@pytest.mark.parametrize("shape", [(7, 24), (16, 40), (1, 8), (0, 8)])
@pytest.mark.parametrize("scaled", [False, True])
def test_scores_stored_latent_by_latent_are_the_same_scores(shape, scaled):
    """Memory order changes neither indices (ascending), nor values, nor columns."""
    h = torch.randn(shape)
    norms = torch.rand(shape[1]) + 0.5 if scaled else None
    by_row, by_latent = DenseScores(h, norms), DenseScores(h.T.contiguous().T, norms)
    assert by_latent.by_latent == (shape[0] > 1)
    for lo in (0.0, 0.7):
        for one, other in zip(by_row.above(lo), by_latent.above(lo), strict=True):
            assert torch.equal(one, other)
    latents = torch.tensor([5, 1])
    assert torch.equal(by_row.columns(latents), by_latent.columns(latents))


@pytest.mark.parametrize("kind", ["bf16", "tf32"])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_the_margin_is_an_upper_bound(kind, spread):
    """In float64, for rows and latents of very different norms: no exact score exceeds its bound."""
    x = torch.randn(64, 96) * torch.logspace(0, torch.log10(torch.tensor(spread)).item(), 64)[:, None]
    W = torch.randn(96, 200) * torch.logspace(-2, 2, 200)
    left, right = augment(x, W, kind)
    assert torch.equal(round_to(left.float(), kind).float(), left.float())
    bound = left.double() @ right.double().T
    exact = x.double() @ W.double()
    assert (exact <= bound).all()
    # The margin is useful: far below the sum of worst-case roundings.
    worst = x.double().norm(dim=1)[:, None] * W.double().norm(dim=0) * (2**-7 if kind == "bf16" else 2**-9)
    assert ((bound - exact) <= 2 * worst).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_comparing_bits_equals_comparing_numbers(dtype):
    """For bounds of either sign, zeros of both, infinities and numbers below the normal range."""
    special = torch.tensor([0.0, -0.0, 1e-39, -1e-39, 3.0, -3.0, torch.inf, -torch.inf])
    table = torch.cat((torch.randn(40, 8), special[:, None].expand(8, 8))).to(dtype)
    for bound in (special.to(dtype), torch.randn(8).to(dtype), table[0]):
        found, expected = reaches(table, bound), table >= bound
        assert torch.equal(found[:, bound != 0], expected[:, bound != 0])
        missed = expected & ~found  # -0.0, which is the bound of no positive score, beside a bound of 0.0
        assert ((table == 0) & table.signbit())[missed].all()


def test_candidates_give_the_exact_selection_at_every_scale(make_weights, assert_equal_steps):
    for scale in (1e-3, 1.0, 1e3):
        weights = make_weights(48, 160, torch.float32)
        x = torch.randn(50, 48) * scale
        spec = StepSpec(k=6, widths=(40, 160))
        exact = fused_step(weights, x, spec, backend="sparse")
        ours = fused_step(weights, x, StepSpec(k=6, widths=(40, 160), candidates="bf16"), backend="sparse")
        assert_equal_steps(ours, exact, 1e-6)


def test_a_product_that_breaks_its_bound_is_noticed():
    x, W = torch.randn(16, 32), torch.randn(32, 64)
    scores = BoundedScores(x, W, torch.zeros(64), None, "bf16")
    scores.upper -= 1.0
    with pytest.raises(BackendError, match="candidates='off'"):
        scores.above(0.0)

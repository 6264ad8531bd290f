"""The sparse backend equals the dense specification: every loss, every gradient, every awkward shape."""

import pytest
import torch

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels import AuxSpec, StepSpec, Workspace, fused_step
from sae_lens_maira.kernels.problem import Gradients, Weights

pytestmark = pytest.mark.compat

AUX_KINDS = ["none", "topk", "matryoshka", "dictionary_learning"]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("aux", AUX_KINDS)
def test_every_option_equals_the_reference(dtype, rescale, centre, aux, make_weights, assert_equal_steps):
    weights = make_weights(37, 101, dtype)
    x = torch.randn(23, 37, dtype=dtype)
    dead = torch.rand(101) < 0.4  # more dead latents than k_aux = 18: they are ranked per token
    spec = StepSpec(
        k=5.3,
        widths=(10, 37, 101),
        level_weights=(0.5, 0.2, 2.0),
        rescale=rescale,
        centre=centre,
        aux=AuxSpec(kind=aux, coefficient=0.7),
    )
    ours = fused_step(weights, x, spec, dead, backend="sparse")
    assert_equal_steps(ours, fused_step(weights, x, spec, dead, backend="reference"), TOLERANCE[dtype])
    assert ours.backend == "sparse"


@pytest.mark.parametrize("frozen", [{"W_dec"}, {"W_enc"}, {"W_enc", "W_dec"}])
@pytest.mark.parametrize("given", [True, False])
def test_gradients_of_frozen_matrices_are_left_out(frozen, given, make_weights, assert_equal_steps):
    """Empty where frozen; everything else is as it is without."""
    weights = make_weights(24, 48)
    x, dead = torch.randn(9, 24, dtype=torch.float64), torch.rand(48) < 0.3
    shared = {"k": 3.0, "widths": (16, 48), "aux": AuxSpec(kind="topk")}
    spec = StepSpec(**shared, frozen=frozenset(frozen))
    out = Gradients(torch.empty(48, 24).double(), weights.b_enc, torch.empty(48, 24).double(), weights.b_dec)
    ours = fused_step(weights, x, spec, dead, backend="sparse", out=out if given else None)
    assert_equal_steps(ours, fused_step(weights, x, spec, dead, backend="reference"), 1e-13)
    whole = fused_step(weights, x, StepSpec(**shared), dead, backend="sparse")
    for name, field in (("W_enc", "W_enc_t"), ("W_dec", "W_dec"), ("", "b_enc"), ("", "b_dec")):
        gradient = getattr(ours.gradients, field)
        if name in frozen:
            assert gradient.numel() == 0
        else:
            torch.testing.assert_close(gradient, getattr(whole.gradients, field))


@pytest.mark.parametrize("aux", AUX_KINDS[1:])
@pytest.mark.parametrize("n_dead", [0, 1, 5])
def test_few_dead_latents_scale_the_aux_loss(aux, n_dead, make_weights, assert_equal_steps):
    weights = make_weights(24, 48)
    dead = torch.zeros(48, dtype=torch.bool)
    dead[torch.randperm(48)[:n_dead]] = True
    spec = StepSpec(k=3, widths=(16, 48), aux=AuxSpec(kind=aux))
    x = torch.randn(9, 24, dtype=torch.float64)
    ours, expected = (fused_step(weights, x, spec, dead, backend=b) for b in ("sparse", "reference"))
    assert (ours.aux_loss == 0) == (n_dead == 0)
    assert_equal_steps(ours, expected, 1e-13)


@pytest.mark.parametrize(
    ("batch", "d_in", "widths", "k"),
    [
        (1, 1, (1,), 1.0),
        (1, 5, (2, 3), 2.0),
        (7, 13, (31,), 4.0),  # one level, odd sizes: no word of eight booleans
        (3, 129, (1, 2, 3, 257), 0.4),  # fewer kept entries than rows, many empty latents
        (16, 8, (8, 64), 64.0),  # k = d_sae: every positive entry is kept
        (5, 9, (11, 20), 0.1),  # nothing is kept
    ],
)
def test_odd_shapes(batch, d_in, widths, k, make_weights, assert_equal_steps):
    """The sparse backend equals the reference in float64 for sizes that are not multiples of anything."""
    weights = make_weights(d_in, widths[-1])
    x = torch.randn(batch, d_in, dtype=torch.float64)
    spec = StepSpec(k=k, widths=widths)
    ours, expected = (fused_step(weights, x, spec, backend=b) for b in ("sparse", "reference"))
    assert_equal_steps(ours, expected, 1e-13)
    assert len(ours.acts.values) <= int(k * batch)


def test_one_latent_in_every_row_and_rows_with_nothing(make_weights, assert_equal_steps):
    weights = make_weights(16, 40)
    weights.b_enc[7] = 50.0
    x = torch.randn(32, 16, dtype=torch.float64)
    x[::3] = weights.b_dec  # h = b_enc there: only latent 7 and small biases
    spec = StepSpec(k=2.0, widths=(5, 40))
    ours, expected = (fused_step(weights, x, spec, backend=b) for b in ("sparse", "reference"))
    assert ours.fired[7] == 32
    assert_equal_steps(ours, expected, 1e-13)

    weights.b_enc[:] = -100.0  # nothing is positive: the loss is that of b_dec alone
    ours, expected = (fused_step(weights, x, spec, backend=b) for b in ("sparse", "reference"))
    assert len(ours.acts.values) == 0
    assert torch.isinf(ours.min_positive)
    assert_equal_steps(ours, expected, 1e-13)


def test_ties_go_to_the_lowest_flat_index(assert_equal_steps):
    """Integers tie often; exactly n entries are kept and they are the same on both backends."""
    x = torch.randint(-3, 4, (24, 6)).double()
    W_enc = torch.randint(-2, 3, (6, 32)).double()
    weights = Weights(W_enc, torch.zeros(32).double(), W_enc.T.clone(), torch.zeros(6).double())
    spec = StepSpec(k=3.0, widths=(8, 32), rescale=False)
    ours, expected = (fused_step(weights, x, spec, backend=b) for b in ("sparse", "reference"))
    assert len(ours.acts.values) == 72
    assert (ours.acts.values == ours.min_positive).sum() > 1
    assert_equal_steps(ours, expected, 1e-13)


@pytest.mark.parametrize("hint", [1e-6, 0.5, 1.0, 3.0, 1e9])
def test_a_wrong_threshold_hint_changes_nothing(hint, make_weights, assert_equal_steps):
    weights = make_weights(20, 64)
    x = torch.randn(40, 20, dtype=torch.float64)
    spec = StepSpec(k=4, widths=(16, 64))
    workspace = Workspace()
    workspace.threshold = hint
    ours = fused_step(weights, x, spec, backend="sparse", workspace=workspace)
    assert_equal_steps(ours, fused_step(weights, x, spec, backend="reference"), 1e-13)
    again = fused_step(weights, x, spec, backend="sparse", workspace=workspace)
    assert_equal_steps(again, ours, 0.0)


def test_memory_order_of_W_enc_does_not_matter(make_weights, assert_equal_steps):
    weights = make_weights(20, 64)
    row_major = weights._replace(W_enc=weights.W_enc.T.contiguous().T)
    x = torch.randn(12, 20, dtype=torch.float64)
    spec = StepSpec(k=4, widths=(16, 64))
    steps = (fused_step(each, x, spec, backend="sparse") for each in (row_major, weights))
    assert_equal_steps(*steps, 1e-13)


@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("candidates", ["off", "bf16"])
def test_nan_and_inf_reach_the_loss(where, value, candidates, make_weights):
    """As in a dense step; a comparison alone would drop them silently."""
    weights = make_weights(16, 32, torch.float32)
    x = torch.randn(8, 16)
    tensor = x if where == "x" else getattr(weights, where)
    tensor.view(-1)[5] = value
    spec = StepSpec(k=2, widths=(8, 32), candidates=candidates)
    assert not torch.isfinite(fused_step(weights, x, spec, backend="sparse").loss)


def test_a_dead_mask_may_depend_on_this_batch(make_weights, assert_equal_steps):
    weights = make_weights(12, 40)
    x = torch.randn(10, 12, dtype=torch.float64)
    spec = StepSpec(k=2, widths=(40,), aux=AuxSpec(kind="dictionary_learning", coefficient=1 / 32))

    def silent(fired: torch.Tensor) -> torch.Tensor:
        return fired == 0

    ours, expected = (fused_step(weights, x, spec, silent, backend=b) for b in ("sparse", "reference"))
    assert ours.aux_loss > 0
    assert_equal_steps(ours, expected, 1e-13)


def test_sparse_activations_are_the_kept_entries(make_weights):
    weights = make_weights(12, 40)
    result = fused_step(weights, torch.randn(10, 12).double(), StepSpec(k=2, widths=(40,)), backend="sparse")
    coo = result.acts.to_coo()
    assert coo.is_coalesced()
    assert coo.to_dense().bool().sum(0).equal(result.fired)
    assert coo.values().min() == result.min_positive


def test_shapes_and_types_are_checked(make_weights):
    weights = make_weights(12, 40)
    x = torch.randn(10, 12, dtype=torch.float64)
    with pytest.raises(BackendError, match="expected \\(tokens, 12\\)"):
        fused_step(weights, x[:, :5], StepSpec(k=2, widths=(40,)))
    with pytest.raises(BackendError, match="last level width is 30"):
        fused_step(weights, x, StepSpec(k=2, widths=(30,)))
    with pytest.raises(BackendError, match="one type"):
        fused_step(weights, x.float(), StepSpec(k=2, widths=(40,)))
    with pytest.raises(BackendError, match="Expected k <= d_sae"):
        fused_step(weights, x, StepSpec(k=41, widths=(40,)))
    with pytest.raises(BackendError, match="float32"):
        fused_step(weights, x, StepSpec(k=2, widths=(40,), candidates="bf16"))

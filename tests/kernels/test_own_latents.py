"""Latents divided over ranks: together the ranks give the step of one process, whatever the number of latents."""

import pytest
import torch

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels import AuxSpec, LocalCommunicator, StepSpec, fused_step
from sae_lens_maira.kernels.own_latents import check_levels
from sae_lens_maira.kernels.step import SPARSE

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("aux", ["none", "topk", "matryoshka", "dictionary_learning"])
@pytest.mark.parametrize("share_dead", [0.03, 0.5])
def test_ranks_give_the_step_of_one_process(
    size, aux, share_dead, make_weights, divided_step, assert_equal_steps
):
    """101 latents, which no number of ranks divides; few dead latents, and more than are used per row."""
    torch.manual_seed(1)
    weights = make_weights(37, 101)
    x = torch.randn(23, 37, dtype=torch.float64)
    dead = torch.rand(101) < share_dead
    spec = StepSpec(
        k=5.3,
        widths=(10, 37, 101),
        level_weights=(0.5, 0.2, 2.0),
        rescale=aux != "dictionary_learning",
        aux=AuxSpec(kind=aux, coefficient=0.7),
    )
    ours = divided_step(size, SPARSE, weights, x, spec, dead)
    expected = fused_step(weights, x, spec, dead, backend="reference")
    assert aux == "none" or float(expected.aux_loss) > 0
    assert_equal_steps(ours, expected, 1e-13)


def test_low_precision_candidates_of_a_share_are_exact(make_weights, divided_step, assert_equal_steps):
    weights = make_weights(37, 101, torch.float32)
    x = torch.randn(23, 37)
    options = {"k": 5.3, "widths": (10, 101), "aux": AuxSpec(kind="topk")}
    dead = torch.rand(101) < 0.5
    ours = divided_step(2, SPARSE, weights, x, StepSpec(**options, candidates="bf16"), dead)
    assert_equal_steps(ours, fused_step(weights, x, StepSpec(**options), dead, backend="reference"), 1e-6)


def test_more_entries_than_a_rank_has(make_weights, divided_step, assert_equal_steps):
    """k is larger than a rank's share, and one rank has no dead latent."""
    weights = make_weights(16, 40)
    x = torch.randn(9, 16, dtype=torch.float64)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[1::2] = True
    spec = StepSpec(k=30.0, widths=(5, 40), aux=AuxSpec(kind="topk"))
    expected = fused_step(weights, x, spec, dead, backend="reference")
    assert_equal_steps(divided_step(2, SPARSE, weights, x, spec, dead), expected, 1e-13)


@pytest.mark.parametrize("where", ["x", "W_enc", "W_dec"])
def test_nan_of_one_rank_reaches_all(where, make_weights, divided_step):
    weights = make_weights(16, 40)
    x = torch.randn(9, 16, dtype=torch.float64)
    tensor = x if where == "x" else getattr(weights, where)
    tensor.view(-1)[17] = torch.nan
    with pytest.raises(AssertionError, match="loss"):  # NaN does not equal NaN
        divided_step(2, SPARSE, weights, x, StepSpec(k=2.0, widths=(5, 40)), None)


def test_levels_that_cannot_be_divided_are_refused(make_weights):
    with pytest.raises(BackendError, match=r"divided over 4 ranks, .* has 3\. Expected"):
        check_levels((8, 11, 40), 4)
    check_levels((8, 12, 40), 4)
    alone = fused_step(
        make_weights(6, 9),
        torch.randn(4, 6).double(),
        StepSpec(k=1.0, widths=(9,)),
        comm=LocalCommunicator(),
        own_latents=True,
    )
    assert alone.fired.sum() == 4

"""From rows to firing tables, and the supervised direction."""

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.latents import MeanDifference, study_firing
from sae_lens_maira.latents.agreement import _best_threshold


def make_rows(values: torch.Tensor, study: np.ndarray) -> ActivationRows:
    n = len(values)
    blank = np.full(n, -1)
    return ActivationRows(
        values, study, np.arange(n), blank, blank, blank, blank, blank, "blocks.0.hook_resid_post"
    )


@pytest.fixture
def rows() -> ActivationRows:
    generator = torch.Generator().manual_seed(0)
    return make_rows(torch.randn(700, 12, generator=generator), np.repeat(np.arange(70), 10))


def test_firing_is_any_over_a_studys_rows(rows):
    """The chunked table equals a plain loop, and L0 is the mean count of active units."""

    def encode(values):
        return torch.relu(values - 1.5)

    fires, l0 = study_firing(encode, rows, n_studies=72, chunk=64)
    on = (rows.values > 1.5).numpy()
    expected = np.stack(
        [on[rows.study == s].any(0) if (rows.study == s).any() else np.zeros(12, bool) for s in range(72)]
    )
    assert (fires == expected).all()
    assert l0 == pytest.approx(on.sum(1).mean())


def test_mean_difference_finds_a_planted_direction(rows):
    """A finding that shifts rows along one direction is read on the half that was not fitted."""
    truth = np.random.default_rng(0).random((70, 1)) < 0.4
    direction = torch.zeros(12)
    direction[3] = 4.0
    shifted = rows.values + torch.from_numpy(truth[rows.study, 0]).float()[:, None] * direction
    planted = make_rows(shifted, rows.study)
    choose = np.arange(70) < 35
    fires, _ = study_firing(MeanDifference(planted, truth, choose), planted, 70)
    assert (fires[~choose, 0] == truth[~choose, 0]).mean() > 0.9


def test_best_threshold_by_enumeration():
    """The sweep finds the same best F1 as trying every cut."""
    rng = np.random.default_rng(2)
    score, truth = rng.normal(size=50), rng.random(50) < 0.4
    score[truth] += 1

    def f1(cut):
        fired = score > cut
        return 2 * (fired & truth).sum() / (fired.sum() + truth.sum())

    best = max(f1(cut) for cut in np.r_[-9, np.sort(score)])
    assert f1(_best_threshold(score, truth)) == pytest.approx(best)

"""Statistics against direct computation on small arrays."""

import math

import numpy as np
import pytest
import torch

from sae_lens_maira import stats


def test_explained_variance_is_streamed_and_stable_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=generator) + 1e4
    guess = x + 0.3 * torch.randn(500, 8, generator=generator)
    wide, near = x.double(), guess.double()
    expected = 1 - float(((wide - near) ** 2).sum() / ((wide - wide.mean(0)) ** 2).sum())
    sums = stats.ExplainedVariance()
    for start in (0, 1, 100, 433):
        stop = {0: 1, 1: 100, 100: 433, 433: 500}[start]
        sums.add(x[start:stop], guess[start:stop])
    assert sums.value == pytest.approx(expected, rel=1e-9)
    by_row = dict(zip(map(tuple, x.tolist()), guess, strict=True))
    found = stats.explained_variance(x, lambda p: torch.stack([by_row[tuple(r)] for r in p.tolist()]), 64)
    assert found == pytest.approx(expected, rel=1e-9)
    constant = stats.ExplainedVariance()
    constant.add(torch.ones(3, 2), torch.zeros(3, 2))
    assert math.isnan(constant.value)


def test_loss_recovered():
    """Halfway is 0.5, worse than the ablation is negative, and no loss to recover is NaN."""
    assert stats.loss_recovered(1.0, 3.0, 2.0) == 0.5
    assert stats.loss_recovered(1.0, 3.0, 4.0) == -0.5
    assert math.isnan(stats.loss_recovered(1.0, 1.0, 2.0))


@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_quantiles_are_within_one_percent(scale):
    """Over sizes from 1 to 5,000 and any order of blocks; inverted_cdf is numpy's name of the definition."""
    rng = np.random.default_rng(0)
    for n in (1, 7, 100, 5000):
        values = (scale * rng.lognormal(0, 1.0, n)).astype(np.float32)
        counts = stats.Quantiles(2)
        for part in np.array_split(rng.permutation(values), min(n, 3)):
            counts.add(torch.ones(len(part), dtype=torch.int64), torch.from_numpy(part))
        for q in (0.5, 0.99):
            exact = np.quantile(values, q, method="inverted_cdf")
            assert float(counts.value(q)[1]) == pytest.approx(exact, rel=0.01)
        assert counts.value()[0] == 0
        assert counts.value()[1] <= values.max()


def test_p99_counts_active_rows_only():
    acts = torch.zeros(1000, 3)
    acts[:200, 1] = torch.linspace(1, 2, 200)
    acts[3, 2] = 5.0
    found = stats.p99(acts, chunk=70)
    assert found[0] == 0
    assert float(found[1]) == pytest.approx(float(acts[:200, 1].sort().values[197]), rel=0.01)
    assert float(found[2]) == pytest.approx(5.0, rel=0.01)


def test_perplexity():
    """exp of the mean negative log-probability over the counted tokens."""
    logp = torch.log(torch.tensor([[0.5, 0.25, 0.9], [0.1, 0.1, 0.1]]))
    counted = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(stats.perplexity(logp, counted), torch.tensor([8.0**0.5, 10.0]))


def test_f1_of_firing_against_counting():
    rng = np.random.default_rng(1)
    fires, truth = rng.random((40, 5)) < 0.4, rng.random((40, 3)) < 0.3
    fires[:, 4], truth[:, 2] = False, False
    found = stats.f1_of_firing(fires, truth)
    for unit in range(5):
        for finding in range(3):
            hit = (fires[:, unit] & truth[:, finding]).sum()
            total = fires[:, unit].sum() + truth[:, finding].sum()
            assert found[unit, finding] == pytest.approx(2 * hit / total if total else 0.0)


def test_bootstrap_is_paired_and_covers():
    """Equal seeds resample the same studies; the interval is as wide as the standard error says."""
    values = np.random.default_rng(2).normal(size=(400, 2))
    mean = stats.bootstrap_mean(values, draws=2000)
    width = (mean.high - mean.low) / (2 * 1.96 * values.std(0) / 20)
    assert mean.samples.shape == (2000, 2)
    assert ((width > 0.9) & (width < 1.1)).all()
    shifted = stats.bootstrap_mean(values + 1.0, draws=2000)
    np.testing.assert_allclose(shifted.samples - mean.samples, 1.0)


def test_wilson_is_known_and_never_leaves_zero_to_one():
    assert stats.wilson(0, 0) == (0.0, 1.0)
    low, high = stats.wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Wilson score interval, standard tables
    assert stats.wilson(0, 20)[0] == 0.0
    assert stats.wilson(20, 20)[1] == 1.0


def test_mean_map_divides_by_rows_per_patch():
    found = stats.mean_map(torch.tensor([[4.0, 3.0, 0.0]]), torch.tensor([2, 3, 0]))
    assert found.tolist() == [[2.0, 1.0, 0.0]]

"""Whitening from moments is SAELens' own, and an untrained SAE of whitened rows has random directions there."""

import pytest
import torch
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.whitening import Moments, pca_whitening, symmetric_whitening


@pytest.fixture
def rows() -> torch.Tensor:
    """1,000 rows of 24 dimensions whose variances span four decades."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1000, 24, generator=generator) @ torch.diag(torch.logspace(-1, 1, 24)) + 3


def moments(rows: torch.Tensor) -> Moments:
    found = Moments.none(rows.shape[1], rows.device)
    for part in rows.split(300):
        found.add(part)
    return found


def test_it_is_that_of_saelens(rows):
    """Mean, matrix and inverse equal those of `estimate_whitening`, but for the free signs of the axes."""
    scaler = ActivationScaler()
    scaler.estimate_whitening(24, iter(rows.split(250)), n_batches_for_norm_estimate=4)
    theirs, ours = scaler.whitening, pca_whitening(moments(rows))
    assert theirs is not None
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.matrix.abs(), theirs.matrix.abs(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.inverse_matrix.abs(), theirs.inverse_matrix.abs(), rtol=1e-6, atol=1e-9)


def test_symmetric_form_is_the_other_turned_back(rows):
    """Both forms differ by a rotation; rows get unit covariance and come back; the chunks do not matter."""
    matrix, inverse = symmetric_whitening(rows, chunk=300)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix @ inverse, torch.eye(24, dtype=torch.float64))
    pca = pca_whitening(moments(rows))
    torch.testing.assert_close(matrix @ matrix.T, pca.matrix @ pca.matrix.T)
    # The smallest variance is 0.01, of which eps = 0.001 takes a tenth.
    z = (rows.double() - rows.double().mean(0)) @ matrix
    torch.testing.assert_close(torch.cov(z.T), torch.eye(24, dtype=torch.float64), rtol=0, atol=0.1)


def test_last_bits_of_the_rows_stay_last_bits():
    """With equal variances axes are free to turn; the symmetric form hardly moves, so that processes agree."""
    flat = torch.randn(4000, 24, generator=torch.Generator().manual_seed(1))
    moved = flat * (1 + 1e-6 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(2)))
    one, other = symmetric_whitening(flat)[0], symmetric_whitening(moved)[0]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (3, 24), (24,)])
def test_too_few_rows_are_refused(shape):
    with pytest.raises(SAEError, match="cannot be whitened"):
        symmetric_whitening(torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(bad, rows):
    rows[3, 3] = bad
    with pytest.raises(SAEError, match="1000 rows cannot be computed"):
        symmetric_whitening(rows)
    with pytest.raises(SAEError, match="of 1 rows"):
        pca_whitening(moments(rows[:1]))

"""Whitening from moments is SAELens' own, and an untrained SAE of whitened rows has random directions there."""

import pytest
import torch
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import MatryoshkaTrainingSAE, untrained_like
from sae_lens_maira.sae.whitening import whitening_of


@pytest.fixture
def rows() -> torch.Tensor:
    """1,000 rows of 24 dimensions whose variances span four decades."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1000, 24, generator=generator) @ torch.diag(torch.logspace(-1, 1, 24)) + 3


def test_it_is_that_of_saelens(rows):
    """Mean, matrix and inverse equal those of `estimate_whitening`, but for the free signs of the axes."""
    scaler = ActivationScaler()
    scaler.estimate_whitening(24, iter(rows.split(250)), n_batches_for_norm_estimate=4)
    theirs, ours = scaler.whitening, whitening_of(rows, chunk=300)
    assert theirs is not None
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.matrix.abs(), theirs.matrix.abs(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.inverse_matrix.abs(), theirs.inverse_matrix.abs(), rtol=1e-6, atol=1e-9)


def test_rows_get_unit_covariance_and_come_back(rows):
    whitening = whitening_of(rows)
    z = (rows.double() - whitening.mean) @ whitening.matrix
    # The smallest variance is 0.01, of which eps = 0.001 takes a tenth.
    torch.testing.assert_close(torch.cov(z.T), torch.eye(24, dtype=torch.float64), rtol=0, atol=0.1)
    torch.testing.assert_close(z @ whitening.inverse_matrix + whitening.mean, rows.double())


@pytest.mark.parametrize("shape", [(24, 24), (3, 24), (24,)])
def test_too_few_rows_are_refused(shape, rows):
    with pytest.raises(SAEError, match="cannot be whitened"):
        whitening_of(torch.zeros(shape))


def test_an_untrained_sae_of_whitened_rows(make_config, rows):
    """Same sparsity, unit projections in whitened space where the plain one follows the loudest dimensions."""
    sae = MatryoshkaTrainingSAE(make_config(d_in=24))
    plain, whitened = (untrained_like(sae, rows, l0=5.0, seed=1, whiten=w) for w in (False, True))
    notes = [dict(s.cfg.metadata.untrained or {}) for s in (plain, whitened)]
    assert [note["whitened"] for note in notes] == [False, True]
    assert float((whitened.encode(rows) > 0).sum(-1).float().mean()) == pytest.approx(5.0, abs=0.05)
    spread = [((rows - rows.mean(0)) @ s.W_enc).std(0) for s in (plain, whitened)]
    assert spread[0].max() > 3
    assert spread[1].detach().numpy() == pytest.approx(1, abs=0.1)
    # Encoder column and decoder row are one direction seen from both sides: W_dec[j] Wenc[:, j] = g |u|^2 = g.
    gain = torch.tensor(notes[1]["gain"])
    torch.testing.assert_close(
        (whitened.W_dec * whitened.W_enc.T).sum(1), gain.expand(48), rtol=1e-3, atol=1e-4
    )

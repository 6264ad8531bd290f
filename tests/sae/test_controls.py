"""Controls: as sparse as their SAE, reproducible, and each what its equation says."""

import pytest
import torch

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import CONTROLS, MatryoshkaTrainingSAE, control_kind, load_matryoshka, make_control
from sae_lens_maira.sae.whitening import symmetric_whitening

MADE = CONTROLS[:3]


@pytest.fixture
def rows() -> torch.Tensor:
    """1,000 rows of 24 dimensions whose variances span four decades, far from zero."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1000, 24, generator=generator) @ torch.diag(torch.logspace(-1, 1, 24)) + 3


@pytest.fixture
def sae(make_config):
    return MatryoshkaTrainingSAE(make_config(d_in=24))


def l0_of(control, rows):
    return float((control.encode(rows) > 0).sum(-1).float().mean())


@pytest.mark.parametrize("kind", MADE)
def test_controls_have_the_wanted_sparsity_and_name_themselves(kind, sae, rows, tmp_path):
    control = sae
    for l0 in (0.0, 1.0, 5.0):
        control = make_control(kind, sae, rows, seed=2, l0=l0)
        assert l0_of(control, rows) == pytest.approx(l0, abs=0.01)
        assert control_kind(control) == kind
    assert control.cfg.metadata.hook_name == sae.cfg.metadata.hook_name
    control.save_model(tmp_path)
    assert control_kind(load_matryoshka(tmp_path)) == kind
    assert control_kind(sae) is None


@pytest.mark.parametrize("kind", MADE)
def test_without_l0_the_saes_own_is_taken(kind, sae, rows):
    like = make_control("untrained", sae, rows, seed=9, l0=4.0)
    assert l0_of(make_control(kind, like, rows), rows) == pytest.approx(4.0, abs=0.02)


def test_seeds_give_other_directions_and_levels_are_kept(sae, rows):
    first, again, other = (make_control("untrained", sae, rows, seed, l0=5.0) for seed in (1, 1, 2))
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)
    assert first.level_widths == load_matryoshka(sae).level_widths


def test_the_gain_is_the_best_single_factor(sae, rows):
    control = make_control("untrained", sae, rows, l0=5.0)

    @torch.no_grad()
    def error(factor):
        recons = factor * (control.decode(control.encode(rows)) - control.b_dec) + control.b_dec
        return float((recons - rows).pow(2).sum())

    assert error(1.0) < min(error(0.98), error(1.02))


def test_raw_latents_are_dimensions_with_a_sign(sae, rows):
    raw = make_control("raw", sae, rows, l0=4.0)
    acts = raw.encode(rows)
    assert acts.shape == (1000, 48)
    z = (rows - rows.mean(0)) / rows.std(0)
    for latent in (0, 5, 29):
        column = z[:, latent % 24] * (1 if latent < 24 else -1)
        expected = torch.where(acts[:, latent] > 0, column, 0.0)
        torch.testing.assert_close(acts[:, latent], expected, atol=1e-4, rtol=1e-4)


def test_whitened_latents_are_untrained_latents_of_whitened_rows(sae, rows):
    """Same directions in whitened space, where every projection has unit variance."""
    whitened = make_control("untrained_whitened", sae, rows, seed=1, l0=5.0)
    white = (rows - rows.mean(0)) @ symmetric_whitening(rows)[0].float()
    plain = make_control("untrained", sae, white, seed=1, l0=5.0)
    torch.testing.assert_close(whitened.encode(rows), plain.encode(white), rtol=1e-3, atol=1e-3)
    spread = ((rows - rows.mean(0)) @ whitened.W_enc).std(0)
    torch.testing.assert_close(spread, torch.ones(48), rtol=0, atol=0.1)
    loud = make_control("untrained", sae, rows, seed=1, l0=5.0)
    assert float(((rows - rows.mean(0)) @ loud.W_enc).std(0).max()) > 3
    # Encoder column and decoder row are one direction seen from both sides: W_dec[j] W_enc[:, j] = gain.
    facts = whitened.cfg.metadata.control
    assert facts is not None
    both = (whitened.W_dec * whitened.W_enc.T).sum(1)
    torch.testing.assert_close(both, torch.full((48,), facts["gain"]), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_made_is_refused(sae, rows):
    for kind, given, l0, message in (
        ("untrained", rows, 48.0, "cannot be set"),
        ("untrained", rows[:, :3], 5.0, "was expected"),
        ("raw", rows[:1], 5.0, "2 or more"),
        ("untrained_whitened", rows[:20], 5.0, "cannot be whitened"),
        ("frozen_decoder", rows, 5.0, "train --control frozen_decoder"),
        ("random", rows, 5.0, "untrained, untrained_whitened, raw"),
    ):
        with pytest.raises(SAEError, match=message):
            make_control(kind, sae, given, l0=l0)

"""Matching latents: a permuted and duplicated SAE is recovered, an unrelated one is not, memory is bounded."""

import tracemalloc

import numpy as np
import pytest
import torch

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig, match_latents

D_IN = 16


def sae_of(encoder, decoder, threshold, widths=None):
    n = encoder.shape[1]
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=encoder.shape[0], d_sae=n, matryoshka_widths=widths or [n]))
    state = {"W_enc": encoder, "W_dec": decoder, "b_enc": torch.zeros(n), "b_dec": torch.zeros(len(encoder))}
    sae.load_state_dict(state | {"threshold": torch.full((n,), threshold)})
    return sae


def random_sae(n, seed, d_in=D_IN, threshold=1.0, widths=None):
    directions = torch.nn.functional.normalize(
        torch.randn(n, d_in, generator=torch.Generator().manual_seed(100 + seed)), dim=1
    )
    return sae_of(directions.T.contiguous(), directions, threshold, widths)


def rows_of(n, seed=0, d_in=D_IN):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def test_a_permuted_and_duplicated_sae_is_recovered():
    """Every latent finds itself, whichever SAE is searched; a copy has the same nearest latent."""
    original = random_sae(40, 0, widths=[10, 40])
    source = torch.cat([torch.randperm(40, generator=torch.Generator().manual_seed(1)), torch.arange(8)])
    copied = sae_of(original.W_enc[:, source].detach(), original.W_dec[source].detach(), 1.0)
    found = match_latents(original, copied, rows_of(3000))
    assert (source.numpy()[found.pairs["match"]] == found.pairs["latent"]).all()
    np.testing.assert_allclose(found.pairs[["correlation", "cosine", "score"]], 1, atol=1e-5)
    assert found.pairs["found"].all()
    assert found.pairs["level"].tolist() == [0] * 10 + [1] * 30
    assert found.summary.means["shuffled"]["score"] < found.summary.means["untrained"]["score"] < 0.7

    back = match_latents(copied, original, rows_of(3000)).pairs
    assert (back["nearest"] == source.numpy()[back["latent"]]).all()
    assert (back["match"] == -1).sum() == 8  # 48 latents, 40 partners
    assert back.loc[back["match"] >= 0, "match"].is_unique


def test_an_unrelated_sae_scores_as_an_untrained_one_does():
    """Directions in 16 dimensions are near each other: shuffled pairs alone would call most of these found."""
    found = match_latents(random_sae(60, 0), random_sae(60, 1), rows_of(4000))
    means = found.summary.means
    assert found.summary.found <= 0.1 * found.summary.pairs
    assert abs(means["matched"]["score"] - means["untrained"]["score"]) < 0.05
    assert (found.pairs["score"] > np.quantile(found.references["shuffled"], 0.99)).mean() > 0.5


def test_correlation_is_pearson_of_the_activations():
    """The sparse, blocked computation equals numpy's, at two hook points."""
    first, second = random_sae(30, 0), random_sae(20, 1)
    x, y = rows_of(500), rows_of(500) + 0.5 * rows_of(500, seed=3)
    pairs = match_latents(first, second, x, y, chunk=64).pairs
    a, b = first.encode(x).detach().numpy(), second.encode(y).detach().numpy()
    made = pairs[pairs["match"] >= 0]
    assert len(made) == 20
    for row in made.itertuples():
        expected = np.corrcoef(a[:, row.latent], b[:, row.match])[0, 1]
        assert row.correlation == pytest.approx(expected, abs=1e-5)
        cosine = float(first.W_dec[row.latent] @ second.W_dec[row.match])
        assert row.cosine == pytest.approx(cosine, abs=1e-5)
    # The two parts of the score are on one scale, so it is their mean.
    np.testing.assert_allclose(made["score"], (made["correlation"] + made["cosine"]) / 2, atol=1e-9)


def test_latents_that_never_fire_are_left_out():
    sae = random_sae(20, 0)
    with torch.no_grad():
        sae.threshold[5] = 1e6
    found = match_latents(sae, random_sae(20, 0), rows_of(2000))
    assert 5 not in found.pairs["latent"].tolist()
    assert found.summary.active == 19


def test_memory_is_one_matrix_of_scores():
    """1,500 by 1,500 latents take 18 MB of scores; the peak stays below three times that."""
    sae = random_sae(1500, 0, threshold=2.0)
    tracemalloc.start()
    found = match_latents(sae, sae, rows_of(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.summary.pairs > 1000
    assert peak < 3 * 8 * 1500**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other_rows": rows_of(10)}, "rows of the same positions"),
        ({"rows": rows_of(50, d_in=8)}, r"\(n, 16\) was expected"),
        ({"rows": torch.zeros(50, D_IN)}, "nothing can be"),
        ({"other": random_sae(20, 1, d_in=8)}, "16 and 8 dimensions"),
        ({"matrix_bytes": 100}, "limit is"),
    ],
)
def test_what_cannot_be_matched_is_refused(change, message):
    arguments = {"sae": random_sae(20, 0), "other": random_sae(20, 1), "rows": rows_of(50)} | change
    with pytest.raises(SAEError, match=message):
        match_latents(**arguments)

"""LatentSubset: a few latents read alone are what the whole SAE reads, and TopK SAEs are read whole."""

import pytest
import torch
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_maira.steering.engine import LatentSubset

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("chosen", [[7], [60, 3, 9], list(range(64))])
def test_columns_are_those_of_the_whole(steering_sae, chosen):
    """Activations and steps of the chosen latents agree with `encode` and with W_dec, copied or not."""
    hidden = torch.randn(200, 128)
    columns = LatentSubset(steering_sae, chosen)
    with torch.no_grad():
        whole = steering_sae.encode(hidden)
    torch.testing.assert_close(columns.encode(hidden), whole[:, chosen], rtol=1e-5, atol=1e-5)
    assert torch.equal(columns.slots(torch.tensor(chosen[::-1])), torch.arange(len(chosen)).flip(0))
    change = torch.randn(5, len(chosen))
    torch.testing.assert_close(columns.decode(change), change @ steering_sae.W_dec.detach()[chosen])


def test_the_shortcut_is_taken_and_can_fail(steering_sae):
    """Three of 64 latents are read without the others: a poisoned neighbour does not show, a poisoned own row does."""
    hidden = torch.randn(8, 128)
    broken = type(steering_sae)(steering_sae.cfg)
    broken.load_state_dict(steering_sae.state_dict())
    with torch.no_grad():
        broken.W_enc[:, 50] = float("nan")
    assert bool(torch.isfinite(LatentSubset(broken, [1, 2, 3]).encode(hidden)).all())
    assert not bool(torch.isfinite(LatentSubset(broken, [1, 50]).encode(hidden)).all())


def test_latents_that_compete_are_read_together():
    """In a TopK SAE a latent outside the top k is 0 however large its own pre-activation is."""
    sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=2, device="cpu"))
    with torch.no_grad():
        sae.W_enc.normal_()
    hidden = torch.randn(40, 16)
    with torch.no_grad():
        whole = sae.encode(hidden)
    assert torch.equal(LatentSubset(sae, [4, 5]).encode(hidden), whole[:, [4, 5]])
    assert float((whole[:, [4, 5]] == 0).float().mean()) > 0.5

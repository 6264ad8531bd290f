"""A Matryoshka SAE of random weights on the phantom's stream, dense enough that its latents fire."""

import pytest
import torch

from sae_lens_maira import stats
from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="session")
def few():
    """Four studies of unequal length, so that a batch has left padding."""
    return generate_studies(4, seed=99)


@pytest.fixture(scope="session")
def steering_sae(phantom, few):
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(d_in=128, d_sae=64, matryoshka_widths=[8, 24, 64], device="cpu")
    config.metadata.hook_name = HOOK
    sae = MatryoshkaSAE(config)
    with torch.no_grad():
        direction = torch.nn.functional.normalize(torch.randn(64, 128), dim=1)
        sae.W_dec.copy_(direction)
        sae.W_enc.copy_(direction.T)
        sae.b_enc.zero_()
        sae.threshold.fill_(0.05)
    return sae.eval()


@pytest.fixture(scope="session")
def p99(phantom, few, steering_sae):
    rows = read_rows(phantom, few, HOOK, RowSettings(roles="all"), progress=False)
    with torch.no_grad():
        return stats.p99(steering_sae.encode(rows.values))

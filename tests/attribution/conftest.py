"""The phantom with a report behind its prompt, and a Matryoshka SAE of random weights at one block's output."""

import pytest
import torch

from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="session")
def hooked(phantom):
    return HookedMaira2(phantom)


@pytest.fixture(scope="session")
def study():
    """A study with at least two findings and no prior."""
    return next(s for s in generate_studies(40, seed=123) if not s.has_prior and len(s.truth or ()) >= 2)


@pytest.fixture(scope="session")
def sae():
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(d_in=128, d_sae=96, matryoshka_widths=[32, 96], device="cpu")
    config.metadata.hook_name = HOOK
    made = MatryoshkaSAE(config)
    with torch.no_grad():
        direction = torch.nn.functional.normalize(torch.randn(96, 128), dim=1)
        made.W_dec.copy_(direction)
        made.W_enc.copy_(direction.T)
        made.b_enc.zero_()
        made.b_dec.copy_(torch.randn(128) / 10)
        made.threshold.fill_(0.05)
    return made.eval()

"""Rows of phantom studies at one hook point and an SAE that has learnt nothing, for the streaming pass."""

import pytest
import torch

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, make_control

HOOK = "blocks.3.hook_resid_post"
ROLES = ("image", "indication", "technique", "comparison", "prior_report", "report")


@pytest.fixture(scope="session")
def studies():
    return generate_studies(40, seed=77)


@pytest.fixture(scope="session")
def rows(phantom, studies):
    return read_rows(phantom, studies, HOOK, RowSettings(roles=ROLES, batch_size=16), progress=False)


@pytest.fixture(scope="session")
def sae(rows):
    """96 latents in three levels, 6 active per row."""
    config = MatryoshkaTrainingSAEConfig(
        d_in=rows.values.shape[1], d_sae=96, k=6, matryoshka_widths=[16, 48, 96], device="cpu"
    )
    config.metadata.hook_name = HOOK
    like = MatryoshkaTrainingSAE(config)
    torch.manual_seed(0)
    return make_control("untrained", like, rows.values, l0=6.0, seed=1)


@pytest.fixture(scope="session")
def acts(sae, rows):
    with torch.no_grad():
        return sae.encode(rows.values)

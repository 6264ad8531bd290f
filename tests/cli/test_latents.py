"""What stands in for a trained SAE in `latents`: as sparse as it is, and set on enough rows."""

import pytest
import torch

from sae_lens_maira.cli.latents import _stand_in
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.latents.source import ModelSource
from sae_lens_maira.phantom import generate_studies, load_phantom
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, make_control


@pytest.fixture(scope="module")
def blocks():
    """40 studies in units of 8: a unit's report tokens are fewer than a covariance wants."""
    maira, studies = load_phantom(), generate_studies(40, seed=10_000)
    harvested = ModelSource(maira, studies, "blocks.3.hook_resid_post", "generated_only", 8)
    return [list(harvested[unit]) for unit in range(len(harvested))]  # read once: these run the model anew


@pytest.fixture(scope="module")
def dictionary(blocks):
    rows = torch.cat([block.values for block in blocks[0]])
    config = MatryoshkaTrainingSAEConfig(d_in=128, d_sae=256, k=6, matryoshka_widths=[64, 256])
    return make_control("untrained", MatryoshkaTrainingSAE(config), rows, l0=6.0, seed=7)


@pytest.mark.parametrize("control", ["untrained", "untrained_whitened", "raw"])
def test_controls_are_as_sparse_as_the_sae(control, blocks, dictionary):
    rows = torch.cat([block.values for unit in range(len(blocks)) for block in blocks[unit]])
    control_sae = _stand_in(control, dictionary, blocks, seed=0)
    wanted, got = (float((sae.encode(rows) > 0).sum(-1).float().mean()) for sae in (dictionary, control_sae))
    assert got == pytest.approx(wanted, rel=0.35)  # set on the first rows, measured on all


def test_whitening_reads_on_until_there_are_rows_enough(blocks, dictionary):
    """One unit has fewer than eight rows a dimension; the control's directions have unit spread over all rows."""
    assert sum(len(block) for block in blocks[0]) < 8 * 128
    rows = torch.cat([block.values for unit in range(len(blocks)) for block in blocks[unit]])
    control_sae = _stand_in("untrained_whitened", dictionary, blocks, seed=0)
    spread = ((rows - rows.mean(0)) @ control_sae.W_enc).std(0)
    assert float(spread.detach().mean()) == pytest.approx(1, abs=0.15)


def test_no_rows_are_said(blocks, dictionary):
    empty = ModelSource(load_phantom(), [], "blocks.3.hook_resid_post", "generated_only", 8)
    with pytest.raises(ConfigError, match="no rows"):
        _stand_in("raw", dictionary, empty, seed=0)

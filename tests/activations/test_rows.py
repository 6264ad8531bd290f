"""Rows equal transformers' own hidden states, role by role; the provider uses every row equally often."""

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import RowProvider, harvest_rows
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.phantom import generate_studies

pytestmark = pytest.mark.compat

LAYER = 3
HOOK = f"blocks.{LAYER}.hook_resid_post"


@pytest.fixture(scope="module")
def studies():
    return generate_studies(6, seed=123)


@pytest.fixture(scope="module")
def rows(phantom, studies):
    return harvest_rows(phantom, studies, HOOK, roles="all", batch_size=4, progress=False)


def test_rows_are_the_hidden_states_of_transformers(phantom, studies, rows):
    """Every kept row is `output_hidden_states` of the same study alone, at its own position and with its own id."""
    for number, study in enumerate(studies):
        encoding = phantom.processor.encode(study, report="teacher")
        with torch.no_grad():
            states = phantom.model(**encoding.model_inputs(), output_hidden_states=True).hidden_states
        mine = rows.where(rows.study == number)
        assert len(mine) == encoding.input_ids.shape[1]
        assert (mine.token == encoding.input_ids[0].numpy()).all()
        assert (mine.role == encoding.roles[0].numpy()).all()
        torch.testing.assert_close(mine.values, states[LAYER + 1][0][mine.position], rtol=1e-4, atol=1e-4)


def test_presets_keep_their_roles(phantom, studies):
    """The paper's filter keeps neither patches nor boilerplate; image_only keeps all patches of all images."""
    paper = harvest_rows(phantom, studies, HOOK, roles="paper", progress=False)
    assert not set(paper.role) & {TokenRole.IMAGE, TokenRole.TEMPLATE, TokenRole.PAD, TokenRole.BOS}
    images = harvest_rows(phantom, studies, HOOK, roles="image_only", progress=False)
    n = sum(x is not None for s in studies for x in (s.frontal, s.lateral, s.prior_frontal))
    assert len(images) == 64 * n
    assert sorted(zip(images.patch_row[:64], images.patch_col[:64], strict=True)) == [
        (r, c) for r in range(8) for c in range(8)
    ]


def test_image_rate_thins_patches_only(phantom, studies, rows):
    """A rate of a quarter keeps every text row and about a quarter of the patches."""
    thin = harvest_rows(phantom, studies, HOOK, roles="all", image_rate=0.25, progress=False)
    assert (~thin.is_image).sum() == (~rows.is_image).sum()
    assert 0.15 < thin.is_image.sum() / rows.is_image.sum() < 0.35


def test_nothing_kept_is_an_error(phantom, studies):
    with pytest.raises(StoreError, match="nothing was kept"):
        harvest_rows(phantom, studies[:1], HOOK, roles=[TokenRole.PHRASE], progress=False)


def test_wrong_mask_is_an_error(rows):
    with pytest.raises(StoreError, match="one entry per row"):
        rows.where(np.ones(3, dtype=bool))


def test_provider_covers_every_row_once_a_pass():
    """Two passes of batches that do not divide the rows use every row exactly twice, in another order."""
    values = torch.arange(70.0)[:, None]
    provider = RowProvider(values, batch_size=20, seed=1)
    seen = torch.cat([next(provider) for _ in range(7)]).flatten()
    assert torch.equal(seen.sort().values, torch.arange(70.0).repeat_interleave(2))
    assert not torch.equal(seen[:70], seen[70:])
    again = RowProvider(values, batch_size=20, seed=1)
    assert torch.equal(next(again), seen[:20, None])


def test_no_rows_is_an_error():
    with pytest.raises(StoreError, match="no rows"):
        RowProvider(torch.empty(0, 3), 4)

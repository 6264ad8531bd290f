"""Rows equal transformers' own hidden states, role by role; presets, rates and limits on norms keep what they say."""

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import RowProvider, RowSettings, read_rows
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.phantom import generate_studies

pytestmark = pytest.mark.compat

LAYER = 3
HOOK = f"blocks.{LAYER}.hook_resid_post"


@pytest.fixture(scope="module")
def studies():
    return generate_studies(6, seed=123)


def read(phantom, studies, **settings):
    return read_rows(phantom, studies, HOOK, RowSettings(**settings), progress=False)


@pytest.fixture(scope="module")
def rows(phantom, studies):
    return read(phantom, studies, roles="all", batch_size=4)


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
    """`paper` keeps neither patches nor boilerplate, `image_only` all patches, `paper_last_image` one per image."""
    paper = read(phantom, studies, roles="paper")
    assert not set(paper.role) & {TokenRole.IMAGE, TokenRole.TEMPLATE, TokenRole.PAD, TokenRole.BOS}
    images = read(phantom, studies, roles="image_only")
    n = sum(x is not None for s in studies for x in (s.frontal, s.lateral, s.prior_frontal))
    assert len(images) == 64 * n
    assert sorted(zip(images.patch_row[:64], images.patch_col[:64], strict=True)) == [
        (r, c) for r in range(8) for c in range(8)
    ]
    last = read(phantom, studies, roles="paper_last_image")
    assert (~last.is_image).sum() == len(paper)
    assert last.is_image.sum() == n
    assert set(zip(last.patch_row[last.is_image], last.patch_col[last.is_image], strict=True)) == {(7, 7)}
    sampled = read(phantom, studies, roles="paper_last_image", rates={"image": 0.1})
    assert n < sampled.is_image.sum() < 64 * n // 4
    assert ((sampled.patch_row == 7) & (sampled.patch_col == 7)).sum() == n


def test_rates_thin_patches_only(phantom, studies, rows):
    """A rate of a quarter keeps every text row and about a quarter of the patches, the same in any batch."""
    thin = read(phantom, studies, roles="all", rates={"image": 0.25})
    assert (~thin.is_image).sum() == (~rows.is_image).sum()
    assert 0.15 < thin.is_image.sum() / rows.is_image.sum() < 0.35
    alone = read(phantom, studies[2:3], roles="all", rates={"image": 0.25}, batch_size=1)
    assert (alone.position == thin.position[thin.study == 2]).all()


@pytest.mark.parametrize("batch_size", [1, 6])
def test_a_multiple_of_the_median_norm_drops_outliers(phantom, studies, rows, batch_size):
    """The limit is the median of the study's own rows of that modality, whatever rates and batches are."""
    settings = {"roles": "all", "rates": {"image": 0.5}, "batch_size": batch_size}
    every, kept = read(phantom, studies, **settings), read(phantom, studies, **settings, max_norm_ratio=1.2)
    norms = rows.values.norm(dim=1)
    expected = []
    for study, position, image in zip(every.study, every.position, every.is_image, strict=True):
        same = (rows.study == study) & (rows.is_image == image)
        here = (rows.study == study) & (rows.position == position)
        if norms[here] <= 1.2 * norms[same].median():
            expected.append((study, position))
    assert list(zip(kept.study, kept.position, strict=True)) == expected
    assert 0.3 * len(every) < len(kept) < len(every)


def test_what_cannot_be_kept_is_an_error(phantom, studies):
    with pytest.raises(StoreError, match="Nothing was kept"):
        read(phantom, studies[:1], roles=[TokenRole.PHRASE])
    with pytest.raises(StoreError, match="do not tell"):
        read(phantom, studies[:1], reports="both")
    with pytest.raises(StoreError, match="expected a positive number"):
        RowSettings(max_norm_ratio=-1.0)
    with pytest.raises(StoreError, match="expected at least 1"):
        RowSettings(batch_size=0)
    with pytest.raises(StoreError, match="expected one of teacher"):
        RowSettings(reports="none")  # pyright: ignore[reportArgumentType] - on purpose


def test_prompts_alone_are_read_without_reports(phantom, studies):
    rows = read(phantom, studies, roles="all", reports="prompt")
    assert TokenRole.REPORT not in set(rows.role)
    assert len(set(rows.study)) == len(studies)


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
    """An empty tensor is refused with a StoreError, since no batch could be made."""
    with pytest.raises(StoreError, match="no rows"):
        RowProvider(torch.empty(0, 3), 4)

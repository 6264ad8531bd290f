"""One study's map: confined to its place, exact in the stream, of latents that differ there; or refused."""

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.phantom import generate_studies, truth_labels
from sae_lens_maira.steering.interventions import Direction
from sae_lens_maira.steering.maps import (
    LatentMap,
    boxes_place,
    difference_map,
    exemplar_map,
    mean_patch_maps,
    random_direction,
)
from sae_lens_maira.steering.positions import Patches, patches
from sae_lens_maira.steering.prompts import SharedPrompts

HOOK = "blocks.3.hook_resid_post"

SHAPE = (8, 8)


def test_the_place_is_the_boxes_and_a_margin():
    """A box of two by one patches, with no margin 2 patches, with one 4 by 3; no box is the whole image."""
    box = (0.26, 0.26, 0.49, 0.37)
    assert boxes_place([box], SHAPE, margin=0).sum() == 2
    grown = boxes_place([box], SHAPE).reshape(SHAPE)
    assert grown.sum() == 12
    assert bool(grown[1:4, 1:5].all())
    assert boxes_place([], SHAPE).sum() == 64


def test_latents_are_those_that_differ_inside_the_place():
    """A latent that differs outside only is not chosen, and the map is the difference inside and 0 elsewhere."""
    acts, absent, decoder = torch.zeros(64, 4), torch.zeros(64, 4), torch.eye(4, 6)
    acts[10, 1], acts[40, 2], absent[10, 3] = 2.0, 50.0, 1.0
    place = torch.zeros(64)
    place[10] = 1
    exemplar = exemplar_map(acts, absent, decoder, place, SHAPE, n_latents=3)
    assert exemplar.latents == (1, 3)
    delta = exemplar.delta(decoder)
    assert delta[10].tolist() == [0, 2, 0, -1, 0, 0]
    assert delta.abs().sum() == 3


def test_interventions_add_the_map(phantom):
    """Latents' interventions write the same reports as the map added patch by patch as directions."""
    generator = torch.Generator().manual_seed(0)
    studies = generate_studies(3, seed=11)
    prompts = SharedPrompts(phantom, "blocks.0.hook_resid_post", studies)
    assert prompts.frontal(0).shape == (64, 128)
    # A dictionary of the stream's own dimensions, whose latents are read and added without an SAE.
    absent = torch.stack([prompts.frontal(i) for i in (1, 2)]).mean(0)
    place = (torch.rand(64, generator=generator) < 0.3).float()
    exemplar = exemplar_map(prompts.frontal(0), absent, torch.eye(128), place, SHAPE, n_latents=128)
    by_dimension = [
        Direction(vector=torch.eye(128)[j], strength=1.0, where=patches(grid=grid.reshape(SHAPE)))
        for j, grid in zip(exemplar.latents, exemplar.grids.T, strict=True)
    ]
    by_patch = []
    for p in place.nonzero()[:, 0].tolist():
        here = torch.zeros(64)
        here[p] = 1
        vector = exemplar.delta(torch.eye(128))[p]
        by_patch.append(Direction(vector=vector, strength=1.0, where=patches(grid=here.reshape(SHAPE))))
    assert prompts.write([1, 2], by_dimension).texts == prompts.write([1, 2], by_patch).texts
    assert [i.latents[0] for i in exemplar.interventions(2.0)] == list(exemplar.latents)


def test_other_latents_move_every_patch_as_far():
    """A control on other latents has the map's norm at every patch, whatever the length of their decoder rows."""
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(12, 6, generator=generator) * torch.arange(1, 13)[:, None]
    own = LatentMap((1, 4, 7), torch.randn(64, 3, generator=generator), SHAPE)
    other = own.on_other_latents((0, 9, 11), decoder)
    torch.testing.assert_close(other.delta(decoder).norm(dim=1), own.delta(decoder).norm(dim=1))
    assert other.latents == (0, 9, 11)


def test_refusals():
    """Activations of another SAE, and an exemplar that shows nothing."""
    same = torch.ones(64, 4)
    with pytest.raises(InterventionError, match="the same SAE"):
        exemplar_map(same, same, torch.eye(5), torch.ones(64), SHAPE)
    with pytest.raises(InterventionError, match="nothing to add"):
        exemplar_map(same, same, torch.eye(4), torch.ones(64), SHAPE)


def test_the_random_control_has_the_norm_of_the_map_at_every_patch():
    delta = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    control = random_direction(delta, (8, 8), 1.0, seed=3)
    assert isinstance(control.where, Patches)
    assert control.where.grid is not None
    torch.testing.assert_close(control.vector.norm(), torch.tensor(1.0))
    torch.testing.assert_close(control.where.grid.flatten(), delta.norm(dim=1))


@pytest.fixture(scope="module")
def studies():
    return generate_studies(12, seed=321)


def test_mean_maps_are_means_by_hand(phantom, studies):
    """The map's patch (2, 5) is the mean of that patch's rows over positive and negative studies."""
    rows = read_rows(phantom, studies, HOOK, RowSettings(roles="image_only"), progress=False)
    positive = truth_present(studies)
    present, _ = mean_patch_maps(rows, lambda x: x, positive, ~positive)
    here = rows.where((rows.view == 0) & (rows.patch_row == 2) & (rows.patch_col == 5))
    expected = here.where(positive[here.study]).values.mean(0)
    torch.testing.assert_close(present[2 * 8 + 5], expected, rtol=1e-4, atol=1e-4)
    made = difference_map(rows, lambda x: x, torch.eye(128), positive, ~positive, n_latents=4)
    absent = mean_patch_maps(rows, lambda x: x, positive, ~positive)[1]
    assert made.latents == tuple((present - absent).norm(dim=0).topk(4).indices.tolist())
    torch.testing.assert_close(made.grids, (present - absent)[:, list(made.latents)])
    with pytest.raises(InterventionError, match="one side"):
        mean_patch_maps(rows, lambda x: x, positive, positive & ~positive)
    with pytest.raises(InterventionError, match="frontal"):
        mean_patch_maps(rows.where(rows.view == 9), lambda x: x, positive, ~positive)


def truth_present(studies):
    labels = np.stack([truth_labels(study) for study in studies])
    return labels[:, labels.any(0) & ~labels.all(0)][:, 0]

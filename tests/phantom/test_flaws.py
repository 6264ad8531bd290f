"""Planted errors: the stated linear map of every patch, in a copy, and errors of the planted kinds in reports."""

import pytest
import torch

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.phantom import generate_studies, read_report
from sae_lens_maira.phantom.flaws import Flaw, plant, planted_coefficient, projected_patches


@pytest.fixture(scope="module")
def teachers():
    return generate_studies(80, seed=71_000)


def test_nothing_planted_is_the_same_model(phantom, teachers):
    """Shares of 0 leave every patch as it is, to rounding."""
    same = plant(phantom, teachers, Flaw(loss=0.0, confusion=0.0))
    torch.testing.assert_close(
        projected_patches(same, teachers[:4]), projected_patches(phantom, teachers[:4]), rtol=1e-4, atol=1e-3
    )


def test_the_flaw_is_in_a_copy_and_of_rank_two(phantom, teachers):
    """The given phantom keeps its weights; what changes in a patch is in a plane, wherever the patch is."""
    before = phantom.model.model.multi_modal_projector.layers[-1].weight.clone()
    flawed = plant(phantom, teachers, Flaw())
    assert torch.equal(phantom.model.model.multi_modal_projector.layers[-1].weight, before)
    moved = projected_patches(flawed, teachers[:6]) - projected_patches(phantom, teachers[:6])
    sizes = torch.linalg.svdvals(moved.flatten(0, 1))
    assert sizes[1] > 10 * sizes[2]


def test_the_planted_coefficient_is_what_is_added(phantom, teachers):
    """Without a loss, the patches move along one direction, by the coefficient."""
    flaw = Flaw(loss=0.0)
    study = teachers[3]
    moved = projected_patches(plant(phantom, teachers, flaw), [study])[0]
    moved -= projected_patches(phantom, [study])[0]
    coefficient = planted_coefficient(phantom, teachers, flaw)(study)
    torch.testing.assert_close(moved.norm(dim=1), coefficient.abs(), rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_errors_are_of_the_planted_kinds(phantom, teachers):
    """The missed finding is stated less often where it is, and the false one where only the other is."""
    from sae_lens_maira.maira2 import generate_reports

    flaw = Flaw()
    flawed = plant(phantom, teachers, flaw)
    shown = [s for s in generate_studies(160, seed=72_000) if s.prior_frontal is None]
    wanted = [s for s in shown if flaw.missed in s.present_keys][:10]
    fooled = [s for s in shown if flaw.seen in s.present_keys and flaw.stated not in s.present_keys][:10]
    rates = {}
    for name, maira in (("clean", phantom), ("flawed", flawed)):
        texts = [
            r.text
            for r in generate_reports(maira.model, maira.processor, wanted + fooled, max_new_tokens=100)
        ]
        stated = [read_report(text).present for text in texts]
        rates[name] = (
            sum(flaw.missed in labels for labels in stated[:10]),
            sum(flaw.stated in labels for labels in stated[10:]),
        )
    assert rates["clean"][0] >= 9
    assert rates["clean"][1] <= 1
    assert rates["flawed"][0] <= 5
    assert rates["flawed"][1] >= 5


def test_bad_input(teachers):
    """The three findings of a flaw must be different and known."""
    with pytest.raises(ConfigError, match="three different"):
        Flaw(missed="nodule", seen="nodule")
    with pytest.raises(ConfigError, match="three different"):
        Flaw(missed="gout")

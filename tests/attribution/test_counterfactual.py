"""Counterfactual studies: only the named part changes, and no report goes silently with its image."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from sae_lens_maira.attribution.counterfactual import compare, counterfactual
from sae_lens_maira.errors import StudyError
from sae_lens_maira.phantom import generate_studies

pytestmark = pytest.mark.compat
PARTS = {
    "prior_image": "prior_frontal",
    "prior_report": "prior_report",
    "lateral": "lateral",
    "indication": "indication",
    "technique": "technique",
    "comparison": "comparison",
}


@pytest.fixture(scope="module")
def with_prior():
    return next(s for s in generate_studies(60, seed=321) if s.prior_frontal is not None and s.prior_report)


@pytest.mark.parametrize("part", [name for name in PARTS if name != "prior_image"])
def test_one_part_is_removed_and_no_other(with_prior, part):
    """Every part that stays is the same object; truth and own report are dropped, since they may no longer hold."""
    removed: Any = {part: None}
    made = counterfactual(with_prior, **removed)
    for field in dataclasses.fields(made):
        if field.name == PARTS[part] or field.name in ("truth", "report", "grounded_report"):
            assert getattr(made, field.name) is None
        else:
            assert getattr(made, field.name) is getattr(with_prior, field.name)


def test_a_prior_image_takes_no_report_with_it_silently(with_prior):
    with pytest.raises(StudyError, match="prior report without a prior image"):
        counterfactual(with_prior, prior_image=None)
    made = counterfactual(with_prior, prior_image=None, prior_report=None)
    assert made.prior_frontal is None
    assert made.prior_report is None


def test_nothing_changed_is_refused(with_prior):
    with pytest.raises(StudyError, match="Nothing was changed"):
        counterfactual(with_prior)


def test_regions_are_changed_inside_their_box_only(with_prior):
    """Erasing fills between the region's borders; pasting takes the other image's pixels there."""
    image = np.tile(np.arange(100, dtype=np.float32), (80, 1))
    study = dataclasses.replace(with_prior, frontal=image, truth=None)
    spotted = image.copy()
    spotted[20:40, 30:60] = 500
    spotted[0, 0] = 0
    erased = counterfactual(
        dataclasses.replace(study, frontal=spotted), erase=[(0.3, 0.25, 0.6, 0.5)]
    ).frontal
    np.testing.assert_allclose(np.asarray(erased), image, atol=1e-3)
    pasted = counterfactual(study, paste=[((0.5, 0.5, 1.0, 1.0), 99 - image)]).frontal
    assert isinstance(pasted, np.ndarray)
    np.testing.assert_allclose(pasted[40:, 50:], (99 - image)[40:, 50:], atol=1e-3)
    assert (pasted[:40] == image[:40]).all()
    assert (pasted[:, :50] == image[:, :50]).all()


def test_boxes_outside_the_image_are_refused(with_prior):
    with pytest.raises(StudyError, match="A box is"):
        counterfactual(with_prior, erase=[(0.5, 0.5, 1.5, 1.0)])


def test_a_comparison_with_itself_changes_nothing(hooked, study, sae):
    """Same study twice: the same report, no latent changes; with its image replaced both change."""
    same = compare(hooked, study, study, sae, max_new_tokens=40)
    assert same.before == same.after
    assert same.latents is not None
    assert len(same.latents) == 0
    assert set(same.sentences["change"]) == {"kept"}
    other = next(s for s in generate_studies(40, seed=77) if not s.has_prior and not s.truth)
    swapped = counterfactual(study, paste=[((0.0, 0.0, 1.0, 1.0), other.frontal)])
    moved = compare(hooked, study, swapped, sae, max_new_tokens=60)
    assert moved.latents is not None
    assert len(moved.latents) > 0
    assert {"removed", "added"} & set(moved.sentences["change"])
    (alone,) = hooked.generate(swapped, return_type="reports", max_new_tokens=60)
    assert moved.after == alone.text

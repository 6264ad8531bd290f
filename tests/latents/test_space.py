"""Spatial measures: exact values on drawn maps, the control tells a moving latent from a fixed one, records."""

import numpy as np
import pytest

from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.space import covered, grounded_boxes, spatial_scores
from sae_lens_maira.studies import FindingReader, GroundedStatement, Study

GRID = (4, 4)


def one_patch(row, col):
    return covered([(col / 4, row / 4, (col + 1) / 4, (row + 1) / 4)], GRID)


def test_covered_is_the_area_of_each_patch_inside():
    """A box over one patch and half of its right neighbour; a box smaller than a sample counts."""
    share = covered([(0.0, 0.0, 0.375, 0.25)], GRID).reshape(GRID)
    np.testing.assert_allclose(share[0], [1, 0.5, 0, 0])
    assert share[1:].sum() == 0
    assert covered([(0.51, 0.51, 0.5101, 0.5101)], GRID).argmax() == 10
    both = covered([(0, 0, 0.25, 0.25), (0, 0, 0.25, 0.25)], GRID)
    assert both.max() == 1  # overlapping boxes count once


def test_exact_values():
    """Two patches on, one of them in the box: energy is its share, IoU one of two, pointing the stronger one."""
    cover = np.stack([one_patch(1, 1)] * 6)
    maps = np.zeros((6, 16))
    maps[:, 5], maps[:, 6] = 3.0, 1.0
    maps[4] = 0  # silent
    choose = np.array([True, True, False, False, False, False])
    scores = spatial_scores(maps, cover, choose)
    assert scores.threshold >= 1.0  # at a threshold below 1 the second patch would belong to the map
    np.testing.assert_allclose(scores.values, [[1, 0.75, 1]] * 2 + [[0, 0, 0]] + [[1, 0.75, 1]])
    assert scores.fired.tolist() == [True, True, False, True]
    assert scores.summary()["pointing"] == 0.75


def test_equal_peaks_share_the_point():
    maps = np.zeros((4, 16))
    maps[:, [0, 5]] = 1.0
    scores = spatial_scores(maps, np.stack([one_patch(1, 1)] * 4), np.array([True, False, False, False]))
    assert scores.values[:, 0].tolist() == [0.5] * 3


@pytest.mark.parametrize("moves", [True, False])
def test_the_control_tells_whether_the_map_follows_the_finding(moves):
    """The finding is somewhere else in each study; a latent that stays in one place gains nothing over its control."""
    rng = np.random.default_rng(0)
    at = rng.integers(0, 16, 80)
    cover = np.stack([one_patch(p // 4, p % 4) for p in at])
    maps = cover + 0.01 if moves else np.tile(one_patch(2, 2) + 0.01, (80, 1))
    found = spatial_scores(maps, cover, np.arange(80) % 2 == 0).summary()
    if moves:
        assert found["pointing"] == found["iou"] == 1
        assert found["elsewhere_pointing"] < 0.3
        assert found["gain_iou_low"] > 0.5
    else:
        assert found["pointing"] == pytest.approx(found["elsewhere_pointing"])
        assert found["gain_energy_high"] == pytest.approx(0)


def test_the_threshold_is_chosen_on_the_other_half():
    """The reporting half never moves it."""
    cover = np.stack([one_patch(1, 1)] * 6)
    maps = np.abs(np.random.default_rng(1).normal(size=(6, 16)))
    choose = np.array([True, True, True, False, False, False])
    changed = maps.copy()
    changed[3:] *= 7
    assert spatial_scores(maps, cover, choose).threshold == spatial_scores(changed, cover, choose).threshold


def test_boxes_of_grounded_reports():
    reader = FindingReader(
        ("effusion", "nodule"),
        lambda text: frozenset(n for n in ("effusion", "nodule") if n in text),
        "words",
    )
    first, second = (0.1, 0.1, 0.2, 0.2), (0.6, 0.6, 0.9, 0.9)
    report = (
        GroundedStatement("an effusion", (first,)),
        GroundedStatement("effusion and nodule", (second,)),
        GroundedStatement("no boxes for this nodule"),
    )
    study = Study(study_id="a", patient_id="p", frontal=None, grounded_report=report)
    assert grounded_boxes(study, reader) == {"effusion": (first, second), "nodule": (second,)}


@pytest.mark.parametrize(
    ("maps", "cover", "choose", "message"),
    [
        (np.ones((3, 16)), np.ones((3, 9)), np.array([True, False, False]), "The shapes of"),
        (np.ones((3, 16)), np.ones((3, 16)), np.array([False, False, False]), "selection half has 0 studies"),
        (np.ones((3, 16)), np.zeros((3, 16)), np.array([True, False, False]), "no box"),
    ],
)
def test_what_cannot_be_scored_is_refused(maps, cover, choose, message):
    with pytest.raises(RecordError, match=message):
        spatial_scores(maps, cover, choose)

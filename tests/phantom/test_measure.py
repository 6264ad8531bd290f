"""Scores of the phantom: boxes and counts computed by hand."""

import pytest

from sae_lens_maira.phantom.measure import box_overlaps, iou
from sae_lens_maira.studies import Finding, Licence, Study

pytestmark = pytest.mark.compat


def test_iou_by_hand():
    """Half of each of two unit-height boxes overlaps: 0.5 / 1.5."""
    assert iou((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert iou((0, 0, 0.1, 0.1), (0.2, 0.2, 0.3, 0.3)) == 0


def test_a_box_counts_for_its_own_finding_only():
    """The right box under another finding's name scores 0; a missing box scores 0."""
    box = (0.1, 0.1, 0.3, 0.3)
    finding = Finding(name="cardiomegaly", side=None, box=box, size=None, change=None)
    study = Study(study_id="s", patient_id="p", frontal=None, truth=(finding,), licence=Licence.SYNTHETIC)
    assert box_overlaps(study, [("There is cardiomegaly.", [box])]) == [1.0]
    assert box_overlaps(study, [("A nasogastric tube is seen.", [box])]) == [0.0]
    assert box_overlaps(study, []) == [0.0]

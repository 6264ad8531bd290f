"""Images and truth: determinism, independence of n and size, prevalence, every finding visible in its box."""

import hashlib
from itertools import combinations

import numpy as np
import pytest

from sae_lens_maira.errors import StudyError
from sae_lens_maira.phantom import (
    FINDING_KEYS,
    generate_studies,
    generate_study,
    iterate_studies,
    truth_labels,
)
from sae_lens_maira.phantom.anatomy import draw_body, draw_exposure, frontal_image
from sae_lens_maira.phantom.canvas import Canvas
from sae_lens_maira.phantom.lesions import DRAW_ORDER, HEART_SCALE, Lesion, lesion_box, paint
from sae_lens_maira.phantom.sampling import split_key
from sae_lens_maira.studies import Box, Licence, Study

pytestmark = pytest.mark.compat

LESIONS = [
    *(
        Lesion("pleural effusion", side, size)
        for side in ("left", "right")
        for size in ("small", "moderate", "large")
    ),
    *(
        Lesion("pneumothorax", side, size)
        for side in ("left", "right")
        for size in ("small", "moderate", "large")
    ),
    *(Lesion("consolidation", "right", size, d=0.22, v=0.44) for size in ("small", "moderate", "large")),
    Lesion("nodule", "left", "small", d=0.20, v=0.44),
    Lesion("nodule", "right", "large", d=0.24, v=0.58),
    Lesion("atelectasis", "left", d=0.28, v=0.57, tilt=0.2),
    Lesion("rib fracture", "right", d=0.34, v=0.45),
    Lesion("cardiomegaly"),
    Lesion("pacemaker"),
    Lesion("endotracheal tube"),
    Lesion("central venous line", variant=0),
    Lesion("central venous line", variant=1),
    Lesion("nasogastric tube"),
]


def images(study: Study) -> list[np.ndarray]:
    return [f for f in (study.frontal, study.lateral, study.prior_frontal) if isinstance(f, np.ndarray)]


def texts(study: Study) -> tuple[object, ...]:
    return (study.indication, study.technique, study.comparison, study.prior_report, study.report)


def test_a_study_depends_on_seed_and_index_alone() -> None:
    alone = generate_study(3, 7, size=64)
    in_list = generate_studies(9, seed=3, size=64)[7]
    from_start = generate_studies(2, seed=3, size=64, start=7, split="test")[0]
    streamed = next(iterate_studies(3, size=64, start=7))
    for other in (in_list, from_start, streamed):
        assert texts(other) == texts(alone)
        assert other.truth == alone.truth
        assert all(np.array_equal(a, b) for a, b in zip(images(other), images(alone), strict=True))
    assert (alone.split, from_start.split) == (None, "test")
    assert texts(generate_study(4, 7, size=64)) != texts(alone)


def test_size_changes_the_radiograph_and_nothing_else() -> None:
    """Continuous coordinates: the 224 px image, averaged 2x2, is the 112 px image up to grain."""
    for index in range(6):
        small, large = generate_study(5, index, size=112), generate_study(5, index, size=224)
        assert texts(small) == texts(large)
        assert small.truth == large.truth
        for a, b in zip(images(small), images(large), strict=True):
            assert b.shape == (224, 224)
            assert b.dtype == np.uint8
            pooled = b.reshape(112, 2, 112, 2).mean(axis=(1, 3)).ravel()
            assert np.corrcoef(a.ravel(), pooled)[0, 1] > 0.97


def test_the_real_processors_size_renders() -> None:
    image = generate_study(5, 0, size=518).frontal
    assert isinstance(image, np.ndarray)
    assert image.shape == (518, 518)
    assert image.std() > 30


def test_what_the_shipped_model_was_trained_on_is_frozen() -> None:
    """Texts and truths of 60 studies, mean grey of six images: to change them is to train again."""
    lines = []
    for study in generate_studies(60, seed=11, size=32):
        truth = ";".join(f"{f.key},{f.side},{f.size},{f.change}" for f in study.truth or ())
        lines.append("|".join(str(text) for text in texts(study)) + "|" + truth)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "4c09c61c9a8f321c934c399651d6f121de855e6017c2c6c5561f1ecc29cd3d8b"
    means = [images(study)[0].mean() for study in generate_studies(6, seed=11)]
    np.testing.assert_allclose(means, [122.03, 137.105, 143.226, 116.716, 124.173, 129.809], atol=0.05)


def test_ids_licence_and_shared_patients(many_studies: list[Study]) -> None:
    """Studies 2k and 2k+1 are one patient for about half of all k, and no other two studies are."""
    assert [study.study_id for study in many_studies[:2]] == ["phantom-7-0", "phantom-7-1"]
    assert {study.licence for study in many_studies} == {Licence.SYNTHETIC}
    patients = [study.patient_id for study in many_studies]
    shared = [a == b for a, b in zip(patients[::2], patients[1::2], strict=True)]
    assert 0.45 < np.mean(shared) < 0.55
    assert len(set(patients)) == len(patients) - sum(shared)


def test_prevalences_priors_and_laterals(many_studies: list[Study]) -> None:
    labels = np.stack([truth_labels(study) for study in many_studies])
    assert labels.shape == (2000, len(FINDING_KEYS))
    assert labels.dtype == bool
    assert labels.mean(axis=0).min() > 0.16
    assert labels.mean(axis=0).max() < 0.26
    assert 0.10 < (labels.sum(axis=1) == 0).mean() < 0.15
    assert 0.37 < np.mean([study.prior_frontal is not None for study in many_studies]) < 0.43
    assert 0.27 < np.mean([study.has_lateral for study in many_studies]) < 0.33
    no_report = [study.prior_report is None for study in many_studies if study.prior_frontal is not None]
    assert 0.12 < np.mean(no_report) < 0.28


def test_labels_are_the_keys_of_present_findings(many_studies: list[Study]) -> None:
    for study in many_studies[:200]:
        stated = {key for key, here in zip(FINDING_KEYS, truth_labels(study), strict=True) if here}
        assert stated == {finding.key for finding in study.truth or () if finding.present}


def test_every_change_is_drawn_and_only_with_a_prior(many_studies: list[Study]) -> None:
    changes = [f.change for s in many_studies if s.prior_frontal is not None for f in s.truth or ()]
    counts = {change: changes.count(change) for change in set(changes)}
    assert set(counts) == {"new", "larger", "smaller", "unchanged", "removed"}
    assert min(counts.values()) > 150
    assert {f.change for s in many_studies if s.prior_frontal is None for f in s.truth or ()} == {None}


def test_implausible_pairs_are_never_drawn(many_studies: list[Study]) -> None:
    for study in many_studies:
        here = [finding for finding in study.truth or () if finding.present]
        assert not any(
            {a.name, b.name} == {"pleural effusion", "pneumothorax"} and a.side == b.side
            for a, b in combinations(here, 2)
        )
        for fluid in here:
            if fluid.name == "pleural effusion" and fluid.size == "large":
                assert not any(f.name in ("atelectasis", "nodule") and f.side == fluid.side for f in here)


def test_boxes_belong_to_present_findings_on_the_right_side(many_studies: list[Study]) -> None:
    """Patient left is image right: the box's centre is there for every sided finding."""
    for study in many_studies:
        for finding in study.truth or ():
            assert (finding.box is not None) == (finding.present and finding.name != "oedema")
            if finding.box is not None and finding.side is not None:
                assert (finding.box[0] + finding.box[2] > 1) == (finding.side == "left")


def two_images(lesion: Lesion, seed: int, size: int = 112) -> tuple[np.ndarray, Box | None]:
    """Noise-free difference a finding makes, in grey of 0..1, and its box."""
    rng = np.random.default_rng(seed)
    body, exposure = draw_body(rng), draw_exposure(rng)
    canvas = Canvas(size, exposure.shift, exposure.scale, exposure.angle)
    without, fields = frontal_image(canvas, body, 1.0, 1.0)
    image, fields = frontal_image(canvas, body, HEART_SCALE if lesion.name == "cardiomegaly" else 1.0, 1.0)
    paint(image, lesion, fields, rng)
    return image - without, lesion_box(lesion, fields)


@pytest.mark.parametrize("lesion", LESIONS, ids=lambda x: f"{x.name}-{x.side}-{x.size}-{x.variant}")
def test_a_finding_shows_plainly_and_inside_its_box(lesion: Lesion) -> None:
    """At 112 px: well above the grain (about 0.02), three quarters of the change inside, no loose box."""
    for seed in range(3):
        delta, box = two_images(lesion, seed)
        assert box is not None
        changed = np.abs(delta)
        axis = (np.arange(112) + 0.5) / 112
        inside = np.outer((axis > box[1]) & (axis < box[3]), (axis > box[0]) & (axis < box[2]))
        assert changed.max() > 0.12
        assert (changed > 0.06).sum() >= 12
        assert changed[inside].sum() > 0.75 * changed.sum()
        rows, cols = np.nonzero(changed > 0.25 * changed.max())
        tight = (cols.min() / 112, rows.min() / 112, (cols.max() + 1) / 112, (rows.max() + 1) / 112)
        wide = max(0.0, min(box[2], tight[2]) - max(box[0], tight[0]))
        high = max(0.0, min(box[3], tight[3]) - max(box[1], tight[1]))
        area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, tight)) - wide * high
        assert wide * high / area > 0.45


def test_oedema_is_bilateral_and_unboxed() -> None:
    delta, box = two_images(Lesion("oedema"), 0)
    assert box is None
    left, right = delta[:, 56:].clip(0).sum(), delta[:, :56].clip(0).sum()
    assert min(left, right) > 0.6 * max(left, right)
    assert delta.max() > 0.12


@pytest.mark.parametrize("name", ["pleural effusion", "pneumothorax", "consolidation"])
def test_one_size_step_can_be_seen(name: str) -> None:
    """The area that a finding changes grows by at least a third from one size to the next."""
    areas = []
    for size in ("small", "moderate", "large"):
        delta, _ = two_images(Lesion(name, "right", size, d=0.22, v=0.44), 1)
        areas.append(int((np.abs(delta) > 0.06).sum()))
    assert areas[1] > 1.33 * areas[0]
    assert areas[2] > 1.33 * areas[1]


def test_every_name_has_a_place_in_the_drawing_order() -> None:
    assert {split_key(key)[0] for key in FINDING_KEYS} == set(DRAW_ORDER)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"index": -2}, {"size": 8}])
def test_impossible_requests_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(StudyError, match="expected seed and index"):
        generate_study(wrong.get("seed", 0), wrong.get("index", 0), wrong.get("size", 112))

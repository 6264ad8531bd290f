"""Synthetic chest studies with known findings: images, report, prior and truth in one `Study` record.

Study `index` of seed `seed` is a function of these two numbers alone: every part draws from its own stream
SeedSequence((seed, index or patient, part)), so asking for more studies, or for other sizes, changes none.
Studies 2k and 2k+1 share one patient (one anatomy, one patient id) for about half of all k; their findings
are sampled separately, so the prior image of one is not the other's image. The images are a test bench for software and
say nothing about medicine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sae_lens_maira.errors import StudyError
from sae_lens_maira.phantom.anatomy import Body, draw_body, draw_exposure, expose, frontal_image
from sae_lens_maira.phantom.canvas import Array, Canvas
from sae_lens_maira.phantom.lateral import lateral_image
from sae_lens_maira.phantom.lesions import DRAW_ORDER, HEART_SCALE, Lesion, lesion_box, paint
from sae_lens_maira.phantom.reports import write_report, write_sections
from sae_lens_maira.phantom.sampling import FINDING_KEYS, Case, draw_case
from sae_lens_maira.studies import Box, Finding, GroundedStatement, Licence, Study

_PAIR, _BODY, _CASE, _FRONTAL, _PRIOR, _LATERAL, _TEXT, _PRIOR_TEXT, _EXTRAS = range(9)


def _stream(seed: int, number: int, part: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, number, part))))


def _patient(seed: int, index: int) -> int:
    """Number of the study's patient: its own index, or its even neighbour's when the pair is one patient."""
    pair = index - index % 2
    return pair if _stream(seed, pair, _PAIR).random() < 0.5 else index


def _frontal(
    body: Body, lesions: Sequence[Lesion], size: int, rng: np.random.Generator
) -> tuple[Array, list[Box | None]]:
    """One frontal image (size, size) uint8 and the box of every lesion, in the order given."""
    exposure = draw_exposure(rng)
    canvas = Canvas(size, exposure.shift, exposure.scale, exposure.angle)
    names = {lesion.name for lesion in lesions}
    heart = HEART_SCALE if "cardiomegaly" in names else 1.0
    image, fields = frontal_image(canvas, body, heart, 1.4 if "oedema" in names else 1.0)
    for lesion in sorted(lesions, key=lambda lesion: DRAW_ORDER.index(lesion.name)):
        paint(image, lesion, fields, rng)
    boxes = [lesion_box(lesion, fields) for lesion in lesions]
    return expose(image, canvas, exposure, rng), boxes


def _lateral(body: Body, lesions: Sequence[Lesion], size: int, rng: np.random.Generator) -> Array:
    exposure = draw_exposure(rng)
    canvas = Canvas(size, exposure.shift, exposure.scale, exposure.angle)
    return expose(lateral_image(canvas, body, lesions), canvas, exposure, rng)


def _truth(case: Case, boxes: Sequence[Box | None]) -> tuple[Finding, ...]:
    found = iter(boxes)
    return tuple(
        Finding(
            name=entry.lesion.name,
            side=entry.lesion.side,
            box=next(found) if entry.present else None,
            size=entry.lesion.size,
            change=entry.change,
            present=entry.present,
        )
        for entry in case.entries
    )


def generate_study(seed: int, index: int, size: int = 112, split: str | None = None) -> Study:
    """Generate study number `index` of a seed.

    Args:
        seed: Random seed of the studies.
        index: Number of the study, from 0.
        size: Side of the square images in pixels; the study is otherwise the same at every size.
        split: Copied into the record.

    Returns:
        A study with uint8 (size, size) images, report, grounded report and truth.

    Raises:
        StudyError: Seed or index is negative, or size is below 32 pixels.
    """
    if seed < 0 or index < 0 or size < 32:
        raise StudyError(
            f"A phantom study was requested with seed={seed}, index={index}, size={size}; expected seed and "
            f"index >= 0 and an image of at least 32 pixels. Correct these values."
        )
    patient = _patient(seed, index)
    body = draw_body(_stream(seed, patient, _BODY))
    case = draw_case(_stream(seed, index, _CASE))
    extras = _stream(seed, index, _EXTRAS)
    with_lateral = bool(extras.random() < 0.30)
    with_prior_report = case.has_prior and bool(extras.random() < 0.80)

    frontal, boxes = _frontal(body, case.now, size, _stream(seed, index, _FRONTAL))
    truth = _truth(case, boxes)
    lateral = _lateral(body, case.now, size, _stream(seed, index, _LATERAL)) if with_lateral else None
    prior_frontal, prior_report = None, None
    if case.has_prior:
        prior_frontal, _ = _frontal(body, case.before, size, _stream(seed, index, _PRIOR))
    if with_prior_report:
        prior_report = " ".join(
            text for text, _ in write_report(case.as_prior(), _stream(seed, index, _PRIOR_TEXT))
        )

    text_rng = _stream(seed, index, _TEXT)
    indication, technique, comparison = write_sections(case, with_lateral, text_rng)
    sentences = write_report(case, text_rng)
    box_of = {entry: finding.box for entry, finding in zip(case.entries, truth, strict=True)}
    grounded = tuple(
        GroundedStatement(text, tuple(box for box in map(box_of.get, entries) if box is not None))
        for text, entries in sentences
    )
    return Study(
        study_id=f"phantom-{seed}-{index}",
        patient_id=f"phantom-{seed}-p{patient}",
        frontal=frontal,
        lateral=lateral,
        prior_frontal=prior_frontal,
        indication=indication,
        technique=technique,
        comparison=comparison,
        prior_report=prior_report,
        report=" ".join(text for text, _ in sentences),
        grounded_report=grounded,
        split=split,
        licence=Licence.SYNTHETIC,
        truth=truth,
    )


def iterate_studies(seed: int, size: int = 112, start: int = 0, split: str | None = None) -> Iterator[Study]:
    """Endless stream of a seed's studies from number `start` on."""
    index = start
    while True:
        yield generate_study(seed, index, size, split)
        index += 1


def generate_studies(
    n: int, seed: int, size: int = 112, start: int = 0, split: str | None = None
) -> list[Study]:
    """Studies start .. start+n-1 of a seed; each is the same whatever n and start are."""
    return [generate_study(seed, index, size, split) for index in range(start, start + n)]


def truth_labels(study: Study) -> np.ndarray:
    """Truth of a study as bool (len(FINDING_KEYS),), in that order; StudyError without a truth."""
    present = study.present_keys
    return np.array([key in present for key in FINDING_KEYS], dtype=bool)

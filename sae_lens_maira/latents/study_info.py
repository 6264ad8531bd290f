"""Studies as a record set names them: pseudonyms, sections, findings, and small images where they may be kept.

    pseudonym = first 16 hex digits of SHA-256(salt, kind, id)

Credentialed studies never appear under their own id, and their images are not copied unless the caller says so.
Public and synthetic ones keep their ids, so that records can be traced to them. It knows nothing about latents.
"""

import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sae_lens_maira.latents.records import StudyInfo
from sae_lens_maira.maira2.images import ImageSource, box_to_crop, read_grey, stretch_contrast
from sae_lens_maira.maira2.prompts import VIEWS
from sae_lens_maira.privacy import is_shareable, private_files
from sae_lens_maira.studies import Study


class Pseudonyms:
    """Names of studies and patients; without a given salt a fresh one is drawn and kept nowhere."""

    def __init__(self, salt: str | None = None) -> None:
        self._salt = secrets.token_hex(16) if salt is None else salt

    def study(self, study: Study) -> str:
        return self._name(study, "study", study.study_id)

    def patient(self, study: Study) -> str:
        return self._name(study, "patient", study.patient_id)

    def _name(self, study: Study, kind: str, original: str) -> str:
        if is_shareable(study.licence):
            return original
        return hashlib.sha256(f"{self._salt}\0{kind}\0{original}".encode()).hexdigest()[:16]


LabelledBox = tuple[str, float, float, float, float]


def centre_crop(
    image: ImageSource, boxes: Sequence[LabelledBox], side: int
) -> tuple[Image.Image, tuple[LabelledBox, ...]]:
    """The centre square of a film, which is what the model sees, and its boxes there.

    Args:
        image: a whole film, or a crop made before (which stays as it is).
        boxes: (finding, x_min, y_min, x_max, y_max) in 0..1 of `image`.
        side: largest side in pixels; smaller films are not enlarged.

    Returns:
        The grey square and the boxes in 0..1 of it; boxes outside are left out.
    """
    grey = Image.fromarray(stretch_contrast(read_grey(image)).astype("uint8"))
    moved = [(b[0], box_to_crop((b[1], b[2], b[3], b[4]), grey.width, grey.height)) for b in boxes]
    edge = min(grey.size)
    left, top = (grey.width - edge) // 2, (grey.height - edge) // 2
    square = grey.crop((left, top, left + edge, top + edge))
    if edge > side:
        square = square.resize((side, side), Image.Resampling.LANCZOS)
    return square, tuple((name, *box) for name, box in moved if box is not None)


def study_info(
    study: Study,
    names: Pseudonyms,
    findings: Sequence[str],
    labelled_by: str,
    images: tuple[tuple[str, str], ...],
) -> StudyInfo:
    """The entry of one study; boxes are those of its truth, in the crop where images are kept."""
    boxes = tuple(
        (finding.key, *finding.box)
        for finding in study.truth or ()
        if finding.present and finding.box is not None
    )
    if images and study.frontal is not None:
        boxes = centre_crop(study.frontal, boxes, side=1)[1]
    return StudyInfo(
        study=names.study(study),
        patient=names.patient(study),
        licence=study.licence.value,
        report=study.report,
        indication=study.indication,
        technique=study.technique,
        comparison=study.comparison,
        prior_report=study.prior_report,
        findings=tuple(findings),
        labelled_by=labelled_by,
        boxes=boxes,
        images=images,
        split=study.split,
    )


def save_images(study: Study, name: str, folder: Path, side: int) -> tuple[tuple[str, str], ...]:
    """Save a study's images as grey PNGs of at most `side` pixels, cropped as the model sees them.

    Args:
        study: with images.
        name: its pseudonym.
        folder: of the record set; the files go to `images/` in it.
        side: largest side in pixels.

    Returns:
        `(view, path relative to folder)`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    stem = hashlib.sha256(name.encode()).hexdigest()[:16]
    saved = []
    for view, image in zip(VIEWS, (study.frontal, study.lateral, study.prior_frontal), strict=True):
        if image is None:
            continue
        square, _ = centre_crop(image, (), side)
        path = f"images/{stem}-{view}.png"
        with private_files(folder):
            square.save(folder / path)
        saved.append((view, path))
    return tuple(saved)

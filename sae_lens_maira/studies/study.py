"""Record of one radiological study: the model's inputs and, if known, the true findings.

A `Study` has images (paths, arrays or PIL images), the sections of its report, a licence, and an optional truth: one
`Finding` per statement. Boxes are (x_min, y_min, x_max, y_max) in 0..1 of the frontal image, whose left side is the
patient's right.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sae_lens_maira.errors import StudyError

Box = tuple[float, float, float, float]
StudyImage = Path | str | np.ndarray | Image.Image

SIDES = ("left", "right")
SIZES = ("small", "moderate", "large")
CHANGES = ("new", "larger", "smaller", "unchanged", "removed")
SIDED_KEYS = ("pleural effusion", "pneumothorax", "consolidation")
"""Findings whose key contains the side, because a reader assesses the two sides separately."""


class Licence(str, enum.Enum):
    """Licence class of a study. Credentialed data is not sent to other machines."""

    PUBLIC = "public"
    CREDENTIALED = "credentialed"
    SYNTHETIC = "synthetic"


def licence_of(value: Licence | str) -> Licence:
    """Licence class by name. Raises StudyError for another word."""
    try:
        return Licence(value)
    except ValueError:
        raise StudyError(
            f"The licence was {value!r}; expected one of {', '.join(member.value for member in Licence)}. Use "
            f"'credentialed' when in doubt."
        ) from None


def _one_of(what: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise StudyError(
            f"A finding has {what} {value!r}; expected one of {', '.join(allowed)} or None. "
            f"Map your own vocabulary onto these words before building the record."
        )


def check_box(box: Box) -> None:
    """Raise StudyError unless box is (x_min, y_min, x_max, y_max) with 0 <= min <= max <= 1.

    A box without area is valid: the model writes one for a region smaller than a coordinate bin.
    """
    if len(box) != 4 or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
        raise StudyError(
            f"A box is {box!r}; expected (x_min, y_min, x_max, y_max) with 0 <= min <= max <= 1, relative "
            f"to the frontal image. Divide pixel coordinates by the image's width and height."
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One true finding of a study."""

    name: str
    """Lower-case name, for instance "pleural effusion"."""
    side: str | None = None
    """Patient side, "left" or "right"; None for a finding without a side."""
    box: Box | None = None
    """(x_min, y_min, x_max, y_max) in 0..1 of the frontal image; None if it cannot be boxed or is no longer present."""
    size: str | None = None
    """"small", "moderate" or "large"; None if the size is not graded."""
    change: str | None = None
    """Change since the prior: "new", "larger", "smaller", "unchanged", "removed"; None without a prior."""
    present: bool = True
    """False only for change="removed": seen on the prior, not present now."""

    def __post_init__(self) -> None:
        _one_of("side", self.side, SIDES)
        _one_of("size", self.size, SIZES)
        _one_of("change", self.change, CHANGES)
        if not self.name or self.name != self.name.lower().strip():
            raise StudyError(
                f"A finding is named {self.name!r}; expected a non-empty lower-case name such as "
                f"'pleural effusion'. Lower-case and strip the name."
            )
        if self.present == (self.change == "removed"):
            raise StudyError(
                f"The finding {self.name!r} has present={self.present} and change={self.change!r}; a removed "
                f"finding is absent, every other one is present. Set present=False for change='removed' only."
            )
        if self.box is not None:
            check_box(self.box)

    @property
    def key(self) -> str:
        """Label key: "pleural_effusion_left" for findings asked per side, "cardiomegaly" for the others."""
        stem = self.name.replace(" ", "_")
        return f"{stem}_{self.side}" if self.name in SIDED_KEYS and self.side else stem


@dataclass(frozen=True)
class GroundedStatement:
    """One self-contained sentence and the boxes where it can be seen; no boxes if it is ungrounded."""

    text: str
    boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        for box in self.boxes:
            check_box(box)


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """One study of one patient. Two objects are equal only if they are the same object, since images may be arrays."""

    study_id: str
    patient_id: str
    frontal: StudyImage | None
    lateral: StudyImage | None = None
    prior_frontal: StudyImage | None = None
    indication: str | None = None
    technique: str | None = None
    comparison: str | None = None
    prior_report: str | None = None
    report: str | None = None
    grounded_report: tuple[Any, ...] | None = None
    """Statements with `.text` and `.boxes`: `GroundedStatement`, or `GroundedFinding` of `maira2`."""
    split: str | None = None
    licence: Licence = Licence.CREDENTIALED
    """Licence class; by default a study is credentialed and is not sent to other machines."""
    truth: tuple[Finding, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("study_id", "patient_id"):
            if not getattr(self, name):
                raise StudyError(
                    f"A study has an empty {name}; expected a non-empty string. Give every study an id and "
                    f"its patient's id, so that splits can keep a patient on one side."
                )
        try:
            object.__setattr__(self, "licence", licence_of(self.licence))
        except StudyError as error:
            raise StudyError(f"Study {self.study_id} is not valid. {error}") from None
        if self.truth is not None and not self.has_prior:
            changed = [finding.name for finding in self.truth if finding.change is not None]
            if changed:
                raise StudyError(
                    f"Study {self.study_id} states a change of {', '.join(changed)} but has neither a prior "
                    f"image nor a prior report; expected change=None without a prior. Add the prior, or drop "
                    f"the change."
                )

    @property
    def has_prior(self) -> bool:
        """Whether the study has a prior frontal image or a prior report."""
        return self.prior_frontal is not None or self.prior_report is not None

    @property
    def has_lateral(self) -> bool:
        """Whether the study has a lateral image."""
        return self.lateral is not None

    @property
    def present_keys(self) -> frozenset[str]:
        """Keys of the findings that are present. Raises StudyError if the truth is not known."""
        if self.truth is None:
            raise StudyError(
                f"Study {self.study_id} has no truth; expected findings to read labels from. Use a phantom "
                f"study, or label its report first."
            )
        return frozenset(finding.key for finding in self.truth if finding.present)

"""Methods of the published MAIRA-2 processor, with their published names and signatures.

A script written for the published processor runs with this one after a change of its import. The prompts, pixels and
parsed reports are those of `Maira2Processor.encode` and `parse_report`; boxes are (x_min, y_min, x_max, y_max) in 0..1
of the frontal image's centre square until `adjust_box_for_original_image_size` maps them to the whole image.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transformers import BatchFeature

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.maira2.images import ImageSource, box_to_image
from sae_lens_maira.maira2.reports import Box, parse_report

if TYPE_CHECKING:
    from sae_lens_maira.maira2.encoding import Maira2Encoding


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Study made from the keyword arguments of the published methods."""

    frontal: ImageSource
    lateral: ImageSource | None = None
    prior_frontal: ImageSource | None = None
    indication: str | None = None
    technique: str | None = None
    comparison: str | None = None
    prior_report: str | None = None
    report: None = None
    grounded_report: None = None


class PublishedMethods:
    """Mixin of the processor with the published methods."""

    if TYPE_CHECKING:

        def encode(
            self, studies: Any, task: Any = "findings", phrase: str | None = None
        ) -> Maira2Encoding: ...

    def format_and_preprocess_reporting_input(
        self,
        current_frontal: ImageSource,
        current_lateral: ImageSource | None = None,
        prior_frontal: ImageSource | None = None,
        indication: str | None = None,
        technique: str | None = None,
        comparison: str | None = None,
        prior_report: str | None = None,
        get_grounding: bool = False,
        return_tensors: Literal["pt"] = "pt",
    ) -> BatchFeature:
        """Build prompt and pixels for a report of one study.

        Args:
            current_frontal: Frontal image to report.
            current_lateral: Lateral image of the same study.
            prior_frontal: Frontal image of an earlier study.
            indication: Indication section; None is written as "N/A", like the other sections.
            technique: Technique section.
            comparison: Comparison section.
            prior_report: Report of the earlier study; only together with `prior_frontal`.
            get_grounding: Ask for findings with boxes.
            return_tensors: "pt".

        Returns:
            `input_ids` and `attention_mask`, each (1, L), and `pixel_values` (images, 3, S, S).

        Raises:
            PromptError: A prior report without a prior image, or a text with a token of the model's vocabulary.
            ImageError: An image cannot be read or has no contrast.
        """
        study = _Inputs(
            frontal=current_frontal,
            lateral=current_lateral,
            prior_frontal=prior_frontal,
            indication=indication,
            technique=technique,
            comparison=comparison,
            prior_report=prior_report,
        )
        return _features(self.encode(study, "grounded" if get_grounding else "findings"), return_tensors)

    def format_and_preprocess_phrase_grounding_input(
        self, frontal_image: ImageSource, phrase: str, return_tensors: Literal["pt"] = "pt"
    ) -> BatchFeature:
        """Build prompt and pixels to locate a phrase in the image.

        Args:
            frontal_image: Frontal image.
            phrase: Finding to locate.
            return_tensors: "pt".

        Returns:
            As `format_and_preprocess_reporting_input`.
        """
        return _features(self.encode(_Inputs(frontal=frontal_image), "phrase", phrase), return_tensors)

    def convert_output_to_plaintext_or_grounded_sequence(
        self, text: str
    ) -> str | list[tuple[str, list[Box] | None]]:
        """Parse decoded output.

        Args:
            text: Decoded new tokens, without `</s>`.

        Returns:
            The text of a plain report, or one (text, boxes) pair per finding of grounded output, with boxes None for a
            finding without boxes. Parts that cannot be read, as in output that was cut off, are left out with a
            warning.
        """
        report = parse_report(text)
        if report.leftover:
            warnings.warn(
                f"The output has {len(report.leftover)} characters outside of complete findings, which are left out: "
                f"{report.leftover[:80]!r}. Generate more tokens if it was cut off.",
                stacklevel=2,
            )
        if not report.findings and not report.leftover:
            return report.text
        return [(finding.text, list(finding.boxes) or None) for finding in report.findings]

    def adjust_box_for_original_image_size(self, box: Box, width: int, height: int) -> Box:
        """Map a box of the output to the whole frontal image.

        Args:
            box: (x_min, y_min, x_max, y_max) in 0..1 of the centre square that the model saw.
            width: Width of the whole image in pixels.
            height: Height of the whole image in pixels.

        Returns:
            The box in 0..1 of the whole image.
        """
        return box_to_image(box, width, height)


def _features(encoding: Maira2Encoding, return_tensors: str) -> BatchFeature:
    if return_tensors != "pt":
        raise ConfigError(
            f'return_tensors was {return_tensors!r}; this processor returns torch tensors. Use "pt".'
        )
    return BatchFeature(data=dict(encoding.model_inputs()), tensor_type="pt")


__all__ = ["PublishedMethods"]

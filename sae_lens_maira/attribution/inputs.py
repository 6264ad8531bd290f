"""Inputs of an attribution: the SAE's hook point and token roles, and the study with its report."""

from typing import Any

from sae_lens import SAE

from sae_lens_maira.errors import ConfigError, SAEError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding


def hook_point_of(sae: SAE[Any], hook_name: str | None = None) -> str:
    """The hook point that was given, or the one in the SAE's metadata.

    Raises:
        SAEError: There is neither.
    """
    place = hook_name or sae.cfg.metadata.hook_name
    if not place:
        raise SAEError("The SAE's metadata name no hook point. Say where it reads with hook_name.")
    return place


def trained_roles(sae: SAE[Any]) -> Any:
    """Token roles that an SAE was trained on, from its metadata or its records; "all" if neither names them."""
    known = getattr(sae.cfg.metadata, "token_roles", None)
    records: Any = getattr(sae, "records", None)
    if known is None and records is not None:
        if not records.meta.rows_text:
            return "image_only"
        if not records.meta.rows_image:
            return "text_only"
    return known or "all"


def encode_with_report(
    hooked: HookedMaira2, study: Any, report: str, max_new_tokens: int | None = None
) -> Maira2Encoding:
    """Encode one study with its report after the prompt.

    Args:
        hooked: The model.
        study: The study.
        report: "generated", "teacher" or a text.
        max_new_tokens: Budget of a generated report.
    """
    processor = hooked.processor
    if processor is None:
        raise ConfigError(
            "The model was wrapped without a processor, so studies cannot be encoded. Pass one."
        )
    if report == "teacher":
        return processor.encode([study], report="teacher", padding_side="right")
    if report != "generated":
        return processor.encode([study], report=[report], padding_side="right")
    prompt = processor.encode([study])
    ids = hooked.generate(prompt, max_new_tokens=max_new_tokens)
    return prompt.extend(ids[:, prompt.input_ids.shape[1] :].cpu())


__all__ = ["encode_with_report", "hook_point_of", "trained_roles"]

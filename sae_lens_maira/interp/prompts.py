"""Prompts for a language model, and the schema of every answer.

`PROMPT_VERSION` is stored with each interpretation and changes with any word here. A prompt explains once what a
latent is, shows examples, and asks for one JSON object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, create_model

PROMPT_VERSION = "2026-11b"
PICTURE_TOKENS = 1000

Messages = list[dict[str, Any]]

_LATENT = (
    "A latent is one unit of a sparse dictionary learned from the inner activations of a model that reads chest "
    "radiographs and writes radiology reports. It is silent in most studies and active in a few."
)
_EXPLAIN = (
    f"{_LATENT} You are shown studies in which one latent is active, with words marked <<like this>> where it is "
    "active, or with the place in the image where it is, and the strength from 1 to 10. You are also shown studies in "
    "which it is silent. Say in one sentence of at most 20 words what makes it active. Name the finding, device, "
    "change over time or wording, and its side if the side is always the same. Do not mention latents or examples."
)
_DETECT = (
    f"{_LATENT} You are given a description of what makes one latent active, and numbered report texts. Decide for "
    "each text, in order, whether the latent is active in it."
)
_FUZZ = (
    f"{_LATENT} You are given a description of what makes one latent active, and numbered report texts in which "
    "words are marked <<like this>> or a place in the image is given. Decide for each, in order, whether the mark or "
    "the place is right for this description."
)
_INTRUDE = (
    f"{_LATENT} You are given numbered report texts. In all but one the same latent is active; in the other one it "
    "is silent. Give the number of that other text."
)
_DETECT_IMAGES = (
    f"{_LATENT} You are given a description of what makes one latent active, and radiographs. Decide for each image, "
    "in order, whether the latent is active in it. The left of an image is the patient's right."
)
_FUZZ_IMAGES = (
    f"{_LATENT} You are given a description of what makes one latent active, and radiographs with outlined patches. "
    "Decide for each image, in order, whether the outlined patches show what the description says. The left of an "
    "image is the patient's right."
)


class Sentence(BaseModel):
    """An explainer's answer."""

    explanation: Annotated[str, Field(min_length=3, max_length=400)]


class Intruder(BaseModel):
    """The number of the text that does not belong, from 1."""

    number: int


def verdicts_form(count: int) -> type[BaseModel]:
    """The schema of `count` verdicts: a model with one field `verdicts`, a list of exactly that many booleans."""
    inside: Any = Annotated[list[bool], Field(min_length=count, max_length=count)]
    return create_model("Verdicts", verdicts=(inside, ...))


def explain(
    active: Sequence[tuple[str, str | None, int]],
    silent: Sequence[str],
    tokens: Sequence[str],
    pictures: Sequence[str] = (),
) -> Messages:
    """Ask for an explanation.

    Args:
        active: (text, place in the image or None, strength 1 to 10) of every active example.
        silent: texts of silent examples.
        tokens: output tokens that the latent raises most.
        pictures: `data:` URIs of the first active examples' images with active patches outlined, for a model that
            sees; they follow the text as image parts.
    """
    lines = ["Active in:"]
    for text, place, strength in active:
        where = f" (in the {place})" if place else ""
        lines.append(f"- strength {strength}{where}: {text}")
    lines += ["", "Silent in:", *(f"- {text}" for text in silent)]
    if tokens:
        lines += ["", "It makes these output tokens likelier: " + ", ".join(repr(token) for token in tokens)]
    if not pictures:
        return _pair(_EXPLAIN, "\n".join(lines))
    lines += ["", f"The images of the first {len(pictures)} active examples follow, active patches outlined."]
    parts = [_text("\n".join(lines)), *map(_image, pictures)]
    return [{"role": "system", "content": _EXPLAIN}, {"role": "user", "content": parts}]


def detect(explanation: str, texts: Sequence[str]) -> Messages:
    """Ask in which texts the latent is active."""
    return _pair(_DETECT, f"Description: {explanation}\n\n{_numbered(texts)}")


def fuzz(explanation: str, texts: Sequence[str]) -> Messages:
    """Ask in which texts the marks are right."""
    return _pair(_FUZZ, f"Description: {explanation}\n\n{_numbered(texts)}")


def detect_images(explanation: str, images: Sequence[str]) -> Messages:
    """Ask in which images (`data:` URIs) the latent is active."""
    return _with_images(_DETECT_IMAGES, explanation, images)


def fuzz_images(explanation: str, images: Sequence[str]) -> Messages:
    """Ask in which images (`data:` URIs) the right patches are outlined."""
    return _with_images(_FUZZ_IMAGES, explanation, images)


def intrude(texts: Sequence[str]) -> Messages:
    """Ask for the text that does not belong."""
    return _pair(_INTRUDE, _numbered(texts))


VERDICTS: dict[str, Callable[[str, Sequence[str]], Messages]] = {
    "detection": detect,
    "fuzzing": fuzz,
    "image_detection": detect_images,
    "image_fuzzing": fuzz_images,
}
"""The prompt of every scorer that asks for verdicts."""


def with_text(messages: Messages, text: str) -> Messages:
    """The messages with one more paragraph at the end, whether the last message has parts or not."""
    *before, last = messages
    content = last["content"]
    more = f"{content}\n\n{text}" if isinstance(content, str) else [*content, _text(text)]
    return [*before, {**last, "content": more}]


def tokens_of(messages: Messages) -> int:
    """Estimate the number of tokens: one per four letters, and `PICTURE_TOKENS` per image."""
    total = 0
    for message in messages:
        content = message["content"]
        parts = [_text(content)] if isinstance(content, str) else content
        for part in parts:
            total += len(part["text"]) // 4 + 4 if part["type"] == "text" else PICTURE_TOKENS
    return total


def _pair(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _with_images(system: str, explanation: str, images: Sequence[str]) -> Messages:
    parts = [_text(f"Description: {explanation}")]
    for number, image in enumerate(images, 1):
        parts += [_text(f"Image {number}:"), _image(image)]
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(address: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))

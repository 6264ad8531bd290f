"""Prompts for a language model, schemas of the answers, and the question that asks for an explanation.

`PROMPT_VERSION` is stored with each interpretation; change it with any word of a prompt. A prompt explains what a
latent is, shows examples, and asks for one JSON object.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, create_model

from sae_lens_maira.interp.examples import (
    Example,
    LatentTask,
    Plan,
    active_tokens,
    modality_of,
    scaled,
    window,
)
from sae_lens_maira.interp.offline import Explanation, category_of_text
from sae_lens_maira.interp.score import data_uri, outlined, place

if TYPE_CHECKING:
    from sae_lens_maira.interp.judge import Judge

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
    """Answer of an explainer."""

    explanation: Annotated[str, Field(min_length=3, max_length=400)]


class Intruder(BaseModel):
    """Answer of the intruder scorer: number of the text that does not belong, from 1."""

    number: int


def verdicts_form(count: int) -> type[BaseModel]:
    """Make the schema of `count` verdicts: a model with one field `verdicts`, a list of exactly `count` booleans."""
    inside: Any = Annotated[list[bool], Field(min_length=count, max_length=count)]
    return create_model("Verdicts", verdicts=(inside, ...))


def ask_explanation(
    active: Sequence[tuple[str, str | None, int]],
    silent: Sequence[str],
    tokens: Sequence[str],
    pictures: Sequence[str] = (),
) -> Messages:
    """Ask for an explanation.

    Args:
        active: (text, place in the image or None, strength 1 to 10) of every active example.
        silent: Texts of silent examples.
        tokens: Output tokens that the latent raises most.
        pictures: `data:` URIs of images of the first active examples, with active patches outlined, for a model with
            image input; they follow the text as image parts.
    """
    lines = ["Active in:"]
    for text, place_words, strength in active:
        where = f" (in the {place_words})" if place_words else ""
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
"""Scorer -> function that makes its prompt, for scorers that ask for verdicts."""


def with_text(messages: Messages, text: str) -> Messages:
    """Append a paragraph to the last message, whether it has parts or not."""
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


def question(
    examples: Sequence[Example],
    tokens: Sequence[str],
    seed: int = 0,
    pictures: int = 0,
    folder: Path | None = None,
) -> Messages:
    """Make the messages that ask for an explanation of these examples.

    Args:
        examples: Examples sampled from the train half.
        tokens: Output tokens that the latent raises most.
        seed: Random seed for the windows of silent examples.
        pictures: Number of active examples of an image latent whose outlined images are shown.
        folder: Folder of the record set, which contains the images.
    """
    modality, rng = modality_of(examples), random.Random(seed)
    firing = [e for e in examples if e.active]
    active = [
        (
            window(e, modality, rng, active_tokens(e) if e.context.modality == "text" else ()),
            place(e.context),
            scaled(e.context.value, e.max),
        )
        for e in firing
    ]
    silent = [window(e, modality, rng) for e in examples if not e.active]
    images: list[str] = []
    if pictures and folder is not None and modality == "image":
        shown: list[int] = []
        for number, e in enumerate(firing):
            image = outlined(e, folder) if len(shown) < pictures else None
            if image is not None:
                shown.append(number)
                images.append(data_uri(image))
        # Examples with an image come first, so that texts and images have the same order.
        order = [*shown, *(n for n in range(len(firing)) if n not in shown)]
        active = [active[n] for n in order]
    return ask_explanation(active, silent, tokens, images)


async def explain(
    judge: Judge,
    task: LatentTask,
    keys: Sequence[str],
    plan: Plan,
    folder: Path,
    licences: Iterable[str],
) -> Explanation:
    """Ask a language model for an explanation.

    Args:
        judge: Client of the language model.
        task: Latent with its train examples.
        keys: Finding keys, for the category.
        plan: Seed, and the number of images to show.
        folder: Folder of the record set.
        licences: Licence classes of the record set.

    Raises:
        PrivacyError: Credentialed text would leave the machine.
        ServerError: The server does not answer.
    """
    asked = question(task.train, task.tokens, plan.seed, plan.pictures, folder)
    reply = await judge.ask(asked, Sentence, licences, topic="explanation")
    if reply.answer is None:
        status = "over_budget" if reply.problem == "over budget" else "unusable"
        return Explanation(None, "other", (reply.key,), status)
    text = " ".join(reply.answer.explanation.split())
    return Explanation(text, category_of_text(text, keys), (reply.key,))

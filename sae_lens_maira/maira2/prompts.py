"""Build MAIRA-2's prompts as lists of segments with token roles.

A prompt is the concatenation of its segments' texts and equals the published template exactly. Each segment has a
`TokenRole`, so that roles are known without a search in the text. The tasks are "findings", "grounded" (findings with
boxes) and "phrase" (one given phrase with boxes). A missing or blank section is written as `N/A`. A prior report
without a prior image is an error, since the template cannot contain it.
"""

import re
from typing import Any, NamedTuple, Protocol

from sae_lens_maira.errors import ConfigError, PromptError
from sae_lens_maira.token_roles import IMAGE_TOKEN, TokenRole

TASKS = ("findings", "grounded", "phrase")
FRONTAL, LATERAL, PRIOR = range(3)

_SYSTEM = "You are an expert radiology assistant tasked with interpreting a chest X-ray study."
_FINDINGS = (
    " Provide a structured description of the findings in the radiology study in comparison to the prior"
    " frontal image."
)
_GROUNDING = (
    " Each finding should be described as a self-contained plain-text sentence. If the finding is"
    " groundable, locate the finding in the current frontal chest X-ray image, with bounding boxes"
    " indicating all locations where it can be seen in the current frontal image. Otherwise, generate just"
    " the ungrounded finding without bounding boxes."
)
_PHRASE = (
    " Repeat the following finding as a grounded phrase with bounding boxes indicating all locations where"
    " it can be seen in the given chest X-ray image. Finding: "
)


class StudyLike(Protocol):
    """Attributes of a study that the processor reads. Images are anything that `image_to_pixels` accepts, or None."""

    @property
    def frontal(self) -> Any: ...
    @property
    def lateral(self) -> Any: ...
    @property
    def prior_frontal(self) -> Any: ...
    @property
    def indication(self) -> str | None: ...
    @property
    def technique(self) -> str | None: ...
    @property
    def comparison(self) -> str | None: ...
    @property
    def prior_report(self) -> str | None: ...
    @property
    def report(self) -> str | None: ...
    @property
    def grounded_report(self) -> Any: ...


class Segment(NamedTuple):
    """Part of a prompt: its text, its role, and for an image placeholder the view as an index into `VIEWS`."""

    text: str
    role: TokenRole
    view: int = -1


class Prompt(NamedTuple):
    """Segments of one study's prompt, and its images in prompt order as `(view, image)` pairs."""

    segments: tuple[Segment, ...]
    images: tuple[tuple[int, Any], ...]

    @property
    def text(self) -> str:
        """The prompt as one string, with one `<image>` per image."""
        return "".join(segment.text for segment in self.segments)


def build_prompt(study: StudyLike, task: str = "findings", phrase: str | None = None) -> Prompt:
    """Build the prompt of one study.

    Args:
        study: Study with images and texts.
        task: "findings", "grounded" or "phrase".
        phrase: Finding to ground, for task "phrase" only. This task uses only the frontal image.

    Raises:
        ConfigError: An unknown task.
        PromptError: No frontal image, a section that is not text, a prior report without a prior image, a phrase for
            another task, or no phrase for task "phrase".
    """
    if task not in TASKS:
        raise ConfigError(
            f"The task was {task!r}; MAIRA-2's tasks are {', '.join(TASKS)}. Choose one of these."
        )
    if study.frontal is None:
        raise PromptError(
            "The study has no frontal image. MAIRA-2 always reads a current frontal image; give one, or"
            " leave the study out."
        )
    if (task == "phrase") != bool(phrase and phrase.strip()):
        raise PromptError(
            f"Task {task!r} was given the phrase {phrase!r}. Task 'phrase' needs a phrase that is not blank"
            " and the other tasks take none; change the task or the phrase."
        )
    if task != "phrase" and study.prior_report and study.prior_frontal is None:
        raise PromptError(
            "The study has a prior report but no prior frontal image. MAIRA-2's prompt cannot contain the one without"
            " the other; give the prior image, or set prior_report to None."
        )
    lateral = None if task == "phrase" else study.lateral
    prior = None if task == "phrase" else study.prior_frontal

    segments = [_template(_SYSTEM + "  "), _separator("USER:  ")]
    images: list[tuple[int, Any]] = []

    def add_image(text: str, view: int, image: Any) -> None:
        segments.append(_template(text))
        segments.append(Segment(IMAGE_TOKEN, TokenRole.IMAGE, view))
        images.append((view, image))

    alone = lateral is None and prior is None and task != "phrase"
    add_image(f"Given the current frontal image{' only' if alone else ''}", FRONTAL, study.frontal)
    if lateral is not None:
        add_image(f"{' and' if prior is None else ''} the current lateral image", LATERAL, lateral)
    if prior is not None:
        add_image(" and the prior frontal image", PRIOR, prior)

    if task == "phrase":
        segments += [_template(_PHRASE), Segment(str(phrase), TokenRole.PHRASE)]
    else:
        if prior is not None:
            segments += _section(" PRIOR_REPORT: ", study.prior_report, TokenRole.PRIOR_REPORT)
        segments.append(_template(_FINDINGS + (_GROUNDING if task == "grounded" else "")))
        segments += _section(" INDICATION: ", study.indication, TokenRole.INDICATION)
        segments += _section(" TECHNIQUE: ", study.technique, TokenRole.TECHNIQUE)
        segments += _section(" COMPARISON: ", study.comparison, TokenRole.COMPARISON)
    segments.append(_separator("  ASSISTANT: "))
    return Prompt(tuple(segments), tuple(images))


LONGEST_TEXT = 20_000
"""Largest number of characters of a section; the longest public reports have about 10,000."""
LONGEST_WORD = 1_000
"""Largest number of letters of a word."""
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD},}}")


def check_text(text: str, field: str) -> None:
    """Refuse a text that no tokenizer can encode, or that is far too long for a report.

    Raises:
        PromptError: The text contains half of a surrogate pair, or it or one of its words is far too long.
    """
    half = next((place for place, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
    if half is not None:
        raise PromptError(
            f"The {field} contains the lone surrogate {text[half]!a} at character {half}; expected valid Unicode. "
            "Decode the source with its own encoding, or remove the character."
        )
    if len(text) > LONGEST_TEXT:
        raise PromptError(
            f"The {field} has {len(text):,} characters; at most {LONGEST_TEXT:,} were expected. Shorten it, or leave "
            "the study out."
        )
    if len(text) >= LONGEST_WORD and _LONG_WORD.search(text):
        raise PromptError(
            f"The {field} has a word of over {LONGEST_WORD:,} letters. Correct it, or leave the study out."
        )


def raw_prompt(text: str, image_token: str) -> Prompt:
    """Make a prompt from a text that already contains its placeholders; all images count as frontal."""
    pieces = text.split(image_token)
    segments = [Segment(pieces[0], TokenRole.TEMPLATE)]
    for piece in pieces[1:]:
        segments += [Segment(image_token, TokenRole.IMAGE, 0), Segment(piece, TokenRole.TEMPLATE)]
    return Prompt(tuple(segments), tuple((0, None) for _ in pieces[1:]))


def _template(text: str) -> Segment:
    return Segment(text, TokenRole.TEMPLATE)


def _separator(text: str) -> Segment:
    return Segment(text, TokenRole.SEPARATOR)


def _section(label: str, text: str | None, role: TokenRole) -> tuple[Segment, Segment]:
    if text is not None and not isinstance(text, str):
        raise PromptError(
            f"The {role.name.lower()} is {text!r} of type {type(text).__name__}; a text or None was expected."
            " Replace empty cells of a table (NaN) by None."
        )
    return _separator(label), Segment(text if text and text.strip() else "N/A", role)

"""Score an explanation: balanced accuracy of answers to questions about test examples.

    detection         in which texts is the latent active?         (active against silent studies)
    fuzzing           are the marks in the right place?            (active studies, right against wrong marks)
    intruder          which text does not belong?                  (needs no explanation: it scores the latent)
    image_detection   in which images is the latent active?        (image latents, for a model with image input)
    image_fuzzing     are the right patches outlined?              (image latents, for a model with image input)

    balanced accuracy = (TP / (TP + FN) + TN / (TN + FP)) / 2

Its 95 % interval combines the Wilson intervals of both rates (method of variance estimates recovery). Every question
counts as answered or unusable, and nothing is imputed; questions beyond the budget are not counted.

A patch is described in words such as "right lower zone"; the left of an image is the patient's right. An outlined image
shows rectangles around active patches, above 0.3 of the latent's largest activation, on the crop in the record set.
"""

from __future__ import annotations

import base64
import io
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from sae_lens_maira.interp.examples import (
    MARKED_FROM,
    Example,
    active_tokens,
    interval_of,
    modality_of,
    window,
    wrong_tokens,
)
from sae_lens_maira.interp.records import Score
from sae_lens_maira.latents.records import ActivationMap, Context
from sae_lens_maira.privacy import image_path
from sae_lens_maira.stats import wilson

if TYPE_CHECKING:
    from sae_lens_maira.interp.judge import Judge

IMAGES_PER_QUESTION = 4
COLOUR = (255, 220, 0)


@dataclass(frozen=True)
class Verdict:
    """Outcome of one question: the true answer, the given answer (None if unusable), and the activation interval."""

    truth: bool
    answer: bool | None
    interval: str = ""


@dataclass(frozen=True)
class Scored:
    """A score, the journal keys of its calls, and whether the budget ended it early."""

    score: Score
    journal_keys: tuple[str, ...] = ()
    over_budget: bool = False


@dataclass(frozen=True)
class Item:
    """One text or image shown to a judge, the true answer, and the activation interval.

    Attributes:
        text: Text shown; "" for an image.
        truth: True answer.
        interval: Name of the activation interval; "" if the latent is silent.
        draw: Function that makes the image when the question is asked; None for a text.
    """

    text: str
    truth: bool
    interval: str
    draw: Callable[[], Image.Image] | None = None


def score_of(method: str, judge: str, verdicts: Iterable[Verdict]) -> Score:
    """Compute a score from verdicts."""
    verdicts = list(verdicts)
    usable = [v for v in verdicts if v.answer is not None]
    count = Counter((v.truth, v.answer) for v in usable)
    positive = count[True, True] + count[True, False]
    negative = count[False, True] + count[False, False]
    balanced = low = high = None
    if positive and negative:
        sensitivity, specificity = count[True, True] / positive, count[False, False] / negative
        s_low, s_high = wilson(count[True, True], positive)
        p_low, p_high = wilson(count[False, False], negative)
        balanced = (sensitivity + specificity) / 2
        low = balanced - math.hypot(sensitivity - s_low, specificity - p_low) / 2
        high = balanced + math.hypot(s_high - sensitivity, p_high - specificity) / 2
    names = dict.fromkeys(v.interval for v in usable if v.truth and v.interval)
    inside = {name: [v.answer for v in usable if v.truth and v.interval == name] for name in names}
    return Score(
        method=method,
        judge=judge,
        asked=len(verdicts),
        answered=len(usable),
        unusable=len(verdicts) - len(usable),
        true_positive=count[True, True],
        false_positive=count[False, True],
        true_negative=count[False, False],
        false_negative=count[True, False],
        balanced_accuracy=balanced,
        low=low,
        high=high,
        recall_by_interval=tuple((name, sum(map(bool, a)) / len(a), len(a)) for name, a in inside.items()),
    )


def detection_items(examples: Sequence[Example], names: Sequence[str], rng: random.Random) -> list[Item]:
    """Make texts without marks, active and silent ones mixed."""
    modality = modality_of(examples)
    items = [Item(window(e, modality, rng), e.active, interval_of(e, names)) for e in examples]
    rng.shuffle(items)
    return items


def fuzzing_items(examples: Sequence[Example], names: Sequence[str], rng: random.Random) -> list[Item]:
    """Make active texts, of which every second has its marks (or its place) where the latent is silent.

    Negatives are active texts too, since with silent texts the topic alone would reveal the answer.
    """
    modality = modality_of(examples)
    items = []
    for number, e in enumerate(e for e in examples if e.active and e.context.modality == modality):
        right = number % 2 == 0
        if modality == "image":
            where = place(e.context) if right else wrong_place(e.context, rng)
            text = f"{window(e, modality, rng)} (place: {where})" if where else None
        else:
            marks = active_tokens(e) if right else wrong_tokens(e, modality, rng)
            text = window(e, modality, rng, marks) if marks else None
        if text is not None:
            items.append(Item(text, right, interval_of(e, names)))
    rng.shuffle(items)
    return items


def intruder_sets(
    examples: Sequence[Example], names: Sequence[str], rng: random.Random, size: int = 5, null: bool = False
) -> list[list[Item]]:
    """Make sets of `size` texts, one of them silent (truth True). With `null` all are silent, which is the control."""
    modality = modality_of(examples)
    active = [e for e in examples if e.active]
    silent = [e for e in examples if not e.active]
    rng.shuffle(active)
    rng.shuffle(silent)
    sets = []
    while silent and len(silent if null else active) >= size - 1 + null:
        odd = silent.pop()
        rest = [(silent if null else active).pop() for _ in range(size - 1)]
        items = [
            Item(window(odd, modality, rng), True, ""),
            *(Item(window(e, modality, rng), False, "") for e in rest),
        ]
        rng.shuffle(items)
        sets.append(items)
    return sets


def image_detection_items(
    examples: Sequence[Example], names: Sequence[str], rng: random.Random, folder: Path
) -> list[Item]:
    """Make images without outlines, active and silent ones mixed; empty for a text latent.

    Every image shows the view in which the latent is active most often, so that the view does not reveal the answer.
    """
    view = _main_view(examples)
    items = []
    for e in examples:
        in_view = not e.active or (e.context.patch is not None and e.context.patch[0] == view)
        if view is None or not in_view or image_of(e, folder, view) is None:
            continue
        items.append(Item("", e.active, interval_of(e, names), _Drawing(e, folder, view)))
    rng.shuffle(items)
    return items


def image_fuzzing_items(
    examples: Sequence[Example], names: Sequence[str], rng: random.Random, folder: Path
) -> list[Item]:
    """Make images of active studies with outlined patches; every second has the same shape at a silent place."""
    items = []
    for e in examples:
        right = len(items) % 2 == 0
        if not e.active or e.context.patch is None:
            continue
        view, patches = e.context.patch[0], active_patches(e)
        outlined = patches if right else moved_patches(e, rng)
        if outlined and image_of(e, folder, view) is not None:
            items.append(Item("", right, interval_of(e, names), _Drawing(e, folder, view, outlined)))
    rng.shuffle(items)
    return items


def moved_patches(example: Example, rng: random.Random, tries: int = 100) -> frozenset[int]:
    """Move the outlined patches together to a place where the latent is silent; empty if no such place was found."""
    patches = active_patches(example)
    patch = example.context.patch
    grid = next((m for m in example.context.maps if patch is not None and m.view == patch[0]), None)
    if grid is None or not patches:
        return frozenset()
    places = [divmod(number, grid.cols) for number in patches]
    rows, cols = [r for r, _ in places], [c for _, c in places]
    active = {*patches, *grid.patches}
    for _ in range(tries):
        down = rng.randint(-min(rows), grid.rows - 1 - max(rows))
        right = rng.randint(-min(cols), grid.cols - 1 - max(cols))
        moved = frozenset((r + down) * grid.cols + c + right for r, c in places)
        if not moved & active:
            return moved
    return frozenset()


async def ask_verdicts(
    judge: Judge, method: str, explanation: str, items: Sequence[Item], batch: int, licences: Iterable[str]
) -> Scored:
    """Ask a language model for verdicts, `batch` items per question. After an unusable answer the whole batch is
    unusable.
    """
    from sae_lens_maira.interp import prompts

    verdicts: list[Verdict] = []
    keys: list[str] = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        shown = [data_uri(item.draw()) if item.draw else item.text for item in part]
        question, form = prompts.VERDICTS[method](explanation, shown), prompts.verdicts_form(len(part))
        reply = await judge.ask(question, form, licences, topic=method)
        if reply.problem == "over budget":
            return Scored(score_of(method, judge.server.model, verdicts), tuple(keys), True)
        answers = [None] * len(part) if reply.answer is None else reply.answer.model_dump()["verdicts"]
        verdicts += [Verdict(i.truth, a, i.interval) for i, a in zip(part, answers, strict=True)]
        keys.append(reply.key)
    return Scored(score_of(method, judge.server.model, verdicts), tuple(keys))


async def ask_intruder(judge: Judge, sets: Sequence[Sequence[Item]], licences: Iterable[str]) -> Scored:
    """Ask a language model for intruders. Every text of a set counts as one question, so that chance is 0.5."""
    from sae_lens_maira.interp import prompts

    verdicts: list[Verdict] = []
    keys: list[str] = []
    stopped = False
    for items in sets:
        question = prompts.intrude([item.text for item in items])
        reply = await judge.ask(question, prompts.Intruder, licences, topic="intruder")
        if reply.problem == "over budget":
            stopped = True
            break
        number = reply.answer.number if reply.answer else 0
        if 1 <= number <= len(items):
            verdicts += [Verdict(item.truth, i == number) for i, item in enumerate(items, 1)]
        else:
            verdicts += [Verdict(item.truth, None) for item in items]
        keys.append(reply.key)
    # A silent text has no activation interval.
    score = replace(score_of("intruder", judge.server.model, verdicts), recall_by_interval=())
    return Scored(score, tuple(keys), stopped)


@dataclass(frozen=True)
class _Drawing:
    """Makes one image on demand, so that images are not in memory before their question."""

    example: Example
    folder: Path
    view: str
    patches: frozenset[int] = frozenset()

    def __call__(self) -> Image.Image:
        image = image_of(self.example, self.folder, self.view, self.patches)
        assert image is not None  # checked when the item was made
        return image


def _main_view(examples: Sequence[Example]) -> str | None:
    views = Counter(e.context.patch[0] for e in examples if e.active and e.context.patch is not None)
    return views.most_common(1)[0][0] if views else None


def patch_words(view: str, row: float, col: float, rows: int, cols: int) -> str:
    """Describe a patch: "right lower zone of the frontal image". Lateral images have front and back, not sides."""
    height = ("upper", "mid", "lower")[min(2, int(3 * (row + 0.5) / rows))]
    third = min(2, int(3 * (col + 0.5) / cols))
    if view == "lateral":
        return f"{('left', 'central', 'right')[third]} {height} part of the lateral image"
    name = "prior frontal" if view == "prior" else view
    side = ("right", "central", "left")[third]
    return f"{side} {height} zone of the {name} image"


def place(context: Context) -> str | None:
    """Describe the patch of largest activation; None for a token."""
    if context.patch is None:
        return None
    view, row, col = context.patch
    grid = _activation_map(context)
    return patch_words(view, row, col, grid.rows, grid.cols) if grid is not None else f"{view} image"


def wrong_place(context: Context, rng: random.Random) -> str | None:
    """Describe another place of the same image, where the latent is not active."""
    grid = _activation_map(context)
    if grid is None:
        return None
    size = (grid.rows, grid.cols)
    active = {patch_words(grid.view, *divmod(p, grid.cols), *size) for p in grid.patches}
    everywhere = {
        patch_words(grid.view, row, col, *size) for row in range(grid.rows) for col in range(grid.cols)
    }
    silent = sorted(everywhere - active - {place(context)})
    return rng.choice(silent) if silent else None


def active_patches(example: Example) -> frozenset[int]:
    """Row-major indices of the patches to outline in the view of the patch of largest activation."""
    grid = _activation_map(example.context)
    if grid is None or example.context.patch is None:
        return frozenset()
    _, row, col = example.context.patch
    above = {n for n, v in zip(grid.patches, grid.values, strict=True) if v > MARKED_FROM * example.max}
    return frozenset(above | {row * grid.cols + col})


def outlined(example: Example, folder: Path) -> Image.Image | None:
    """Draw the view of an example's patch of largest activation, with active patches outlined.

    Args:
        example: An active example of an image latent.
        folder: Folder of the record set.

    Returns:
        The image, or None where the record set keeps no such image.

    Raises:
        PrivacyError: The image path leaves the folder of the record set.
    """
    grid = _activation_map(example.context)
    return None if grid is None else image_of(example, folder, grid.view, active_patches(example))


def image_of(example: Example, folder: Path, view: str, patches: Collection[int] = ()) -> Image.Image | None:
    """Draw one view of an example's study as RGB, with the patches of these row-major indices outlined.

    Returns:
        The image, or None where the record set keeps no such image.

    Raises:
        PrivacyError: The image path leaves the folder of the record set.
    """
    name = dict(example.study.images).get(view)
    grid = next((m for m in example.context.maps if m.view == view), None)
    if name is None or grid is None:
        return None
    path = image_path(folder, name)
    if not path.is_file():
        return None
    with Image.open(path) as file:
        image = file.convert("RGB")
    draw = ImageDraw.Draw(image)
    height, width = image.height / grid.rows, image.width / grid.cols
    for number in sorted(patches):
        row, col = divmod(number, grid.cols)
        corner = (col * width, row * height, (col + 1) * width - 1, (row + 1) * height - 1)
        draw.rectangle(corner, outline=COLOUR)
    return image


def data_uri(image: Image.Image) -> str:
    """Convert an image to a PNG in a `data:` URI, for chat messages."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _activation_map(context: Context) -> ActivationMap | None:
    """Activation map of the view of the patch of largest activation; None for a token."""
    if context.patch is None:
        return None
    return next((m for m in context.maps if m.view == context.patch[0]), None)

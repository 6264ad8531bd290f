"""Show a context to a reader: a window of text with marks, a place in words, or the image with outlined patches.

A text window is the words around the chosen token; tokens above 0.3 of the latent's largest activation are marked
`<<so>>`, adjacent ones in one mark. A patch becomes words such as "right lower zone": the left of an image is the
patient's right. An outlined image shows the rectangles of active patches on the square crop that the record set keeps:

    patch (row, col) of a rows x cols grid -> its rectangle, drawn where activation > 0.3 of the latent's largest
"""

from __future__ import annotations

import base64
import io
import random
import re
from collections.abc import Collection
from pathlib import Path

from PIL import Image, ImageDraw

from sae_lens_maira.interp.examples import Example
from sae_lens_maira.latents.records import ActivationMap, Context
from sae_lens_maira.privacy import image_path

SPAN = 24  # Tokens on each side of the peak, Neuronpedia's window.
REPORT_TOKENS = 120
MARKED_FROM = 0.3
COLOUR = (255, 220, 0)
_SPACES = ("▁", "Ġ", " ")
_TIGHT = re.compile(r"\s+([.,;:?!)\]])")


def text_of(tokens: Collection[str], marked: Collection[int] = ()) -> str:
    """Tokens as text, with << >> around those whose index is in `marked`."""
    spaced = any(token.startswith(_SPACES) for token in tokens)
    parts: list[str] = []
    for i, token in enumerate(tokens):
        plain = token.replace("▁", " ").replace("Ġ", " ")
        if not spaced:
            plain = " " + plain
        if i in marked:
            lead = plain[: len(plain) - len(plain.lstrip())]
            opening = "" if i - 1 in marked else "<<"
            closing = "" if i + 1 in marked else ">>"
            plain = f"{lead}{opening}{plain.lstrip()}{closing}"
        parts.append(plain)
    return _TIGHT.sub(r"\1", " ".join("".join(parts).split()))


def active_tokens(example: Example) -> frozenset[int]:
    """Indices of tokens above the marking threshold; the peak is always included."""
    floor = MARKED_FROM * example.max
    found = {i for i, v in enumerate(example.context.activations) if v is not None and v > max(floor, 0.0)}
    return frozenset(found | {example.context.peak} if example.context.peak >= 0 else found)


def bounds(example: Example, modality: str, rng: random.Random) -> tuple[int, int]:
    """First and last+1 token shown: around the peak, around a random token where silent, the report for patches."""
    context, count = example.context, len(example.context.tokens)
    if modality == "image":
        report = [i for i, role in enumerate(context.roles) if role == "report"]
        return (report[0], min(report[-1] + 1, report[0] + REPORT_TOKENS)) if report else (0, count)
    middle = context.peak if context.peak >= 0 else rng.randrange(count) if count else 0
    return max(0, middle - SPAN), min(count, middle + SPAN + 1)


def window(example: Example, modality: str, rng: random.Random, marked: Collection[int] = ()) -> str:
    """The text shown for an example, with marks at the token indices `marked`."""
    start, stop = bounds(example, modality, rng)
    tokens = example.context.tokens[start:stop]
    text = text_of(tokens, {i - start for i in marked if start <= i < stop})
    return text or "(no text)"


def wrong_tokens(example: Example, modality: str, rng: random.Random) -> frozenset[int]:
    """As many silent tokens of the window as it has active ones: the marks of a fuzzed example."""
    start, stop = bounds(example, modality, rng)
    right = active_tokens(example)
    silent = [i for i in range(start, stop) if not example.context.activations[i] and i not in right]
    number = min(len(silent), max(1, sum(start <= i < stop for i in right)))
    return frozenset(rng.sample(silent, number))


def patch_words(view: str, row: float, col: float, rows: int, cols: int) -> str:
    """Place of a patch: "right lower zone of the frontal image". Laterals say front and back instead of sides."""
    height = ("upper", "mid", "lower")[min(2, int(3 * (row + 0.5) / rows))]
    third = min(2, int(3 * (col + 0.5) / cols))
    if view == "lateral":
        return f"{('left', 'central', 'right')[third]} {height} part of the lateral image"
    name = "prior frontal" if view == "prior" else view
    side = ("right", "central", "left")[third]
    return f"{side} {height} zone of the {name} image"


def place(context: Context) -> str | None:
    """Place of the chosen patch in words, None for a token."""
    if context.patch is None:
        return None
    view, row, col = context.patch
    grid = _activation_map(context)
    return patch_words(view, row, col, grid.rows, grid.cols) if grid is not None else f"{view} image"


def wrong_place(context: Context, rng: random.Random) -> str | None:
    """Another place of the same image, where the latent is not active at all."""
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


def words_of(text: str) -> list[str]:
    """Lower-case words of three letters or more."""
    return re.findall(r"[a-zà-öø-ÿ]{3,}", text.lower())


def peak_word(context: Context) -> str | None:
    """The whole word that holds the chosen token; None for a patch or a punctuation mark."""
    if not 0 <= context.peak < len(context.tokens):
        return None
    spaced = any(token.startswith(_SPACES) for token in context.tokens)
    first = last = context.peak
    if spaced:
        while first > 0 and not context.tokens[first].startswith(_SPACES):
            first -= 1
        while last + 1 < len(context.tokens) and not context.tokens[last + 1].startswith(_SPACES):
            last += 1
    found = words_of(text_of(context.tokens[first : last + 1]))
    return found[0] if found else None


def active_patches(example: Example) -> frozenset[int]:
    """Row-major indices of the patches that are outlined in the view of the chosen patch."""
    grid = _activation_map(example.context)
    if grid is None or example.context.patch is None:
        return frozenset()
    _, row, col = example.context.patch
    above = {n for n, v in zip(grid.patches, grid.values, strict=True) if v > MARKED_FROM * example.max}
    return frozenset(above | {row * grid.cols + col})


def outlined(example: Example, folder: Path) -> Image.Image | None:
    """The view that contains an example's chosen patch, with active patches outlined.

    Args:
        example: an active example of an image latent.
        folder: folder of the record set.

    Returns:
        The image, or None where the record set keeps no such image.

    Raises:
        PrivacyError: the image path leaves the folder of the record set.
    """
    grid = _activation_map(example.context)
    return None if grid is None else image_of(example, folder, grid.view, active_patches(example))


def image_of(example: Example, folder: Path, view: str, patches: Collection[int] = ()) -> Image.Image | None:
    """One view of an example's study as RGB, with the patches of these row-major indices outlined.

    Returns:
        The image, or None where the record set keeps no such image.

    Raises:
        PrivacyError: the image path leaves the folder of the record set.
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
    """An image as a PNG in a `data:` URI, the form in which chat messages carry it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _activation_map(context: Context) -> ActivationMap | None:
    """Activation map of the view that contains the chosen patch; None for a token."""
    if context.patch is None:
        return None
    return next((m for m in context.maps if m.view == context.patch[0]), None)

"""What a reader sees of a context: a window of text with marks, or a place in the film in a radiologist's words.

A text window is the words around the chosen token; tokens above 0.3 of the latent's largest activation are marked
`<<so>>`, neighbours in one mark. A patch becomes words such as "right lower zone": the left of an image is the
patient's right. It knows nothing about prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection

from sae_lens_maira.interp.examples import Example
from sae_lens_maira.latents.records import Context

SPAN = 24  # Tokens on each side of the peak, Neuronpedia's window.
REPORT_TOKENS = 120
MARKED_FROM = 0.3
_SPACES = ("▁", "Ġ", " ")
_TIGHT = re.compile(r"\s+([.,;:?!)\]])")


def text_of(tokens: Collection[str], marked: Collection[int] = ()) -> str:
    """Tokens as text, those whose index is in `marked` inside << >>."""
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
    """Indices of tokens above the marking threshold; the peak always."""
    floor = MARKED_FROM * example.max
    found = {i for i, v in enumerate(example.context.values) if v is not None and v > max(floor, 0.0)}
    return frozenset(found | {example.context.peak} if example.context.peak >= 0 else found)


def bounds(example: Example, kind: str, rng: random.Random) -> tuple[int, int]:
    """First and last+1 token shown: around the peak, around a random token where silent, the report for patches."""
    context, count = example.context, len(example.context.tokens)
    if kind == "image":
        report = [i for i, role in enumerate(context.roles) if role == "report"]
        return (report[0], min(report[-1] + 1, report[0] + REPORT_TOKENS)) if report else (0, count)
    middle = context.peak if context.peak >= 0 else rng.randrange(count) if count else 0
    return max(0, middle - SPAN), min(count, middle + SPAN + 1)


def window(example: Example, kind: str, rng: random.Random, marked: Collection[int] = ()) -> str:
    """The text shown for an example; marks only where asked for."""
    start, stop = bounds(example, kind, rng)
    tokens = example.context.tokens[start:stop]
    text = text_of(tokens, {i - start for i in marked if start <= i < stop})
    return text or "(no text)"


def wrong_tokens(example: Example, kind: str, rng: random.Random) -> frozenset[int]:
    """As many silent tokens of the window as it has firing ones: the marks of a fuzzed example."""
    start, stop = bounds(example, kind, rng)
    right = active_tokens(example)
    silent = [i for i in range(start, stop) if not example.context.values[i] and i not in right]
    number = min(len(silent), max(1, sum(start <= i < stop for i in right)))
    return frozenset(rng.sample(silent, number))


def patch_words(view: str, row: float, col: float, rows: int, cols: int) -> str:
    """Where a patch lies: "right lower zone of the frontal image". Laterals say front and back instead of sides."""
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
    for heat in context.heat:
        if heat.view == view:
            return patch_words(view, row, col, heat.rows, heat.cols)
    return f"{view} image"


def wrong_place(context: Context, rng: random.Random) -> str | None:
    """Another place of the same image, where the latent does not fire at all."""
    if context.patch is None:
        return None
    right = place(context)
    for heat in context.heat:
        if heat.view != context.patch[0]:
            continue
        name = (heat.view, heat.rows, heat.cols)
        firing = {patch_words(name[0], p // heat.cols, p % heat.cols, *name[1:]) for p in heat.patches}
        everywhere = {
            patch_words(name[0], row, col, *name[1:]) for row in range(heat.rows) for col in range(heat.cols)
        }
        silent = sorted(everywhere - firing - {right})
        return rng.choice(silent) if silent else None
    return None


def words_of(text: str) -> list[str]:
    """Lower-case words of three letters or more."""
    return re.findall(r"[a-zà-öø-ÿ]{3,}", text.lower())


def peak_word(context: Context) -> str | None:
    """The whole word that holds the chosen token; None for a patch or a sign."""
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

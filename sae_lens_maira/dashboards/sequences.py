"""Flatten the contexts of a latent into token sequences, the only form in which a text dashboard can show a study.

    ⟦study a1b2⟧  <frontal r12c07> <frontal r12c08> ...  ▁left ▁pleural ▁effusion ...
    always first  the strongest patches, each once       a window of text around the peak

The first token makes every sequence unique, because Neuronpedia hides sequences with equal tokens. A study appears once
per latent.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sae_lens_maira.errors import PrivacyError, RecordError
from sae_lens_maira.latents.records import Context, Histogram, LatentRecord

MAX_TOKENS = 1024
DIGITS = 5
BARS = 50


@dataclass(frozen=True)
class Window:
    """How much of a study is shown: `text` tokens around the peak, and at most `patches` image patches."""

    text: int = 128
    patches: int = 64

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            RecordError: Nothing would be shown, or more than Neuronpedia accepts.
        """
        if self.text < 1 or self.patches < 0 or 1 + self.text + self.patches > MAX_TOKENS:
            raise RecordError(
                f"The window is {self.text} text tokens and {self.patches} patches; expected at least one text token "
                f"and at most {MAX_TOKENS - 1} tokens in all. Change --text-window or --patches."
            )


@dataclass(frozen=True)
class Sequence:
    """Activations of one latent in one study, as tokens.

    Attributes:
        study: Pseudonym of the study.
        tokens: Token texts.
        values: Activation per token; 0 where the activation was not harvested.
        hit: Index of the token the context was chosen for; 0, the study's name, in a zero context.
        group: "top", "interval" or "zero".
        low, high, fraction: Bounds of the interval and the share of rows in it; -1, the latent's maximum and -1 for
            the top group.
    """

    study: str
    tokens: list[str]
    values: list[float]
    hit: int
    group: str
    low: float
    high: float
    fraction: float


def sequences(
    record: LatentRecord, window: Window | None = None, listed: Container[str] | None = None
) -> Iterator[Sequence]:
    """Yield the sequences of one latent: top contexts, then intervals from the highest, then zero contexts.

    Args:
        record: The latent.
        window: How much of each study is shown.
        listed: Studies whose licence is known; None skips the check.

    Raises:
        PrivacyError: A context shows a study that is not listed.
        RecordError: A number is not finite, or a context's tokens and values differ in length.
    """
    window = window or Window()
    groups: list[tuple[str, float, float, float, tuple[Context, ...]]] = [
        ("top", -1.0, finite(record.max, record.latent), -1.0, record.top)
    ]
    # Neuronpedia sorts groups by their upper bound, so no interval may end above the TOP group's maximum.
    groups += [("interval", i.low, min(i.high, record.max), i.fraction, i.contexts) for i in record.intervals]
    groups.append(("zero", 0.0, 0.0, max(0.0, 1.0 - record.density), record.zero))
    seen: set[str] = set()
    for name, low, high, fraction, contexts in groups:
        bounds = [finite(x, record.latent) for x in (low, high)]
        for context in contexts:
            if context.study in seen:
                continue
            seen.add(context.study)
            if listed is not None and context.study not in listed:
                raise PrivacyError(
                    f"Latent {record.latent} shows study {context.study}, which studies.jsonl does not list, so its "
                    "licence is unknown. Write the records again."
                )
            tokens, values, hit = _flatten(context, record.latent, window)
            yield Sequence(
                study=context.study,
                tokens=tokens,
                values=values,
                hit=hit,
                group=name,
                low=bounds[0],
                high=bounds[1],
                fraction=finite(fraction, record.latent, digits=8),
            )


def bars(histogram: Histogram, largest: float) -> tuple[list[float], list[int]]:
    """Rebin a histogram into `BARS` equally wide bars, from its first filled bin to `largest`.

    Counts are interpolated along the cumulative count and keep their sum. Both lists are empty if nothing fired.

    Returns:
        Centres and heights of the bars.
    """
    counts = np.asarray(histogram.counts, dtype=np.float64)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return [], []
    edges = np.asarray(histogram.edges, dtype=np.float64)[filled[0] : filled[-1] + 2]
    if edges[-2] < largest < edges[-1]:
        edges[-1] = largest
    cumulative = np.concatenate([[0.0], np.cumsum(counts[filled[0] : filled[-1] + 1])])
    cuts = np.linspace(edges[0], edges[-1], BARS + 1)
    heights = np.diff(np.rint(np.interp(cuts, edges, cumulative))).astype(int)
    return [round(float(x), DIGITS) for x in (cuts[1:] + cuts[:-1]) / 2], heights.tolist()


def finite(value: float, latent: int, digits: int = DIGITS) -> float:
    """Round a value to `digits` decimals.

    Raises:
        RecordError: The value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise RecordError(
            f"Latent {latent} has a value of {value}; dashboards contain finite numbers only. Write its record again."
        )
    return round(float(value), digits) + 0.0


def clean(token: str) -> str:
    """Make a token acceptable to JSON, Postgres and the upload: not empty, no NUL, no lone surrogate."""
    if token.isascii() and token and "\0" not in token:
        return token
    return token.replace("\0", " ").encode("utf-8", "replace").decode("utf-8") or "∅"


@lru_cache(4096)
def _cleaned(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Cleaned tokens of a study; cached, since many latents show the same study."""
    return tuple(map(clean, tokens))


def _flatten(context: Context, latent: int, window: Window) -> tuple[list[str], list[float], int]:
    tokens, values, hit = [f"⟦study {clean(context.study)}⟧"], [0.0], 0
    for view, patches in enumerate(_patches(context, window.patches)):
        grid = context.maps[view]
        names = _names(grid.view, grid.rows, grid.cols)
        if (chosen := _hit(context, view)) in patches:
            hit = len(tokens) + list(patches).index(chosen)
        tokens += [names[patch] for patch in patches]
        values += [round(float(value), DIGITS) + 0.0 for value in patches.values()]
    first, last = _around(context, window.text)
    if context.value > 0 and context.patch is None and context.peak >= 0:
        hit = len(tokens) + context.peak - first
    tokens += _cleaned(context.tokens)[first:last]
    values += [round(value, DIGITS) + 0.0 if value else 0.0 for value in context.activations[first:last]]
    if not math.isfinite(sum(values)):
        raise RecordError(
            f"Latent {latent}, study {context.study}: an activation is NaN or infinite; dashboards contain finite "
            "numbers only. Write its record again."
        )
    return tokens, values, hit


@lru_cache(64)
def _names(view: str, rows: int, cols: int) -> tuple[str, ...]:
    """Token texts of the patches of a view."""
    return tuple(f"<{view} r{row:02d}c{col:02d}>" for row in range(rows) for col in range(cols))


def _hit(context: Context, view: int) -> int:
    """The patch of a view that the context was chosen for; -1 if it was chosen for something else."""
    grid = context.maps[view]
    if context.patch is None or context.patch[0] != grid.view:
        return -1
    return context.patch[1] * grid.cols + context.patch[2]


def _patches(context: Context, limit: int) -> list[dict[int, float]]:
    """The strongest patches per view, in reading order, with their values; the chosen patch is always included."""
    views = [dict(zip(grid.patches, grid.values, strict=True)) for grid in context.maps]
    if sum(map(len, views)) > limit:
        hits = [_hit(context, view) for view in range(len(views))]
        ranked = sorted(
            (patch != hits[view], -value, view, patch)
            for view, values in enumerate(views)
            for patch, value in values.items()
        )
        views = [{} for _ in views]
        for _, value, view, patch in ranked[:limit]:
            views[view][patch] = -value
    return [dict(sorted(values.items())) for values in views]


def _around(context: Context, size: int) -> tuple[int, int]:
    """Bounds of the text shown: around the peak, else around the strongest token, else the start of the report."""
    centre = context.peak
    if context.patch is not None or centre < 0:
        strengths = [value or 0.0 for value in context.activations]
        if (strongest := max(strengths, default=0.0)) > 0:
            centre = strengths.index(strongest)
        else:
            centre = context.roles.index("report") + size // 2 if "report" in context.roles else 0
    first = max(0, min(centre - size // 2, len(context.tokens) - size))
    return first, min(first + size, len(context.tokens))

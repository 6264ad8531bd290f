"""Explanations of latents as dashboards show them: a sentence, and a note that tells how well it held.

Neuronpedia's bulk import takes no scores, so they go into the note, each beside its control. It knows nothing about
how explanations are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sae_lens_maira.interp.records import Interpretation, load


def read_interpretations(folder: Path | str) -> dict[int, list[Interpretation]]:
    """Interpretations that lie beside a set of records, per latent; empty where none were made.

    Raises:
        RecordError: a line is no interpretation.
    """
    found: dict[int, list[Interpretation]] = {}
    for one in load(folder):
        found.setdefault(one.latent, []).append(one)
    return found


def shown(interpretations: Iterable[Interpretation]) -> list[Interpretation]:
    """Those that have a usable sentence, one per sentence."""
    kept = {one.explanation: one for one in interpretations if one.status == "ok" and one.explanation}
    return list(kept.values())


def shorten(text: str, most: int = 512) -> str:
    """The text, cut at a word where it is longer than the upload takes."""
    if len(text) <= most:
        return text
    return text[: most - 1].rsplit(" ", 1)[0][: most - 1] + "…"


def note(interpretation: Interpretation) -> str:
    """Who explained it and how it scored, each score with what another latent's explanation scored there."""
    parts = [f"explainer: {interpretation.explainer}"]
    controls = {score.method: score for score in interpretation.control}
    for score in interpretation.scores:
        if score.balanced_accuracy is None:
            continue
        text = f"{score.method} {score.balanced_accuracy:.2f}"
        if score.low is not None and score.high is not None:
            text += f" [{score.low:.2f}, {score.high:.2f}]"
        control = controls.get(score.method)
        if control is not None and control.balanced_accuracy is not None:
            text += f", control {control.balanced_accuracy:.2f}"
        parts.append(f"{text} (balanced accuracy, n = {score.answered}, judge {score.judge})")
    return "; ".join(parts)

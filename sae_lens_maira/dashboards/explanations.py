"""Interpretations as dashboards show them: which one names a latent, its score, and a note with all scores.

Neuronpedia's bulk import has no field for scores, so `note` writes them into the explanation's notes, each with its
control.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sae_lens_maira.interp.records import Interpretation, Score, load

Interpretations = Mapping[int, Iterable[Interpretation]]


def read_interpretations(folder: Path | str) -> dict[int, list[Interpretation]]:
    """Read the interpretations stored with a record set, per latent; empty if there are none.

    Raises:
        RecordError: a line is not an interpretation.
    """
    return by_latent(load(folder))


def by_latent(interpretations: Iterable[Interpretation]) -> dict[int, list[Interpretation]]:
    """Group interpretations by latent."""
    grouped: dict[int, list[Interpretation]] = {}
    for one in interpretations:
        grouped.setdefault(one.latent, []).append(one)
    return grouped


def usable(interpretations: Iterable[Interpretation]) -> list[Interpretation]:
    """Interpretations with a usable sentence, one per sentence."""
    kept = {one.explanation: one for one in interpretations if one.status == "ok" and one.explanation}
    return list(kept.values())


def leading_score(scores: Sequence[Score]) -> Score | None:
    """The score shown in the index: detection if it was measured, else the first one."""
    for score in scores:
        if score.method == "detection" and score.balanced_accuracy is not None:
            return score
    return next((score for score in scores if score.balanced_accuracy is not None), None)


def best_named(interpretations: Sequence[Interpretation]) -> Interpretation | None:
    """The interpretation that names a latent: the one with the best leading score."""

    def value(one: Interpretation) -> float:
        score = leading_score(one.scores)
        return -1.0 if score is None or score.balanced_accuracy is None else score.balanced_accuracy

    return max((one for one in interpretations if one.explanation), key=value, default=None)


def control_of(interpretation: Interpretation) -> Score | None:
    """The control of the leading score: same method, same judge."""
    lead = leading_score(interpretation.scores)
    if lead is None:
        return None
    same = [c for c in interpretation.control if (c.method, c.judge) == (lead.method, lead.judge)]
    return same[0] if same else None


def shorten(text: str, limit: int) -> str:
    """Cut a text at a word boundary so that it has at most `limit` characters."""
    if len(text) <= limit:
        return text
    return text[: limit - 1].rsplit(" ", 1)[0][: limit - 1] + "…"


def note(interpretation: Interpretation) -> str:
    """Explainer and scores in one line; every score with the score of another latent's explanation as control."""
    parts = [f"explainer: {interpretation.explainer}"]
    if interpretation.method:
        parts.append(f"method: {interpretation.method}")
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

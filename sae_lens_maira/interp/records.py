"""Interpretations of latents: explanation, scores, and a control for every score.

One `Interpretation` per latent and explainer, stored as one JSON line each in `interpretations.jsonl` of the record
set. A score counts what was asked, answered and unusable; nothing is imputed. Neuronpedia knows a fixed list of
explanation types: `explanation_type` maps our method to the nearest of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import atomic_write
from sae_lens_maira.latents.serialization import from_plain, to_plain
from sae_lens_maira.privacy import private_files

FILE = "interpretations.jsonl"

EXPLANATION_TYPES = (
    "oai_token-act-pair",
    "oai_attention-head",
    "np_max-act-logits",
    "np_max-act",
    "np_acts-logits-general",
    "eleuther_acts_top20",
    "python-code",
    "human",
)
"""The explanation types that Neuronpedia's database knows: `typeName` is a foreign key, others are refused there."""


@dataclass(frozen=True)
class Score:
    """Score of one explanation by one scorer and judge.

    Attributes:
        method: name of the scorer, such as "detection" (see `score.py`).
        judge: model that judged, or "truth" / "words" for the judges without a language model.
        asked: number of questions.
        answered: number of usable answers.
        unusable: number of answers that were cut off, refused or malformed; asked = answered + unusable.
        true_positive, false_positive, true_negative, false_negative: counts of the usable answers.
        balanced_accuracy: mean of sensitivity and specificity; None where a class has no answer.
        low, high: its 95 % interval.
        recall_by_interval: (activation interval, recall, n), highest activations first.
    """

    method: str
    judge: str
    asked: int
    answered: int
    unusable: int
    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int
    balanced_accuracy: float | None
    low: float | None
    high: float | None
    recall_by_interval: tuple[tuple[str, float, int], ...] = ()


@dataclass(frozen=True)
class Interpretation:
    """An explanation of one latent with its scores and controls.

    Attributes:
        latent: latent number.
        explanation: the sentence; None where there is no usable one.
        explainer: model that wrote it, or "contrast (no LLM)" for the offline explainer.
        method: how the explainer was asked, such as "acts_top40": active examples shown, taken evenly from the
            activation intervals; "" for the offline explainer.
        category: "device", "pathology", "longitudinal change", "textual" or "other".
        scores: scores of this explanation.
        control: the same scorers with another latent's explanation, in the order of `scores`.
        control_latent: the latent whose explanation that was.
        status: "ok", "too_rare", "unusable" or "over_budget".
        n_train, n_test: number of examples shown to the explainer and asked about; no patient is in both.
        prompt_version: version of the prompts.
        journal_keys: keys of the calls in the journal.
    """

    latent: int
    explanation: str | None
    explainer: str
    method: str
    category: str
    scores: tuple[Score, ...]
    control: tuple[Score, ...]
    control_latent: int | None
    status: str
    n_train: int
    n_test: int
    prompt_version: str
    journal_keys: tuple[str, ...] = ()

    @property
    def worth(self) -> tuple[bool, bool]:
        """Whether it has an explanation, and whether it has a usable score."""
        return bool(self.explanation), any(s.balanced_accuracy is not None for s in self.scores)


def explanation_type(method: str) -> str | None:
    """Neuronpedia's explanation type for a method of ours: the nearest one it knows, None for the offline explainer.

    Args:
        method: `Interpretation.method`; where it is not a type there, the notes should name it.
    """
    if not method or method in EXPLANATION_TYPES:
        return method or None
    return "eleuther_acts_top20" if re.fullmatch(r"(eleuther_)?acts_top\d+", method) else "np_max-act"


def load(folder: Path | str) -> list[Interpretation]:
    """Interpretations of a record set, in the file's order; empty where none were made.

    Raises:
        RecordError: a line is not an interpretation.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    found: list[Interpretation] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found.append(from_plain(Interpretation, json.loads(line)))
            except (RecordError, ValueError, AttributeError, RecursionError) as error:
                raise RecordError(
                    f"{path}, line {number} is not an interpretation ({error}); remove the line or make the "
                    "interpretations again."
                ) from None
    return found


def save(folder: Path | str, done: Iterable[Interpretation]) -> list[Interpretation]:
    """Write interpretations in place of those by the same explainer of the same latents; all others stay.

    A stored interpretation that has an explanation, or a usable score, is not replaced by one that has none.

    Returns:
        The interpretations that the file now holds for these latents and explainers, in the order given.
    """
    before = load(folder)
    known = {(one.latent, one.explainer): one for one in before}
    better: dict[tuple[int, str], Interpretation] = {}
    for one in done:
        key = (one.latent, one.explainer)
        stored = known.get(key)
        better[key] = stored if stored is not None and stored.worth > one.worth else one
    kept = [one for one in before if (one.latent, one.explainer) not in better]
    lines = [
        json.dumps(to_plain(one), allow_nan=False, ensure_ascii=False) + "\n"
        for one in (*kept, *better.values())
    ]
    with private_files(folder):
        atomic_write(Path(folder) / FILE, "".join(lines))
    return list(better.values())

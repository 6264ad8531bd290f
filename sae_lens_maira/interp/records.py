"""What is said about a latent, and how well it holds: explanation, scores, and the control beside every score.

One `Interpretation` per latent and explainer, a JSON line each. A score counts what was asked, answered and
unusable; nothing is imputed. Dashboards read these records; they know nothing about servers or prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import atomic_write
from sae_lens_maira.latents.serialization import from_plain, to_plain

FILE = "interpretations.jsonl"


@dataclass(frozen=True)
class Score:
    """One scorer's verdict on one explanation.

    Attributes:
        method: "detection", "fuzzing" or "intruder".
        judge: model that judged, or "truth" / "words" for the judges without an LLM.
        asked: questions put.
        answered: usable answers.
        unusable: cut off, refused or malformed answers; asked = answered + unusable.
        true_positive, false_positive, true_negative, false_negative: of the answered ones.
        balanced_accuracy: mean of sensitivity and specificity; None where a class has no answer.
        low, high: its 95 % interval.
        recall_by_interval: (interval, recall, n), highest activations first.
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
        latent: its number.
        explanation: the sentence; None where none could be had.
        explainer: model that wrote it, or "contrast (no LLM)" for the offline explainer.
        method: Neuronpedia's explainer type, such as "eleuther_acts_top20"; "" for the offline explainer.
        category: "device", "pathology", "longitudinal change", "textual" or "other".
        scores: this explanation's scores.
        control: the same scorers with another latent's explanation, same method order as `scores`.
        control_latent: the latent whose explanation that was.
        status: "ok", "too_rare", "unusable" or "over_budget".
        n_train, n_test: examples shown to the explainer and asked about; no patient is in both.
        prompt_version: of the prompts.
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


def load(folder: Path | str) -> list[Interpretation]:
    """Interpretations beside a record set, in the file's order; none if there are none.

    Raises:
        RecordError: a line is no interpretation.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    found: list[Interpretation] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found.append(from_plain(Interpretation, json.loads(line)))
            except (RecordError, ValueError, AttributeError) as error:
                raise RecordError(
                    f"{path}, line {number} is not an interpretation ({error}); remove the line or make the "
                    "interpretations again."
                ) from None
    return found


def save(folder: Path | str, done: Sequence[Interpretation]) -> list[Interpretation]:
    """Write interpretations in place of those by the same explainer of the same latents; the others stay."""
    new = {(one.latent, one.explainer) for one in done}
    kept = [one for one in load(folder) if (one.latent, one.explainer) not in new]
    path = Path(folder) / FILE
    lines = [json.dumps(to_plain(one), allow_nan=False, ensure_ascii=False) + "\n" for one in (*kept, *done)]
    atomic_write(path, "".join(lines))
    return list(done)

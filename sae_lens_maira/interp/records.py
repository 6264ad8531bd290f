"""Interpretations of latents (explanation, scores, controls), with their file, table and figure.

There is one `Interpretation` per latent and explainer, stored as one JSON line in `interpretations.jsonl` of the record
set. A score contains the numbers of questions asked, answered and unusable; nothing is imputed. Its control is the
score of the same questions with another latent's explanation. Neuronpedia has a fixed list of explanation types;
`explanation_type` maps a method to the nearest of them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_maira.checksums import EDITED, take_checksum, with_checksum
from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import atomic_write, save_figure, sha256_of
from sae_lens_maira.latents.contexts import from_plain, to_plain
from sae_lens_maira.latents.recordset import META, RecordSet
from sae_lens_maira.privacy import private_files, strictest

if TYPE_CHECKING:
    import pandas as pd

    from sae_lens_maira.latents.records import RecordsMeta

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
"""Explanation types in Neuronpedia's database, which refuses other values of `typeName`."""


@dataclass(frozen=True)
class Score:
    """Score of one explanation by one scorer and judge.

    Attributes:
        method: Name of the scorer, such as "detection" (see `score.py`).
        judge: Model that judged, or "truth" / "words" for the judges without a language model.
        asked: Number of questions.
        answered: Number of usable answers.
        unusable: Number of answers that were cut off, refused or malformed; asked = answered + unusable.
        true_positive, false_positive, true_negative, false_negative: Counts of the usable answers.
        balanced_accuracy: Mean of sensitivity and specificity; None if a class has no answer.
        low, high: 95 % interval of the balanced accuracy.
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
    """Explanation of one latent with its scores and controls.

    Attributes:
        latent: Latent number.
        explanation: Explanation, one sentence; None if there is no usable one.
        explainer: Model that wrote it, or "contrast (no LLM)" for the offline explainer.
        method: Form of the question, such as "acts_top40" for 40 active examples, taken evenly from the activation
            intervals; "" for the offline explainer.
        category: "device", "pathology", "longitudinal change", "textual" or "other".
        scores: Scores of this explanation.
        control: Scores with another latent's explanation, in the order of `scores`.
        control_latent: Latent whose explanation the control uses.
        status: "ok", "too_rare", "unusable" or "over_budget".
        n_train, n_test: Numbers of examples shown to the explainer and used in questions; no patient is in both.
        prompt_version: Version of the prompts.
        journal_keys: Keys of the calls in the journal.
        records: Fingerprint of the record set; set by `save`.
        licence: Strictest licence class of the record set's studies; set by `save`.
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
    records: str = ""
    licence: str = ""

    @property
    def worth(self) -> tuple[bool, bool]:
        """Whether there is an explanation, and whether there is a usable score."""
        return bool(self.explanation), any(s.balanced_accuracy is not None for s in self.scores)


def explanation_type(method: str) -> str | None:
    """Map a method to the nearest explanation type of Neuronpedia; None for the offline explainer.

    Args:
        method: `Interpretation.method`. If it is not one of Neuronpedia's types, name it in the notes.
    """
    if not method or method in EXPLANATION_TYPES:
        return method or None
    return "eleuther_acts_top20" if re.fullmatch(r"(eleuther_)?acts_top\d+", method) else "np_max-act"


def load(folder: Path | str) -> list[Interpretation]:
    """Read the interpretations of a record set, in the file's order; empty if there are none.

    Raises:
        RecordError: A line is not an interpretation, or belongs to another record set.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    found: list[Interpretation] = []
    fingerprint = _fingerprint(folder)
    number, total = 0, None
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(_lines(lines, path), 1):
            try:
                plain = json.loads(line)
                if not take_checksum(plain):
                    raise ValueError(f"its content has changed. {EDITED}")
                total = plain.pop("lines", total)
                found.append(from_plain(Interpretation, plain))
            except (RecordError, ValueError, AttributeError, RecursionError) as error:
                raise RecordError(
                    f"{path}, line {number} is not an interpretation ({error}); remove the line or make the "
                    "interpretations again."
                ) from None
            if found[-1].records != fingerprint:
                raise RecordError(
                    f"{path}, line {number} belongs to the record set {found[-1].records[:12] or '(not named)'}, and "
                    f"the folder contains {fingerprint[:12] or 'none'}. Move the file away and run `sae-lens-maira "
                    "interpret run` again."
                )
    if total not in (None, number):
        raise RecordError(
            f"{path} has {number} of the {total} lines that were written. Restore it from a copy, or make the "
            "interpretations again."
        )
    return found


def _lines(file: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path} is not text in UTF-8 ({error}); it is damaged. Restore it from a copy, or make the "
            "interpretations again."
        ) from None


def _fingerprint(folder: Path | str) -> str:
    """Fingerprint of the record set in a folder; empty if there is none."""
    meta = Path(folder) / META
    return sha256_of(meta) if meta.is_file() else ""


def save(folder: Path | str, done: Iterable[Interpretation]) -> list[Interpretation]:
    """Write interpretations; they replace those of the same latents by the same explainer.

    A stored interpretation with an explanation, or a usable score, is not replaced by one without. The fingerprint of
    the record set and the strictest licence of its studies are added.

    Returns:
        Interpretations that the file now contains for these latents and explainers, in the given order.
    """
    before, fingerprint = load(folder), _fingerprint(folder)
    studies = RecordSet.open(folder).studies.values() if fingerprint else ()
    licence = strictest(str(study.licence) for study in studies) if fingerprint else ""
    known = {(one.latent, one.explainer): one for one in before}
    better: dict[tuple[int, str], Interpretation] = {}
    for one in (replace(given, records=fingerprint, licence=licence) for given in done):
        key = (one.latent, one.explainer)
        stored = known.get(key)
        better[key] = stored if stored is not None and stored.worth > one.worth else one
    kept = [one for one in before if (one.latent, one.explainer) not in better]
    every = [*kept, *better.values()]
    rows = (with_checksum(to_plain(one) | {"lines": len(every)}) for one in every)
    lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows]
    with private_files(folder):
        atomic_write(Path(folder) / FILE, "".join(lines))
    return list(better.values())


CATEGORIES = ("device", "pathology", "longitudinal change", "textual", "other")


def table(interpretations: Sequence[Interpretation]) -> pd.DataFrame:
    """Make a table: one row per latent, explainer and scorer; an interpretation without scores has one row."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for one in interpretations:
        base = {
            "latent": one.latent,
            "explainer": one.explainer,
            "category": one.category,
            "status": one.status,
            "explanation": one.explanation,
        }
        controls = {(score.method, score.judge): score for score in one.control}
        for score in one.scores:
            control = controls.get((score.method, score.judge))
            rows.append(
                base
                | {
                    "method": score.method,
                    "judge": score.judge,
                    "balanced_accuracy": score.balanced_accuracy,
                    "low": score.low,
                    "high": score.high,
                    "control": control.balanced_accuracy if control else None,
                    "asked": score.asked,
                    "answered": score.answered,
                    "unusable": score.unusable,
                }
            )
        if not one.scores:
            rows.append(base)
    columns = [
        "latent",
        "explainer",
        "category",
        "status",
        "explanation",
        "method",
        "judge",
        "balanced_accuracy",
    ]
    columns += ["low", "high", "control", "asked", "answered", "unusable"]
    return pd.DataFrame(rows, columns=columns)


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Summarise per explainer, scorer and judge: latents, mean score, mean control, questions asked and unusable."""
    scored = scores.dropna(subset=["balanced_accuracy"])
    return (
        scored.groupby(["explainer", "method", "judge"], sort=False)
        .agg(
            latents=("latent", "nunique"),
            balanced_accuracy=("balanced_accuracy", "mean"),
            control=("control", "mean"),
            asked=("asked", "sum"),
            answered=("answered", "sum"),
            unusable=("unusable", "sum"),
        )
        .reset_index()
    )


def categories(interpretations: Sequence[Interpretation]) -> dict[str, int]:
    """Number of explained latents per category, in a fixed order."""
    found = Counter(one.category for one in interpretations if one.explanation)
    return {name: found.get(name, 0) for name in CATEGORIES}


def statuses(interpretations: Sequence[Interpretation]) -> dict[str, int]:
    """Number of interpretations per status."""
    return dict(Counter(one.status for one in interpretations))


def write_figure(sets: Mapping[str, Sequence[Interpretation]], path: Path | str) -> None:
    """Draw histograms of balanced accuracies as PNG, one panel per scorer and judge.

    Args:
        sets: Name -> interpretations. The first set is the reported one, whose shuffled control is drawn too; the
            others are controls ("untrained SAE", "raw dimensions").
        path: Path of the PNG.

    Raises:
        RecordError: The first set has no score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = {name: table(done).dropna(subset=["balanced_accuracy"]) for name, done in sets.items()}
    first, scores = next(iter(tables.items()))
    panels = list(dict.fromkeys(zip(scores["method"], scores["judge"], strict=True)))
    if not panels:
        raise RecordError(
            f"{first} has no scored interpretation, so there is nothing to draw. Run `sae-lens-maira interpret run` "
            "first, or look at the statuses it reports."
        )
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    edges = [i / 20 for i in range(21)]
    for number, (method, judge) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        mine = _of(scores, method, judge)
        lines = {first: mine["balanced_accuracy"], "shuffled explanations": mine["control"].dropna()}
        lines |= {n: _of(t, method, judge)["balanced_accuracy"] for n, t in tables.items() if n != first}
        for i, (name, values) in enumerate(lines.items()):
            if len(values):
                shares = [1 / len(values)] * len(values)
                label = f"{name} (n = {len(values)}, mean {values.mean():.2f})"
                filled = "stepfilled" if i == 0 else "step"
                axes.hist(
                    values, edges, weights=shares, histtype=filled, alpha=0.6 if i == 0 else 1, label=label
                )
        axes.axvline(0.5, color="0.5", linewidth=0.8, linestyle=":")
        axes.set(
            xlabel="balanced accuracy",
            ylabel="share of latents",
            title=f"{method}, judge: {judge}",
            xlim=(0, 1),
        )
        axes.legend(fontsize=7, loc="upper left")
    save_figure(figure, path, dpi=150, metadata={"Software": None})


def _of(scores: pd.DataFrame, method: str, judge: str) -> pd.DataFrame:
    return scores.loc[(scores["method"] == method) & (scores["judge"] == judge)]


def neuronpedia_rows(
    interpretations: Sequence[Interpretation], meta: RecordsMeta, model_id: str, source: str
) -> list[dict[str, Any]]:
    """Make rows of Neuronpedia's explanation table, with additional fields.

    Args:
        interpretations: Interpretations; those without an explanation are left out.
        meta: Description of the record set.
        model_id: Name of the model in Neuronpedia.
        source: Name of the SAE at its layer in Neuronpedia.
    """
    return [
        {
            "modelId": model_id,
            "layer": source,
            "index": str(one.latent),
            "description": one.explanation,
            "typeName": explanation_type(one.method),
            "method": one.method,
            "explanationModelName": one.explainer,
            "prompt_version": one.prompt_version,
            "hook_name": meta.hook_name,
            "n_train": one.n_train,
            "n_test": one.n_test,
            "scores": {f"{s.method}/{s.judge}": _brief(s) for s in one.scores},
            "control": {f"{s.method}/{s.judge}": _brief(s) for s in one.control},
            "journal_keys": list(one.journal_keys),
        }
        for one in interpretations
        if one.explanation
    ]


def write_neuronpedia(rows: Sequence[Mapping[str, Any]], path: Path | str) -> None:
    """Write rows as JSON lines."""
    text = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    atomic_write(path, text)


def _brief(score: Any) -> dict[str, Any]:
    interval = None if score.low is None else [score.low, score.high]
    return {
        "asked": score.asked,
        "answered": score.answered,
        "unusable": score.unusable,
        "balanced_accuracy": score.balanced_accuracy,
        "ci": interval,
    }

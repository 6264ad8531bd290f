"""Report interpretations: a table, the distribution of scores against their controls, counts per category.

Every score is reported with its control: the same questions with another latent's explanation, and where given the
scores of other record sets (an untrained SAE, raw residual dimensions).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.records import Interpretation, explanation_type
from sae_lens_maira.io import atomic_write
from sae_lens_maira.latents.records import RecordsMeta

CATEGORIES = ("device", "pathology", "longitudinal change", "textual", "other")


def table(interpretations: Sequence[Interpretation]) -> pd.DataFrame:
    """One row per latent, explainer and scorer; interpretations without scores have one row with empty scores."""
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
    """Per explainer, scorer and judge: latents, mean score, mean control, and what was asked and lost."""
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
    """How many explained latents are of each category, in a fixed order."""
    found = Counter(one.category for one in interpretations if one.explanation)
    return {name: found.get(name, 0) for name in CATEGORIES}


def statuses(interpretations: Sequence[Interpretation]) -> dict[str, int]:
    """How many interpretations ended in each status."""
    return dict(Counter(one.status for one in interpretations))


def write_figure(sets: Mapping[str, Sequence[Interpretation]], path: Path | str) -> None:
    """Histogram PNG of balanced accuracies, one panel per scorer and judge.

    Args:
        sets: interpretations by name; the first is the one reported, whose shuffled explanations are drawn too, the
            others are controls ("untrained SAE", "raw dimensions").
        path: path of the PNG.

    Raises:
        RecordError: the first set has no score.
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
    figure.savefig(Path(path), dpi=150, metadata={"Software": None})


def _of(scores: pd.DataFrame, method: str, judge: str) -> pd.DataFrame:
    return scores.loc[(scores["method"] == method) & (scores["judge"] == judge)]


def neuronpedia_rows(
    interpretations: Sequence[Interpretation], meta: RecordsMeta, model_id: str, source: str
) -> list[dict[str, Any]]:
    """Rows of Neuronpedia's explanation table, with our fields added.

    Args:
        interpretations: interpretations; those without an explanation are left out.
        meta: description of the record set.
        model_id: Neuronpedia's name of the model.
        source: Neuronpedia's name of the SAE at its layer.
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
    """Rows as JSON lines."""
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

"""Metrics of generated reports from other packages, with one interface.

    metric(reports, references) -> MetricScores      any function of this form is a metric

`radgraph_f1` and `chexbert_f1` adapt the packages radgraph and f1chexbert. Each package is imported when its metric is
made, and then downloads its own model, which has its own licence.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from sae_lens_maira.errors import ConfigError, StudyError
from sae_lens_maira.stats import bootstrap


@dataclass(frozen=True)
class MetricScores:
    """Scores of n reports.

    Attributes:
        reports: Scores of every report by name, each (n,).
        overall: Scores of all reports together that are not means over reports, such as a micro F1.
    """

    reports: Mapping[str, np.ndarray]
    overall: Mapping[str, float] = field(default_factory=dict)


ReportMetric = Callable[[Sequence[str], Sequence[str]], MetricScores]
"""Function of reports (first) and references (second), both texts, that returns their scores."""


def radgraph_f1(**settings: Any) -> ReportMetric:
    """RadGraph F1 of entities ("simple"), with relations ("partial"), and with equal relations ("complete").

    Args:
        **settings: Arguments of `radgraph.F1RadGraph` except `reward_level`, such as `model_type` or `device`.

    Raises:
        ConfigError: The package is not installed.
    """
    scorer = _package("radgraph").F1RadGraph(reward_level="all", **settings)

    def metric(reports: Sequence[str], references: Sequence[str]) -> MetricScores:
        answer = scorer(hyps=list(reports), refs=list(references))
        names = ("radgraph_simple", "radgraph_partial", "radgraph_complete")
        return _checked(
            MetricScores(dict(zip(names, map(_array, answer[1]), strict=True))), len(reports), "radgraph"
        )

    return metric


def chexbert_f1(**settings: Any) -> ReportMetric:
    """CheXbert: exact agreement of the five main labels per report; micro and macro F1 of 14 and of 5 labels.

    Args:
        **settings: Arguments of `f1chexbert.F1CheXbert`, such as `device`.

    Raises:
        ConfigError: The package is not installed.
    """
    scorer = _package("f1chexbert").F1CheXbert(**settings)

    def metric(reports: Sequence[str], references: Sequence[str]) -> MetricScores:
        _, agreement, all_labels, five_labels = scorer(hyps=list(reports), refs=list(references))
        overall = {
            f"chexbert{count}_{average}_f1": float(table[f"{average} avg"]["f1-score"])
            for count, table in ((14, all_labels), (5, five_labels))
            for average in ("micro", "macro")
        }
        scores = MetricScores({"chexbert5_agreement": _array(agreement)}, overall)
        return _checked(scores, len(reports), "f1chexbert")

    return metric


OUTSIDE: dict[str, Callable[..., ReportMetric]] = {"radgraph": radgraph_f1, "f1chexbert": chexbert_f1}
"""Name of a package -> function that makes its metric."""


def compare_metric(
    metric: ReportMetric,
    before: Sequence[str],
    after: Sequence[str],
    references: Sequence[str],
    seed: int = 0,
    draws: int = 2000,
) -> pd.DataFrame:
    """Compare two sets of reports of the same studies by a metric.

    Args:
        metric: Metric to compute.
        before: Reports to compare with.
        after: Reports of the same studies, in the same order.
        references: Reference report of every study.
        seed: Random seed of the paired bootstrap over studies.
        draws: Number of resamples.

    Returns:
        One row per score: before, after, change, and the 95 % interval of the change (NaN for an overall score).

    Raises:
        StudyError: The numbers of texts differ.
    """
    if not len(before) == len(after) == len(references) or not len(before):
        raise StudyError(
            f"{len(before)} and {len(after)} reports and {len(references)} references were given; expected as many of "
            "each, and at least one."
        )
    first, last = metric(before, references), metric(after, references)
    rows: list[dict[str, Any]] = []
    for name, values in last.reports.items():
        change = np.asarray(values) - first.reports[name]
        samples = bootstrap(lambda w, change=change: w @ change / len(change), len(change), draws, seed)
        means = float(np.mean(first.reports[name])), float(np.mean(values))
        rows.append(_row(name, *means, float(samples.low), float(samples.high)))
    rows += [_row(name, first.overall[name], value) for name, value in last.overall.items()]
    return pd.DataFrame(rows)


def _row(
    name: str, before: float, after: float, low: float = math.nan, high: float = math.nan
) -> dict[str, Any]:
    return {
        "measure": name,
        "before": before,
        "after": after,
        "change": after - before,
        "low": low,
        "high": high,
    }


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"The metric needs the package {name}, which cannot be imported here ({error}). Install it with "
            f"`pip install {name}`, or leave the metric out."
        ) from error


def _array(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _checked(scores: MetricScores, n: int, package: str) -> MetricScores:
    wrong = {name: len(values) for name, values in scores.reports.items() if len(values) != n}
    if wrong:
        raise StudyError(
            f"{package} scored {wrong} reports of {n}; its interface has changed. Use another version."
        )
    return scores


__all__ = ["OUTSIDE", "MetricScores", "ReportMetric", "chexbert_f1", "compare_metric", "radgraph_f1"]

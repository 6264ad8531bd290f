"""Counts of a scorer become a `Score`: balanced accuracy with an interval, recall per activation interval.

    balanced accuracy = (TP / (TP + FN) + TN / (TN + FP)) / 2

Its 95 % interval joins the Wilson intervals of both rates (method of variance estimates recovery). Unusable answers
are counted and left out; nothing is imputed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sae_lens_maira.interp.records import Score
from sae_lens_maira.stats import wilson


@dataclass(frozen=True)
class Verdict:
    """One question: what is true, what was answered (None if unusable), and the interval it came from."""

    truth: bool
    answer: bool | None
    interval: str = ""


def score_of(method: str, judge: str, verdicts: Iterable[Verdict]) -> Score:
    """The score of a list of verdicts."""
    verdicts = list(verdicts)
    usable = [v for v in verdicts if v.answer is not None]
    count = {
        (truth, answer): sum(v.truth == truth and v.answer == answer for v in usable)
        for truth in (True, False)
        for answer in (True, False)
    }
    positive = count[True, True] + count[True, False]
    negative = count[False, True] + count[False, False]
    balanced = low = high = None
    if positive and negative:
        sensitivity, specificity = count[True, True] / positive, count[False, False] / negative
        s_low, s_high = wilson(count[True, True], positive)
        p_low, p_high = wilson(count[False, False], negative)
        balanced = (sensitivity + specificity) / 2
        low = balanced - math.hypot(sensitivity - s_low, specificity - p_low) / 2
        high = balanced + math.hypot(s_high - sensitivity, p_high - specificity) / 2
    return Score(
        method=method,
        judge=judge,
        asked=len(verdicts),
        answered=len(usable),
        unusable=len(verdicts) - len(usable),
        true_positive=count[True, True],
        false_positive=count[False, True],
        true_negative=count[False, False],
        false_negative=count[True, False],
        balanced_accuracy=balanced,
        low=low,
        high=high,
        recall_by_interval=_recalls(usable),
    )


def _recalls(usable: list[Verdict]) -> tuple[tuple[str, float, int], ...]:
    names = list(dict.fromkeys(v.interval for v in usable if v.truth and v.interval))
    rows = []
    for name in names:
        inside = [v for v in usable if v.truth and v.interval == name]
        rows.append((name, sum(bool(v.answer) for v in inside) / len(inside), len(inside)))
    return tuple(rows)

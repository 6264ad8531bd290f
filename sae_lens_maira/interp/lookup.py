"""Judges without a language model: the known findings, or the explanation's own words.

"truth" reads which findings an explanation names and answers "active" where the study has one of them. "words"
answers "active" where the text shown holds at least half of the explanation's quoted words. Both answer every
question, so nothing is ever unusable. They know nothing about servers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from sae_lens_maira.interp.examples import Example, kind_of
from sae_lens_maira.interp.findings import named_findings
from sae_lens_maira.interp.records import Score
from sae_lens_maira.interp.tally import Verdict, score_of
from sae_lens_maira.interp.windows import window, words_of


def by_truth(
    explanation: str, examples: Sequence[Example], keys: Sequence[str], names: Sequence[str]
) -> Score:
    """Detection by the known findings: active where the study has a finding that the explanation names."""
    named = named_findings(explanation, keys)
    return score_of(
        "detection",
        "truth",
        [Verdict(e.active, bool(named & set(e.study.findings)), interval_of(e, names)) for e in examples],
    )


def by_words(explanation: str, examples: Sequence[Example], names: Sequence[str]) -> Score:
    """Detection by the quoted words: active where the text shown holds at least half of them."""
    quoted = set(re.findall(r'"([^"]+)"', explanation))
    kind, rng = kind_of(examples), random.Random(0)
    verdicts = []
    for e in examples:
        held = quoted & set(words_of(window(e, kind, rng)))
        verdicts.append(
            Verdict(e.active, bool(quoted) and 2 * len(held) >= len(quoted), interval_of(e, names))
        )
    return score_of("detection", "words", verdicts)


def interval_names(edges: Sequence[tuple[float, float]]) -> list[str]:
    """Names of activation intervals, such as "4.2 to 8.4"."""
    return [f"{low:.3g} to {high:.3g}" for low, high in edges]


def interval_of(example: Example, names: Sequence[str]) -> str:
    """Name of an example's interval, "" where it is silent."""
    return names[example.interval] if 0 <= example.interval < len(names) else ""

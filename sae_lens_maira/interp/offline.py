"""The explainer without a language model: what sets a latent's active studies apart from its silent ones.

For every finding, Youden's J = share of active studies that have it - share of silent studies that have it; for
every word the same over windows. The sentence names the finding of largest J if it is large enough, else the words.
It is labelled "contrast (no LLM)" wherever it appears, and it reads examples of the train half only.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sae_lens_maira.interp.examples import Example, kind_of
from sae_lens_maira.interp.findings import category_of, key_in_words, name_and_side
from sae_lens_maira.interp.windows import peak_word, place, window, words_of

EXPLAINER = "contrast (no LLM)"
ENOUGH = 0.4  # A finding's J from which it is named: with 20 against 20 studies chance stays below it.
WORDS = 4


@dataclass(frozen=True)
class Explanation:
    """A sentence, its category, and the calls that made it (none offline)."""

    text: str | None
    category: str
    journal_keys: tuple[str, ...] = ()
    status: str = "ok"


def contrast(examples: Sequence[Example], seed: int = 0) -> Explanation:
    """Explain a latent from its train examples; text None where it has no active or no silent ones."""
    active = [e for e in examples if e.active]
    silent = [e for e in examples if not e.active]
    if not active or not silent:
        return Explanation(None, "other", status="too_rare")
    kind = kind_of(examples)
    finding = contrasted_finding(active, silent)
    words = contrasted_words(active, silent, kind, seed)
    peaks = Counter(word for e in active if (word := peak_word(e.context)))
    at = [word for word, _ in peaks.most_common(2)] if kind == "text" else []
    parts = []
    if finding is not None:
        parts.append(
            f"{key_in_words(finding[0])} ({finding[1]:.0%} of active and {finding[2]:.0%} of silent studies)"
        )
    if kind == "image":
        places = Counter(p for e in active if (p := place(e.context)))
        parts.append("patches in the " + " and the ".join(p for p, _ in places.most_common(2)))
    elif at:
        parts.append("at the words " + ", ".join(f'"{word}"' for word in at))
    if words:
        parts.append("words nearby " + ", ".join(f'"{word}"' for word in words))
    if not parts:
        return Explanation(None, "other", status="unusable")
    text = "; ".join(parts)
    return Explanation(text[0].upper() + text[1:] + ".", category_of(finding and finding[0], at or words))


def contrasted_finding(
    active: Sequence[Example], silent: Sequence[Example]
) -> tuple[str, float, float] | None:
    """(key, share of active, share of silent studies) of the finding of largest J, or None if none reaches ENOUGH.

    A sided finding also competes without its side ("nodule on either side"): the side is named where it holds
    apart, since an unsided key has a larger share of silent studies.
    """

    def keys(example: Example) -> set[str]:
        found = set(example.study.findings)
        return found | {name_and_side(key)[0].replace(" ", "_") for key in found}

    here, there = (Counter(key for e in group for key in keys(e)) for group in (active, silent))
    rated = []
    for key, count in here.items():
        share, other = count / len(active), there[key] / len(silent)
        rated.append((share - other, name_and_side(key)[1] is not None, key, share, other))
    if not rated:
        return None
    gain, _, key, share, other = max(rated)
    return (key, share, other) if gain >= ENOUGH else None


def contrasted_words(
    active: Sequence[Example], silent: Sequence[Example], kind: str, seed: int = 0
) -> list[str]:
    """Words of largest J over the windows shown, at most WORDS of them and none below 0.2."""

    def counts(group: Sequence[Example]) -> Counter[str]:
        rng = random.Random(seed)
        return Counter(word for e in group for word in set(words_of(window(e, kind, rng))))

    here, there = counts(active), counts(silent)
    gains = {word: n / len(active) - there[word] / len(silent) for word, n in here.items()}
    best = sorted(gains, key=lambda word: (-gains[word], word))[:WORDS]
    return [word for word in best if gains[word] >= 0.2]

"""Explain and judge without a language model: contrast active studies with silent ones.

For every finding, Youden's J = share of active studies that have it - share of silent studies that have it; for
every word the same over windows. The sentence names the finding of largest J if it is large enough, else the words.
The explainer is called "contrast (no LLM)" in all results, and it reads examples of the train half only.

The finding keys of the record set are the only list of findings. A key such as `pleural_effusion_left` is a name with
an optional side. A clause of a sentence names it if it contains the name with the same side, or the name without a
side.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sae_lens_maira.interp.examples import Example, interval_of, modality_of, peak_word, window, words_of
from sae_lens_maira.interp.records import Score
from sae_lens_maira.interp.score import Verdict, place, score_of

EXPLAINER = "contrast (no LLM)"
ENOUGH = 0.4  # Smallest J of a finding that is named; with 20 against 20 studies, chance stays below it.
WORDS = 4

_SIDES = ("left", "right")
_QUOTED = re.compile(r'"[^"]*"')
_PLACE = re.compile(r"\b(left|right|central) (upper|mid|lower) (zone|part)s?\b")
_CLAUSE = re.compile(r"[.;:\n]+")
_DEVICES = re.compile(r"\b(pacemaker|tube|line|catheter|wires?|clips?|port|drain|device|support)\b")
_CHANGE = re.compile(
    r"\b(new|newly|unchanged|stable|increased?|increasing|decreased?|decreasing|larger|smaller|worsen\w*|"
    r"improv\w*|resol\w+|interval|prior|comparison|previous|since|again|removed|change[ds]?)\b"
)


@dataclass(frozen=True)
class Explanation:
    """A sentence, its category, the journal keys of the calls that made it, and its status."""

    text: str | None
    category: str
    journal_keys: tuple[str, ...] = ()
    status: str = "ok"


def contrast(examples: Sequence[Example], seed: int = 0) -> Explanation:
    """Explain a latent from its train examples; the text is None without active or without silent examples."""
    active = [e for e in examples if e.active]
    silent = [e for e in examples if not e.active]
    if not active or not silent:
        return Explanation(None, "other", status="too_rare")
    modality = modality_of(examples)
    finding = contrasted_finding(active, silent)
    words = contrasted_words(active, silent, modality, seed)
    peaks = Counter(word for e in active if (word := peak_word(e.context)))
    at = [word for word, _ in peaks.most_common(2)] if modality == "text" else []
    parts = []
    if finding is not None:
        parts.append(
            f"{key_in_words(finding[0])} ({finding[1]:.0%} of active and {finding[2]:.0%} of silent studies)"
        )
    if modality == "image":
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
    """Find the finding of largest J: (key, share of active, share of silent studies), or None if none reaches ENOUGH.

    A finding with a side is also tried without it ("nodule on either side"). The side is named if it separates active
    from silent studies better.
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
    active: Sequence[Example], silent: Sequence[Example], modality: str, seed: int = 0
) -> list[str]:
    """Words of largest J over the shown windows, at most WORDS of them, each at least 0.2."""

    def counts(group: Sequence[Example]) -> Counter[str]:
        rng = random.Random(seed)
        return Counter(word for e in group for word in set(words_of(window(e, modality, rng))))

    here, there = counts(active), counts(silent)
    gains = {word: n / len(active) - there[word] / len(silent) for word, n in here.items()}
    best = sorted(gains, key=lambda word: (-gains[word], word))[:WORDS]
    return [word for word in best if gains[word] >= 0.2]


def judge_by_truth(
    explanation: str, examples: Sequence[Example], keys: Sequence[str], names: Sequence[str]
) -> Score:
    """Score detection by the known findings: predict active if the study has a finding that the explanation names."""
    named = named_findings(explanation, keys)
    return score_of(
        "detection",
        "truth",
        [Verdict(e.active, bool(named & set(e.study.findings)), interval_of(e, names)) for e in examples],
    )


def judge_by_words(explanation: str, examples: Sequence[Example], names: Sequence[str]) -> Score:
    """Score detection by the quoted words: predict active if the shown text contains at least half of them."""
    quoted = set(re.findall(r'"([^"]+)"', explanation))
    modality, rng = modality_of(examples), random.Random(0)
    verdicts = []
    for e in examples:
        held = quoted & set(words_of(window(e, modality, rng)))
        answer = bool(quoted) and 2 * len(held) >= len(quoted)
        verdicts.append(Verdict(e.active, answer, interval_of(e, names)))
    return score_of("detection", "words", verdicts)


def name_and_side(key: str) -> tuple[str, str | None]:
    """Split a key: `pleural_effusion_left` -> ("pleural effusion", "left"); without a side -> (name, None)."""
    stem, _, last = key.rpartition("_")
    if stem and last in _SIDES:
        return stem.replace("_", " "), last
    return key.replace("_", " "), None


def key_in_words(key: str) -> str:
    """Convert a key to words: `pleural_effusion_left` -> "left pleural effusion"."""
    name, side = name_and_side(key)
    return f"{side} {name}" if side else name


def named_findings(text: str, keys: Iterable[str]) -> frozenset[str]:
    """Find the keys that a sentence names; a name without a side names both sides.

    Quoted words are evidence and not statements, so they are skipped, as are places ("left lower zone").
    """
    known = [(key, *name_and_side(key)) for key in keys]
    named = set()
    for clause in _CLAUSE.split(_PLACE.sub(" ", _QUOTED.sub(" ", text)).lower()):
        sides = {side for side in _SIDES if re.search(rf"\b{side}\b", clause)}
        for key, name, side in known:
            says = re.search(rf"\b{re.escape(name.lower())}(s|es)?\b", clause)
            if says and (side is None or not sides or side in sides):
                named.add(key)
    return frozenset(named)


def category_of(finding: str | None, words: Iterable[str]) -> str:
    """Category of an explanation, from the finding that it names (or None) and the words of the evidence."""
    if finding is not None:
        return "device" if _DEVICES.search(name_and_side(finding)[0]) else "pathology"
    words = list(words)
    text = " ".join(words)
    if _CHANGE.search(text):
        return "longitudinal change"
    if _DEVICES.search(text):
        return "device"
    return "textual" if words else "other"


def category_of_text(text: str, keys: Iterable[str]) -> str:
    """Category of a free sentence: change words first, then devices, then any known finding."""
    named = sorted(named_findings(text, keys))
    if _CHANGE.search(text.lower()):
        return "longitudinal change"
    if _DEVICES.search(text.lower()):
        return "device"
    return "pathology" if named else "textual"

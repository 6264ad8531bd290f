"""Scorers: questions about test examples whose answers say how well an explanation holds.

    detection   in which texts is the latent active?          (active against silent studies)
    fuzzing     are the marks in the right place?             (active studies, right against wrong marks)
    intruder    which text does not belong?                   (needs no explanation: it scores the latent)

The judge is a language model (`lookup` has those without one). Every question put is counted as answered or
unusable; one that the budget forbids is not put. It knows nothing about how explanations are made.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sae_lens_maira.interp import prompts
from sae_lens_maira.interp.examples import Example, kind_of
from sae_lens_maira.interp.judge import Judge
from sae_lens_maira.interp.lookup import interval_of
from sae_lens_maira.interp.records import Score
from sae_lens_maira.interp.tally import Verdict, score_of
from sae_lens_maira.interp.windows import active_tokens, place, window, wrong_place, wrong_tokens


@dataclass(frozen=True)
class Scored:
    """A score, the calls it took, and whether the budget ended it early."""

    score: Score
    journal_keys: tuple[str, ...] = ()
    over_budget: bool = False


@dataclass(frozen=True)
class Item:
    """One text put to a judge, what is true of it, and the interval it is from."""

    text: str
    truth: bool
    interval: str


def detection_items(examples: Sequence[Example], names: Sequence[str], rng: random.Random) -> list[Item]:
    """Texts without marks, active and silent ones mixed."""
    kind = kind_of(examples)
    items = [Item(window(e, kind, rng), e.active, interval_of(e, names)) for e in examples]
    rng.shuffle(items)
    return items


def fuzzing_items(examples: Sequence[Example], names: Sequence[str], rng: random.Random) -> list[Item]:
    """Active texts only, every second with marks (or a place) where the latent is silent.

    Negatives are active texts too: with silent ones the topic alone would give the answer away.
    """
    kind = kind_of(examples)
    items = []
    for number, e in enumerate(e for e in examples if e.active and e.context.kind == kind):
        right = number % 2 == 0
        if kind == "image":
            where = place(e.context) if right else wrong_place(e.context, rng)
            text = f"{window(e, kind, rng)} (place: {where})" if where else None
        else:
            marks = active_tokens(e) if right else wrong_tokens(e, kind, rng)
            text = window(e, kind, rng, marks) if marks else None
        if text is not None:
            items.append(Item(text, right, interval_of(e, names)))
    rng.shuffle(items)
    return items


def intruder_sets(
    examples: Sequence[Example], names: Sequence[str], rng: random.Random, size: int = 5, null: bool = False
) -> list[list[Item]]:
    """Sets of `size` texts, one of them (truth True) silent; `null` makes all silent, the control of this scorer."""
    kind = kind_of(examples)
    active = [e for e in examples if e.active]
    silent = [e for e in examples if not e.active]
    rng.shuffle(active)
    rng.shuffle(silent)
    sets = []
    while silent and len(silent if null else active) >= size - 1 + null:
        odd = silent.pop()
        rest = [(silent if null else active).pop() for _ in range(size - 1)]
        items = [
            Item(window(odd, kind, rng), True, ""),
            *(Item(window(e, kind, rng), False, "") for e in rest),
        ]
        rng.shuffle(items)
        sets.append(items)
    return sets


async def ask_verdicts(
    judge: Judge, method: str, explanation: str, items: Sequence[Item], batch: int, licences: Sequence[str]
) -> Scored:
    """Detection or fuzzing by a language model, `batch` texts a question; a lost answer loses its whole batch."""
    verdicts: list[Verdict] = []
    keys: list[str] = []
    make = prompts.detect if method == "detection" else prompts.fuzz
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        form = prompts.verdicts_form(len(part))
        reply = await judge.ask(make(explanation, [item.text for item in part]), form, licences)
        if reply.problem == "over budget":
            return Scored(score_of(method, judge.server.model, verdicts), tuple(keys), True)
        answers = [None] * len(part) if reply.answer is None else reply.answer.model_dump()["verdicts"]
        verdicts += [Verdict(i.truth, a, i.interval) for i, a in zip(part, answers, strict=True)]
        keys.append(reply.key)
    return Scored(score_of(method, judge.server.model, verdicts), tuple(keys))


async def ask_intruder(judge: Judge, sets: Sequence[Sequence[Item]], licences: Sequence[str]) -> Scored:
    """Intruder by a language model; every text of a set counts as one question, so chance is 0.5 here too."""
    verdicts: list[Verdict] = []
    keys: list[str] = []
    stopped = False
    for items in sets:
        reply = await judge.ask(prompts.intrude([item.text for item in items]), prompts.Intruder, licences)
        if reply.problem == "over budget":
            stopped = True
            break
        number = reply.answer.number if reply.answer else 0
        if 1 <= number <= len(items):
            verdicts += [Verdict(item.truth, i == number) for i, item in enumerate(items, 1)]
        else:
            verdicts += [Verdict(item.truth, None) for item in items]
        keys.append(reply.key)
    # No interval of activation belongs to a silent text.
    score = replace(score_of("intruder", judge.server.model, verdicts), recall_by_interval=())
    return Scored(score, tuple(keys), stopped)

"""Which contexts explain a latent and which test the explanation: split by patient first, sampled afterwards.

Patients of the whole record set are dealt to a train and a test half by a hash of (seed, patient), the same for
every latent, so that neither a latent's own explanation nor the control borrowed from another latent ever saw a
test patient. Sampling takes equal numbers from every activation interval. It knows nothing about words or servers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.records import Context, LatentRecord, StudyInfo


@dataclass(frozen=True)
class Example:
    """One study as a latent sees it, and whether it fires there.

    Attributes:
        context: the context.
        study: its study.
        active: whether the latent fires in it.
        interval: number of the record's activation interval that holds it, 0 the highest; -1 where it is silent.
        max: the latent's largest activation anywhere, the unit of the 0-10 scale.
    """

    context: Context
    study: StudyInfo
    active: bool
    interval: int
    max: float


@dataclass(frozen=True)
class Halves:
    """Examples to explain from and examples to test with; no patient is in both."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]


def train_patients(studies: Iterable[StudyInfo], seed: int = 0, share: float = 0.5) -> frozenset[str]:
    """Patients whose studies may be shown to an explainer; all others are for testing.

    Raises:
        RecordError: fewer than two patients.
    """
    patients = sorted({study.patient for study in studies}, key=lambda patient: _hash(seed, patient))
    if len(patients) < 2:
        raise RecordError(
            f"The record set has {len(patients)} patient(s); explaining and testing on different patients needs "
            "two or more. Write records of more studies."
        )
    return frozenset(patients[: min(max(1, round(len(patients) * share)), len(patients) - 1)])


def split_examples(record: LatentRecord, studies: Mapping[str, StudyInfo], train: frozenset[str]) -> Halves:
    """All contexts of a record, each study once, in two halves by patient.

    A study that occurs several times (as a top context and in an interval) is kept where its value is largest.

    Raises:
        RecordError: a context names a study that the record set does not have, or fires in a zero context.
    """
    best: dict[str, Example] = {}
    highs = [interval.low for interval in record.intervals]
    offered = [*record.top, *(c for interval in record.intervals for c in interval.contexts)]
    for context in offered:
        number = next((i for i, low in enumerate(highs) if context.value >= low), max(len(highs) - 1, 0))
        example = Example(context, _study(context, studies), True, number, record.max)
        known = best.get(context.study)
        if known is None or known.context.value < context.value:
            best[context.study] = example
    for context in record.zero:
        if context.study in best:
            raise RecordError(
                f"Latent {record.latent} fires in study {context.study}, which is also among its zero contexts; "
                "the record contradicts itself. Write the records again."
            )
        best[context.study] = Example(context, _study(context, studies), False, -1, record.max)
    examples = sorted(best.values(), key=lambda e: (-e.context.value, e.context.study))
    return Halves(
        tuple(e for e in examples if e.study.patient in train),
        tuple(e for e in examples if e.study.patient not in train),
    )


def sample(examples: Iterable[Example], active: int, silent: int, rng: random.Random) -> list[Example]:
    """At most `active` firing examples, dealt evenly over the intervals, and at most `silent` silent ones."""
    piles: dict[int, list[Example]] = {}
    for example in examples:
        piles.setdefault(example.interval, []).append(example)
    for number in sorted(piles):
        rng.shuffle(piles[number])
    quiet = piles.pop(-1, [])[:silent]
    chosen: list[Example] = []
    while len(chosen) < active and any(piles.values()):
        for number in sorted(piles):
            if piles[number] and len(chosen) < active:
                chosen.append(piles[number].pop())
    return chosen + quiet


def scaled(value: float | None, largest: float) -> int:
    """An activation as a whole number from 0 to 10, in tenths of the latent's largest; never 0 where it fires."""
    if not value or value <= 0 or largest <= 0:
        return 0
    return min(10, max(1, round(10 * value / largest)))


def kind_of(examples: Iterable[Example]) -> str:
    """Whether most firing examples were chosen for a patch ("image") or for a token ("text")."""
    kinds = [e.context.kind for e in examples if e.active]
    return "image" if 2 * kinds.count("image") > len(kinds) else "text"


def _study(context: Context, studies: Mapping[str, StudyInfo]) -> StudyInfo:
    if context.study not in studies:
        raise RecordError(
            f"A context points to study {context.study}, which the record set's table of studies lacks; the files "
            "belong to different record sets. Write the records again."
        )
    return studies[context.study]


def _hash(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed}|{patient}".encode()).digest()

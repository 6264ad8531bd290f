"""What a run is about: the plan, and every latent of it with sampled examples of both halves.

Examples are split by patient before anything is sampled, and sampled per latent from a seed of its own, so that a
latent's questions do not depend on which others are asked about. It knows nothing about who answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.interp.examples import Example, sample, split_examples, train_patients
from sae_lens_maira.latents.records import LatentRecord
from sae_lens_maira.latents.recordset import RecordSet

METHODS = ("detection", "fuzzing", "intruder")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to explain and how to test it.

    Attributes:
        latents: numbers; None for every latent that is not dead.
        methods: scorers put to a language model.
        n_train: active examples shown to the explainer, and a quarter as many silent ones (offline: all of them).
        n_test: active and as many silent examples asked about.
        batch: texts a question.
        least: active studies needed on each half; fewer is "too_rare".
        pictures: of an image latent's active examples, shown to a vision model as films with outlined patches.
        seed: of the split and every draw.
    """

    latents: Sequence[int] | None = None
    methods: Sequence[str] = ("detection", "fuzzing")
    n_train: int = 40
    n_test: int = 50
    batch: int = 10
    least: int = 5
    pictures: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse scorers that do not exist."""
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            raise ConfigError(f"Unknown scorer {unknown}; choose from {', '.join(METHODS)}.")


@dataclass(frozen=True)
class Subject:
    """One latent ready to be explained: its numbers, and sampled examples of both halves."""

    latent: int
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    tokens: tuple[str, ...]
    edges: tuple[tuple[float, float], ...]
    enough: bool

    @property
    def licences(self) -> list[str]:
        """Licence classes of its studies."""
        return sorted({e.study.licence for e in (*self.train, *self.test)})


def subjects(records: RecordSet, plan: Plan, offline: bool) -> list[Subject]:
    """Sampled examples of every latent of the plan, one record in memory at a time."""
    train = train_patients(records.studies.values(), plan.seed)
    chosen: Sequence[int] = (
        plan.latents
        if plan.latents is not None
        else [int(n) for n in records.table.loc[records.table["status"] != "dead", "latent"]]
    )
    return [_subject(records[latent], records, train, plan, offline) for latent in chosen]


def _subject(
    record: LatentRecord, records: RecordSet, train: frozenset[str], plan: Plan, offline: bool
) -> Subject:
    halves = split_examples(record, records.studies, train)
    rng = random.Random(f"{plan.seed}|{record.latent}")
    shown = halves.train if offline else sample(halves.train, plan.n_train, max(1, plan.n_train // 4), rng)
    asked = sample(halves.test, plan.n_test, plan.n_test, rng)
    enough = all(
        sum(e.active for e in half) >= plan.least and any(not e.active for e in half)
        for half in (shown, asked)
    )
    tokens = tuple(t.token for t in record.top_tokens[:10])
    edges = tuple((i.low, i.high) for i in record.intervals)
    return Subject(record.latent, tuple(shown), tuple(asked), tokens, edges, enough)

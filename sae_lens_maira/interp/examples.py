"""Select the contexts that explain a latent and those that test the explanation.

The patients of the record set are divided into a train and a test half by a hash of (seed, patient), the same for every
latent. So neither a latent's explanation nor the control from another latent is based on a test patient. Contexts are
sampled after the split, in equal numbers from every activation interval. The seed depends on the latent, so that its
questions do not change with the set of latents.

A text is shown as the words around the token of largest activation. Tokens above 0.3 of the latent's largest activation
are marked `<<like this>>`; adjacent ones share one mark.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sae_lens_maira.errors import ConfigError, RecordError
from sae_lens_maira.latents.records import Context, LatentRecord, StudyInfo
from sae_lens_maira.latents.recordset import RecordSet

SPAN = 24  # Number of tokens on each side of the peak, as in Neuronpedia.
REPORT_TOKENS = 120
MARKED_FROM = 0.3
_SPACES = ("▁", "Ġ", " ")
_TIGHT = re.compile(r"\s+([.,;:?!)\]])")
METHODS = ("detection", "fuzzing", "intruder", "image_detection", "image_fuzzing")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings: which latents to explain and how to test the explanations.

    Attributes:
        latents: Latent numbers; None for every latent that is not dead.
        methods: Scorers that ask a language model.
        n_train: Number of active examples shown to the explainer, with a quarter as many silent ones (offline: all
            examples).
        n_test: Number of active examples in the test questions, with as many silent ones.
        batch: Number of texts per question.
        least: Smallest number of active studies in each half; a latent with fewer has the status "too_rare".
        pictures: Number of images with outlined patches shown to the explainer per image latent, for a model with image
            input.
        seed: Random seed of the split by patient and of all sampling.
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
        """Refuse unknown scorers, and sizes for which no latent can be scored."""
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            raise ConfigError(f"Unknown scorer {unknown}; choose from {', '.join(METHODS)}.")
        for name, value, smallest in (("least", self.least, 1), ("batch", self.batch, 1)):
            if value < smallest:
                raise ConfigError(f"{name} is {value}; expected at least {smallest}.")
        for name, value in (("n_train", self.n_train), ("n_test", self.n_test)):
            if value < self.least:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value} is below the {self.least} active studies per half that a "
                    f"score needs, so every latent would be too rare. Pass {self.least} or more."
                )


@dataclass(frozen=True)
class Example:
    """One study as an example for a latent.

    Attributes:
        context: Context of the latent in the study.
        study: Study of the context.
        active: Whether the latent is active in the study.
        interval: Index of the context's activation interval in the record, 0 for the highest; -1 if the latent is
            silent.
        max: Largest activation of the latent in the record set, which is 10 on the scale from 0 to 10.
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


@dataclass(frozen=True)
class LatentTask:
    """One latent with its sampled examples.

    Attributes:
        latent: Latent number.
        train, test: Sampled examples of the two halves.
        tokens: Output tokens that the latent raises most.
        edges: (low, high) of every activation interval, highest first.
        enough: Whether both halves have the active and silent examples that the plan needs.
    """

    latent: int
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    tokens: tuple[str, ...]
    edges: tuple[tuple[float, float], ...]
    enough: bool


class Tasks:
    """Latent tasks of a plan, built one at a time: `tasks[latent]` reads one record and samples its examples.

    Attributes:
        latents: Latent numbers of the plan, in order.
    """

    def __init__(self, records: RecordSet, plan: Plan, offline: bool) -> None:
        """Split the patients.

        Args:
            records: Record set to read.
            plan: What to explain.
            offline: Use all train examples instead of a sample.

        Raises:
            RecordError: The record set has fewer than two patients, or no record of a latent of the plan.
        """
        absent = next((n for n in plan.latents or () if n not in records), None)
        if absent is not None:
            raise RecordError(
                f"{records.folder} has no record of latent {absent}. It contains {len(records)} latents, "
                f"{records.table['latent'].min()} to {records.table['latent'].max()}; choose from these."
            )
        self._records, self._plan, self._offline = records, plan, offline
        self._train = train_patients(records.studies.values(), plan.seed)
        alive = records.table.loc[records.table["status"] != "dead", "latent"]
        self.latents: list[int] = list(plan.latents) if plan.latents is not None else [int(n) for n in alive]

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, latent: int) -> LatentTask:
        """Read one record and sample its examples. Raises RecordError if it is missing, damaged or inconsistent."""
        plan, record = self._plan, self._records[latent]
        halves = split_examples(record, self._records.studies, self._train)
        rng = random.Random(f"{plan.seed}|{latent}")
        silent = max(1, plan.n_train // 4)
        shown = halves.train if self._offline else sample(halves.train, plan.n_train, silent, rng)
        asked = sample(halves.test, plan.n_test, plan.n_test, rng)
        enough = all(
            sum(e.active for e in half) >= plan.least and any(not e.active for e in half)
            for half in (shown, asked)
        )
        tokens = tuple(t.token for t in record.top_tokens[:10])
        edges = tuple((i.low, i.high) for i in record.intervals)
        return LatentTask(latent, tuple(shown), tuple(asked), tokens, edges, enough)


def train_patients(studies: Iterable[StudyInfo], seed: int = 0, share: float = 0.5) -> frozenset[str]:
    """Select the patients whose studies may be shown to an explainer; all others are for testing.

    Raises:
        RecordError: Fewer than two patients.
    """
    patients = sorted({study.patient for study in studies}, key=lambda patient: _hash(seed, patient))
    if len(patients) < 2:
        count = "1 patient" if patients else "no patients"
        raise RecordError(
            f"The record set has {count}. Explaining and testing on different patients needs two or more; write "
            "records of more studies."
        )
    return frozenset(patients[: min(max(1, round(len(patients) * share)), len(patients) - 1)])


def split_examples(record: LatentRecord, studies: Mapping[str, StudyInfo], train: frozenset[str]) -> Halves:
    """Split all contexts of a record, each study once, into two halves by patient.

    If a study occurs several times (as a top context and in an interval), the context of largest value is kept.

    Raises:
        RecordError: A context refers to a study that is not in the record set, or a study with activations is among the
            zero contexts.
    """
    best: dict[str, Example] = {}
    lows = [interval.low for interval in record.intervals]
    for context in (*record.top, *(c for interval in record.intervals for c in interval.contexts)):
        number = next((i for i, low in enumerate(lows) if context.value >= low), max(len(lows) - 1, 0))
        example = Example(context, _study(context, studies), True, number, record.max)
        known = best.get(context.study)
        if known is None or known.context.value < context.value:
            best[context.study] = example
    for context in record.zero:
        if context.study in best:
            raise RecordError(
                f"Latent {record.latent} is active in study {context.study}, which is also among its zero contexts; "
                "the record contradicts itself. Write the records again."
            )
        best[context.study] = Example(context, _study(context, studies), False, -1, record.max)
    examples = sorted(best.values(), key=lambda e: (-e.context.value, e.context.study))
    return Halves(
        tuple(e for e in examples if e.study.patient in train),
        tuple(e for e in examples if e.study.patient not in train),
    )


def sample(examples: Iterable[Example], active: int, silent: int, rng: random.Random) -> list[Example]:
    """Sample at most `active` active examples, evenly from the intervals, and at most `silent` silent ones."""
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
    """Convert an activation to a whole number from 0 to 10, in tenths of the latent's largest; at least 1 if active."""
    if not value or value <= 0 or largest <= 0:
        return 0
    return min(10, max(1, round(10 * value / largest)))


def modality_of(examples: Iterable[Example]) -> str:
    """Modality of most active examples: "image" (the peak is a patch) or "text" (the peak is a token)."""
    found = [e.context.modality for e in examples if e.active]
    return "image" if 2 * found.count("image") > len(found) else "text"


def interval_names(edges: Sequence[tuple[float, float]]) -> list[str]:
    """Names of activation intervals, such as "4.2 to 8.4"."""
    return [f"{low:.3g} to {high:.3g}" for low, high in edges]


def interval_of(example: Example, names: Sequence[str]) -> str:
    """Name of an example's interval; "" if the latent is silent."""
    return names[example.interval] if 0 <= example.interval < len(names) else ""


def _study(context: Context, studies: Mapping[str, StudyInfo]) -> StudyInfo:
    if context.study not in studies:
        raise RecordError(
            f"A context refers to study {context.study}, which is not in the record set's table of studies; the files "
            "belong to different record sets. Write the records again."
        )
    return studies[context.study]


def _hash(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed}|{patient}".encode()).digest()


def text_of(tokens: Collection[str], marked: Collection[int] = ()) -> str:
    """Tokens as text, with << >> around those whose index is in `marked`."""
    spaced = any(token.startswith(_SPACES) for token in tokens)
    parts: list[str] = []
    for i, token in enumerate(tokens):
        plain = token.replace("▁", " ").replace("Ġ", " ")
        if not spaced:
            plain = " " + plain
        if i in marked:
            lead = plain[: len(plain) - len(plain.lstrip())]
            opening = "" if i - 1 in marked else "<<"
            closing = "" if i + 1 in marked else ">>"
            plain = f"{lead}{opening}{plain.lstrip()}{closing}"
        parts.append(plain)
    return _TIGHT.sub(r"\1", " ".join("".join(parts).split()))


def active_tokens(example: Example) -> frozenset[int]:
    """Indices of tokens above the marking threshold; the peak is always included."""
    floor = MARKED_FROM * example.max
    found = {i for i, v in enumerate(example.context.activations) if v is not None and v > max(floor, 0.0)}
    return frozenset(found | {example.context.peak} if example.context.peak >= 0 else found)


def bounds(example: Example, modality: str, rng: random.Random) -> tuple[int, int]:
    """Range of tokens to show: around the peak, around a random token if silent, the whole report for patches."""
    context, count = example.context, len(example.context.tokens)
    if modality == "image":
        report = [i for i, role in enumerate(context.roles) if role == "report"]
        return (report[0], min(report[-1] + 1, report[0] + REPORT_TOKENS)) if report else (0, count)
    middle = context.peak if context.peak >= 0 else rng.randrange(count) if count else 0
    return max(0, middle - SPAN), min(count, middle + SPAN + 1)


def window(example: Example, modality: str, rng: random.Random, marked: Collection[int] = ()) -> str:
    """Text to show for an example, with marks at the token indices `marked`."""
    start, stop = bounds(example, modality, rng)
    tokens = example.context.tokens[start:stop]
    text = text_of(tokens, {i - start for i in marked if start <= i < stop})
    return text or "(no text)"


def wrong_tokens(example: Example, modality: str, rng: random.Random) -> frozenset[int]:
    """Choose as many silent tokens of the window as it has active ones, for the marks of a fuzzed example."""
    start, stop = bounds(example, modality, rng)
    right = active_tokens(example)
    silent = [i for i in range(start, stop) if not example.context.activations[i] and i not in right]
    number = min(len(silent), max(1, sum(start <= i < stop for i in right)))
    return frozenset(rng.sample(silent, number))


def words_of(text: str) -> list[str]:
    """Lower-case words of three letters or more."""
    return re.findall(r"[a-zà-öø-ÿ]{3,}", text.lower())


def peak_word(context: Context) -> str | None:
    """Whole word that contains the token of largest activation; None for a patch or a punctuation mark."""
    if not 0 <= context.peak < len(context.tokens):
        return None
    spaced = any(token.startswith(_SPACES) for token in context.tokens)
    first = last = context.peak
    if spaced:
        while first > 0 and not context.tokens[first].startswith(_SPACES):
            first -= 1
        while last + 1 < len(context.tokens) and not context.tokens[last + 1].startswith(_SPACES):
            last += 1
    found = words_of(text_of(context.tokens[first : last + 1]))
    return found[0] if found else None

"""What can be wrong with a dashboard file, and where: checks that all three formats share.

    error    an import breaks, or loses rows in silence
    advice   it is imported, and shows or scores less than it could

It reads a line at a time and knows nothing about the formats.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.sequences import MAX_TOKENS
from sae_lens_maira.dashboards.target import PUBLIC_CREATOR

ZERO_CONTEXTS = 5
"""Sequences without activation that Neuronpedia's scorers need per latent."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, where it is, and whether it breaks an import ("error") or only a use ("advice")."""

    file: str
    line: int
    message: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.severity}: {self.message}"


@dataclass(frozen=True)
class Line:
    """One parsed object with its place."""

    file: str
    number: int
    row: Any


def sequence_faults(
    place: Line, what: str, activations: list[dict[str, Any]], bags: set[int] | None = None
) -> Iterator[Fault]:
    """Lengths, limits and repeated token multisets of one feature's sequences."""
    bags = set() if bags is None else bags
    for activation in activations:
        tokens, values = activation.get("tokens"), activation.get("values")
        if not isinstance(tokens, list) or not isinstance(values, list):
            continue
        if not 1 <= len(tokens) <= MAX_TOKENS:
            yield fault(place, f"{what} has a sequence of {len(tokens)} tokens, expected 1 to {MAX_TOKENS}")
        if len(tokens) != len(values):
            yield fault(place, f"{what} has {len(tokens)} tokens with {len(values)} values")
        bag = hash((activation.get("index"), tuple(sorted(map(str, tokens)))))
        if bag in bags:
            message = f"{what} has two sequences of the same tokens; the page shows one of them"
            yield fault(place, message, "advice")
        bags.add(bag)


def lines_of(path: Path, folder: Path) -> Iterator[Line | Fault]:
    """Objects of a JSON lines file, gzipped or not; a Fault in place of a line that is none."""
    name = str(path.relative_to(folder))
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, text in enumerate(file, 1):
                try:
                    yield Line(name, number, json.loads(text, parse_constant=refuse_constant))
                except (ValueError, UnicodeDecodeError) as error:
                    yield Fault(name, number, f"no JSON: {error}")
    except FileNotFoundError:
        yield Fault(name, 1, "the file is missing")
    except (OSError, EOFError, zlib.error) as error:
        yield Fault(name, number + 1, f"the file is damaged or cut off: {error}")


def repeated(place: Line, what: str, key: Any, seen: Any) -> Iterator[Fault]:
    """A key that was seen before; a set of those seen takes it in."""
    if key in seen:
        yield fault(place, f"{what} comes twice; the importer drops one of them in silence")
    if isinstance(seen, set):
        seen.add(key)


def hidden(place: Line, field: str) -> Iterator[Fault]:
    """A creator whose rows the site does not show."""
    if place.row.get(field) != PUBLIC_CREATOR:
        yield fault(place, f"{field} is {place.row.get(field)!r}; only rows of {PUBLIC_CREATOR} are shown")


def few_zeros(place: Line, what: str, zeros: int) -> Iterator[Fault]:
    """Fewer sequences without activation than scorers need."""
    if zeros < ZERO_CONTEXTS:
        message = f"{what} has {zeros} sequences without activation; scorers on the site need {ZERO_CONTEXTS}"
        yield Fault(place.file, place.number, message, "advice")


def fault(place: Line, message: str, severity: str = "error") -> Fault:
    """A fault at a place."""
    return Fault(place.file, place.number, message, severity)


def hit_faults(place: Line, what: str, name: str, hit: Any, tokens: Any) -> Iterator[Fault]:
    """A hit that is no token of its sequence: -1 is sae-dashboard's for a first token, which it leaves out."""
    if isinstance(hit, int) and not 0 <= hit < len(tokens or ()):
        message = f"{what} has a {name} of {hit}, which is no token of its sequence"
        yield fault(place, message, "advice" if hit == -1 else "error")


def faults_of(place: Line, messages: Iterable[str]) -> Iterator[Fault]:
    """Sentences as errors at a place."""
    for message in messages:
        yield fault(place, message)


def refuse_constant(name: str) -> None:
    """For `json.loads`: NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is no JSON number")

"""Schemas of the three dashboard formats as tables of field and type, and the issues that validation reports.

    "int" "number" "text" "bool" "name" "index"      a trailing "?" also allows null, "[]" is a list
    error      an import fails, or loses rows without a message
    warning    the import succeeds, and the site shows or scores less than it could

"name" is text with at least one character, "index" a latent number as an integer or as digits. Files are read one line
at a time.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.sequences import MAX_TOKENS
from sae_lens_maira.dashboards.target import PUBLIC_CREATOR
from sae_lens_maira.interp.records import EXPLANATION_TYPES

ZERO_CONTEXTS = 5
"""Sequences without activation that Neuronpedia's scorers need per latent."""
MAX_FEATURES, MAX_LOGITS, MAX_EXPLANATION = 128, 20, 512
"""Limits of the upload API: features per request, tokens per logit list, characters per explanation."""

_TABLES = dict.fromkeys(
    ("neuron_alignment_indices", "correlated_neurons_indices", "correlated_features_indices"), "int[]"
) | dict.fromkeys(
    (
        "neuron_alignment_values",
        "neuron_alignment_l1",
        "correlated_neurons_l1",
        "correlated_neurons_pearson",
        "correlated_features_l1",
        "correlated_features_pearson",
        "neg_values",
        "pos_values",
        "freq_hist_data_bar_values",
        "freq_hist_data_bar_heights",
        "logits_hist_data_bar_heights",
        "logits_hist_data_bar_values",
        "decoder_weights_dist",
        "vector",
    ),
    "number[]",
)
_STATISTICS = _TABLES | {"neg_str": "name[]", "pos_str": "name[]", "frac_nonzero": "number"}

BATCH = {"model_id": "text", "layer": "int", "sae_set": "name", "sae_id_suffix": "text?", "features": "any"}
BATCH_FEATURE = _STATISTICS | {
    "feature_index": "int",
    "n_prompts_total": "int",
    "n_tokens_in_prompt": "int",
    "dataset": "text",
    "activations": "any",
}
BATCH_ACTIVATION = {
    "bin_min": "number",
    "bin_max": "number",
    "bin_contains": "number",
    "tokens": "name[]",
    "values": "number[]",
    "qualifying_token_index": "int",
    "dfa_values": "number[]",
    "dfa_maxValue": "number",
    "dfa_targetIndex": "int",
}

HEADS = {
    "release": {"name": "name", "description": "text", "creatorId": "name", "urls": "text[]"},
    "model": {"id": "name", "layers": "int", "creatorId": "name", "inferenceEnabled": "bool"},
    "sourceset": {"modelId": "name", "name": "name", "creatorId": "name", "releaseName": "name"},
    "source": {"id": "name", "modelId": "name", "setName": "name", "creatorId": "name"},
}
EXPORT_ROWS = {
    "features": _STATISTICS
    | {
        "modelId": "name",
        "layer": "name",
        "index": "index",
        "creatorId": "name",
        "createdAt": "name",
        "maxActApprox": "number",
        "hasVector": "bool",
    },
    "activations": {
        "id": "name",
        "modelId": "name",
        "layer": "name",
        "index": "index",
        "creatorId": "name",
        "createdAt": "name",
        "tokens": "name[]",
        "values": "number[]",
        "maxValue": "number",
        "maxValueTokenIndex": "int",
        "minValue": "number",
        "binMin": "number",
        "binMax": "number",
        "binContains": "number",
        "qualifyingTokenIndex": "int",
    },
    "explanations": {
        "id": "name",
        "modelId": "name",
        "layer": "name",
        "index": "index",
        "description": "name",
        "authorId": "name",
        "typeName": "name?",
        "explanationModelName": "name?",
        "notes": "text?",
        "createdAt": "name",
    },
}

PAYLOAD = {"modelId": "name", "source": "name", "features": "any"}
PAYLOAD_FEATURE = {
    "index": "int",
    "density": "number",
    "activations": "any",
    "explanations": "any",
    "topLogits": "any",
    "bottomLogits": "any",
}
PAYLOAD_ACTIVATION = {
    "tokens": "name[]",
    "values": "number[]",
    "quantileMin": "number?",
    "quantileMax": "number?",
    "quantileFraction": "number?",
}
PAYLOAD_LOGIT = {"token": "name", "value": "number"}
PAYLOAD_EXPLANATION = {"text": "name"}


@dataclass(frozen=True)
class Issue:
    """One problem of a file: its place, and whether an import fails ("error") or only shows less ("warning")."""

    file: str
    line: int
    message: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.severity}: {self.message}"


@dataclass(frozen=True)
class Line:
    """One parsed object and its place.

    Attributes:
        file: Path relative to the folder.
        number: Line number, from 1.
        row: Parsed JSON.
    """

    file: str
    number: int
    row: Any

    def issue(self, message: str, severity: str = "error") -> Issue:
        """An issue at this place."""
        return Issue(self.file, self.number, message, severity)


def read_lines(path: Path, folder: Path) -> Iterator[Line | Issue]:
    """Read a JSON lines file, gzipped or not; yield an Issue in place of a line that cannot be read."""
    name = str(path.relative_to(folder))
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, text in enumerate(file, 1):
                try:
                    yield Line(name, number, json.loads(text, parse_constant=refuse_constant))
                except (ValueError, UnicodeDecodeError, RecursionError) as error:
                    yield Issue(name, number, f"not valid JSON: {error}")
    except FileNotFoundError:
        yield Issue(name, 1, "the file is missing")
    except (OSError, EOFError, zlib.error) as error:
        yield Issue(name, number + 1, f"the file is damaged or cut off: {error}")


def refuse_constant(name: str) -> None:
    """For `json.loads`: refuse NaN and Infinity, which are not JSON."""
    raise ValueError(f"{name} is not a JSON number")


def object_issues(
    place: Line, row: Any, schema: dict[str, str], what: str, exact: bool = False
) -> Iterator[Issue]:
    """Check one object against a schema.

    Args:
        place: Position of the object.
        row: Parsed JSON.
        schema: Type per field.
        what: Name of the object in messages.
        exact: Report fields that the schema does not list.
    """
    if not isinstance(row, dict):
        yield place.issue(f"{what} is not an object")
        return
    for name, kind in schema.items():
        if name not in row:
            yield place.issue(f"{what} has no {name}")
        elif kind != "any" and not _fits(row[name], kind):
            yield place.issue(f"{what} has {name} = {_short(row[name])}, expected {kind}")
    if exact and set(row) - set(schema):
        yield place.issue(f"{what} has unknown fields {sorted(set(row) - set(schema))}")


def objects(
    place: Line, row: dict[str, Any], name: str, what: str
) -> tuple[list[dict[str, Any]], list[Issue]]:
    """The objects of a list field, and an issue if the field is not a list of objects."""
    found = row.get(name)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return [], [place.issue(f"{what} has no list of objects {name}")]
    return found, []


def sequence_issues(
    place: Line, what: str, activations: list[dict[str, Any]], bags: set[int] | None = None
) -> Iterator[Issue]:
    """Check lengths, limits and repeated token multisets of one feature's sequences."""
    bags = set() if bags is None else bags
    for activation in activations:
        tokens, values = activation.get("tokens"), activation.get("values")
        if not isinstance(tokens, list) or not isinstance(values, list):
            continue
        if not 1 <= len(tokens) <= MAX_TOKENS:
            yield place.issue(f"{what} has a sequence of {len(tokens)} tokens, expected 1 to {MAX_TOKENS}")
        if len(tokens) != len(values):
            yield place.issue(f"{what} has {len(tokens)} tokens but {len(values)} values")
        bag = hash((activation.get("index"), tuple(sorted(map(str, tokens)))))
        if bag in bags:
            message = f"{what} has two sequences with the same tokens; the page shows only one of them"
            yield place.issue(message, "warning")
        bags.add(bag)


def order_issues(place: Line, what: str, high: Any, largest: Any) -> Iterator[Issue]:
    """Report an interval whose bound exceeds the latent's maximum: the site sorts groups by that bound.

    The tolerance of 0.2 % is the rounding of sae-dashboard's titles.
    """
    if (
        isinstance(high, (int, float))
        and isinstance(largest, (int, float))
        and high > largest * 1.002 + 0.001
    ):
        message = f"{what} has an interval that ends at {high}, above the maximum {largest}, so it is shown before TOP"
        yield place.issue(message, "warning")


def repeated_issues(place: Line, what: str, key: Any, seen: Any) -> Iterator[Issue]:
    """Report a key that was seen before; add it if `seen` is a set."""
    if key in seen:
        yield place.issue(f"{what} appears twice; the importer drops one of them without a message")
    if isinstance(seen, set):
        seen.add(key)


def type_issues(place: Line, what: str, name: Any) -> Iterator[Issue]:
    """Report an explanation type that is not in Neuronpedia's database, which then rejects all explanations."""
    if name is not None and name not in EXPLANATION_TYPES:
        yield place.issue(
            f"{what} has the explanation type {name!r}; expected one of {', '.join(EXPLANATION_TYPES)}"
        )


def creator_issues(place: Line, field: str) -> Iterator[Issue]:
    """Report a creator whose rows the site hides."""
    if place.row.get(field) != PUBLIC_CREATOR:
        yield place.issue(f"{field} is {place.row.get(field)!r}; only rows of {PUBLIC_CREATOR} are shown")


def zero_issues(place: Line, what: str, zeros: int) -> Iterator[Issue]:
    """Report fewer sequences without activation than the site's scorers need."""
    if zeros < ZERO_CONTEXTS:
        message = f"{what} has {zeros} sequences without activation; scorers on the site need {ZERO_CONTEXTS}"
        yield place.issue(message, "warning")


def hit_issues(place: Line, what: str, name: str, hit: Any, tokens: Any) -> Iterator[Issue]:
    """Report a hit outside its sequence; -1 is sae-dashboard's value for a first token, which it leaves out."""
    if isinstance(hit, int) and not 0 <= hit < len(tokens or ()):
        message = f"{what} has {name} = {hit}, which is not a token of its sequence"
        yield place.issue(message, "warning" if hit == -1 else "error")


def _fits(value: Any, kind: str) -> bool:
    if kind.endswith("?"):
        return value is None or _fits(value, kind[:-1])
    if kind.endswith("[]"):
        return isinstance(value, list) and all(_fits(one, kind[:-2]) for one in value)
    if kind == "index":
        return (isinstance(value, str) and value.isdecimal()) or _fits(value, "int")
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("text", "name"):
        return isinstance(value, str) and (kind == "text" or bool(value)) and "\0" not in value
    if isinstance(value, bool):
        return False
    return (
        isinstance(value, int) if kind == "int" else isinstance(value, (int, float)) and math.isfinite(value)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

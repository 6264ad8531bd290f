"""Validation of a dashboard folder of any of the three formats: every fault with its file and line.

It checks what importers accept in silence and then lose: types and finite numbers, limits, ids that are not unique,
sequences that hold the same tokens, rows that refer to nothing. It reads a line at a time, writes nothing, and knows
nothing about records. Where sae-dashboard is installed, its own classes judge batch files too.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards import schema
from sae_lens_maira.dashboards.api import MAX_EXPLANATION, MAX_FEATURES, MAX_LOGITS
from sae_lens_maira.dashboards.sequences import MAX_TOKENS
from sae_lens_maira.dashboards.target import PUBLIC_CREATOR
from sae_lens_maira.errors import RecordError

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


def validate(folder: Path | str) -> tuple[str, list[Fault]]:
    """Check a folder.

    Args:
        folder: output of sae-dashboard or `write_saedashboard`, a bulk export, or API payloads.

    Returns:
        The format ("saedashboard", "export" or "api") and its faults in order of file and line.

    Raises:
        RecordError: the folder holds none of the formats.
    """
    folder = Path(folder)
    if any(folder.glob("batch-*.json")):
        return "saedashboard", _ordered(_saedashboard(folder))
    if (folder / "source.jsonl").exists() or (folder / "features").is_dir():
        return "export", _ordered(_export(folder))
    if any(folder.glob("payloads*.jsonl")):
        return "api", _ordered(_api(folder))
    raise RecordError(
        f"{folder} holds no dashboards: expected batch-0.json, source.jsonl with a folder features, or "
        "payloads.jsonl. Give the folder that `dashboards neuronpedia` wrote."
    )


def payload_faults(payload: Any, place: Line) -> Iterator[Fault]:
    """Faults of one upload payload, by the server's limits."""
    yield from _told(place, schema.misfits(payload, schema.PAYLOAD, "the payload", exact=True))
    if not isinstance(payload, dict):
        return
    features, wrong = schema.objects(payload, "features", "the payload")
    yield from _told(place, wrong)
    if not 1 <= len(features) <= MAX_FEATURES:
        yield _fault(place, f"{len(features)} features, expected 1 to {MAX_FEATURES}")
    for feature in features:
        what = f"feature {feature.get('index')}"
        yield from _told(place, schema.misfits(feature, schema.PAYLOAD_FEATURE, what, exact=True))
        activations, wrong = schema.objects(feature, "activations", what)
        yield from _told(
            place, wrong or ([] if activations else [f"{what} has no activation (dead?); leave it out"])
        )
        for activation in activations:
            yield from _told(place, schema.misfits(activation, schema.PAYLOAD_ACTIVATION, what, exact=True))
            fraction = activation.get("quantileFraction")
            if isinstance(fraction, (int, float)) and not 0 <= fraction <= 1:
                yield _fault(
                    place, f"{what} has a quantileFraction of {fraction}, expected 0 to 1, null for the top"
                )
        yield from _sequences(place, what, activations)
        for name in ("topLogits", "bottomLogits"):
            logits, wrong = schema.objects(feature, name, what)
            yield from _told(place, wrong)
            if len(logits) > MAX_LOGITS:
                yield _fault(place, f"{what} has {len(logits)} {name}, at most {MAX_LOGITS} are taken")
            for logit in logits:
                yield from _told(place, schema.misfits(logit, schema.PAYLOAD_LOGIT, f"{what}, {name}"))
        explanations, wrong = schema.objects(feature, "explanations", what)
        yield from _told(place, wrong)
        for told in explanations:
            yield from _told(place, schema.misfits(told, schema.PAYLOAD_EXPLANATION, f"{what}, explanation"))
            if len(str(told.get("text"))) > MAX_EXPLANATION:
                yield _fault(place, f"{what} has an explanation of more than {MAX_EXPLANATION} characters")


def _api(folder: Path) -> Iterator[Fault]:
    seen: set[int] = set()
    for path in sorted(folder.glob("payloads*.jsonl")):
        for place in _lines(path, folder):
            if isinstance(place, Fault):
                yield place
                continue
            yield from payload_faults(place.row, place)
            for feature in (
                schema.objects(place.row, "features", "")[0] if isinstance(place.row, dict) else ()
            ):
                yield from _unique(place, f"feature {feature.get('index')}", feature.get("index"), seen)


def _saedashboard(folder: Path) -> Iterator[Fault]:
    seen: set[int] = set()
    heads: set[str] = set()
    paths = sorted(folder.glob("batch-*.json"), key=lambda p: (len(p.name), p.name))
    for path in paths:
        name = path.name
        try:
            text = path.read_text(encoding="utf-8")
            batch = json.loads(text, parse_constant=_refuse)
        except (ValueError, UnicodeDecodeError) as error:
            yield Fault(name, getattr(error, "lineno", 1), f"no JSON: {error}")
            continue
        place = Line(name, 1, batch)
        yield from _told(place, schema.misfits(batch, schema.BATCH, "the batch", exact=True))
        if not isinstance(batch, dict):
            continue
        heads.add(json.dumps([batch.get(k) for k in ("model_id", "layer", "sae_set", "sae_id_suffix")]))
        features, wrong = schema.objects(batch, "features", "the batch")
        yield from _told(place, wrong)
        for number, feature in zip(_feature_lines(text, len(features)), features, strict=True):
            yield from _batch_feature(Line(name, number, feature), seen)
        if importlib.util.find_spec("sae_dashboard"):
            yield from _their_verdict(place)
    if len(heads) > 1:
        yield Fault(paths[-1].name, 1, f"the batches name different sources: {sorted(heads)}")
    for name in ("run_settings.json", "skipped_indexes.json"):
        if not (folder / name).exists():
            yield Fault(name, 1, "the file is missing; the converter reads the folder's settings")


def _batch_feature(place: Line, seen: set[int]) -> Iterator[Fault]:
    feature = place.row
    what = f"feature {feature.get('feature_index')}"
    yield from _told(place, schema.misfits(feature, schema.BATCH_FEATURE, what, exact=True))
    yield from _unique(place, what, feature.get("feature_index"), seen)
    activations, wrong = schema.objects(feature, "activations", what)
    yield from _told(place, wrong)
    for activation in activations:
        yield from _told(place, schema.misfits(activation, schema.BATCH_ACTIVATION, what, exact=True))
        hit = activation.get("qualifying_token_index")
        if isinstance(hit, int) and not 0 <= hit < len(activation.get("tokens") or ()):
            yield _fault(
                place, f"{what} has a qualifying_token_index of {hit}, which is no token of its sequence"
            )
    yield from _sequences(place, what, activations)
    if feature.get("frac_nonzero"):
        zeros = sum(1 for a in activations if not any(v for v in a.get("values") or ()))
        yield from _few_zeros(place, what, zeros)


def _export(folder: Path) -> Iterator[Fault]:
    heads: dict[str, Line] = {}
    for name, fields in schema.HEADS.items():
        found = list(_lines(folder / f"{name}.jsonl", folder))
        yield from (one for one in found if isinstance(one, Fault))
        rows = [one for one in found if isinstance(one, Line)]
        if len(rows) != 1:
            yield Fault(f"{name}.jsonl", 1, f"{len(rows)} rows, expected one")
        for place in rows:
            yield from _told(place, schema.misfits(place.row, fields, f"the {name}"))
            if isinstance(place.row, dict):
                heads[name] = place
                yield from _public(place, "creatorId")
    yield from _references(heads)
    source = heads["source"].row if "source" in heads else {}
    alive: dict[int, bool] = {}
    zeros: Counter[int] = Counter()
    ids: set[str] = set()
    bags: set[int] = set()
    last: dict[int, Line] = {}
    for table, fields in schema.EXPORT_ROWS.items():
        for path in sorted((folder / table).glob("*.jsonl.gz"), key=lambda p: (len(p.name), p.name)):
            columns: set[str] | None = None
            for place in _lines(path, folder):
                if isinstance(place, Fault):
                    yield place
                    continue
                row = place.row
                what = f"the row of feature {row.get('index')}" if isinstance(row, dict) else "the row"
                faults = [_fault(place, m) for m in schema.misfits(row, fields, what)]
                yield from faults
                if not isinstance(row, dict):
                    continue
                columns = columns or set(row)
                if set(row) != columns:
                    yield _fault(
                        place, f"{what} has other fields than line 1, whose fields alone are imported"
                    )
                if (row.get("modelId"), row.get("layer")) != (source.get("modelId"), source.get("id")):
                    yield _fault(
                        place, f"{what} belongs to {row.get('modelId')}/{row.get('layer')}, not to the source"
                    )
                yield from _public(place, "authorId" if table == "explanations" else "creatorId")
                if table == "features":
                    yield from _unique(place, what, row.get("index"), alive)
                    alive[row.get("index", -1)] = bool(row.get("maxActApprox"))
                    continue
                yield from _unique(place, f"the id {row.get('id')}", f"{table}{row.get('id')}", ids)
                if not _known(row, alive):
                    yield _fault(place, f"{what} refers to a feature that the folder does not have")
                if table == "activations" and not faults:
                    yield from _activation(place, what, bags)
                    zeros[row["index"]] += row["maxValue"] == 0
                    last[row["index"]] = place
    for index, place in last.items():
        if alive.get(index):
            yield from _few_zeros(place, f"feature {index}", zeros[index])


def _activation(place: Line, what: str, bags: set[int]) -> Iterator[Fault]:
    row = place.row
    values = row["values"]
    yield from _sequences(place, what, [row], bags)
    if not values or not 0 <= row["maxValueTokenIndex"] < len(values):
        yield _fault(place, f"{what} has a maxValueTokenIndex that is no token of its sequence")
    elif not row["maxValue"] == max(values) == values[row["maxValueTokenIndex"]]:
        yield _fault(place, f"{what} has a maxValue of {row['maxValue']}, its largest value is {max(values)}")
    if not 0 <= row["qualifyingTokenIndex"] < len(row["tokens"]):
        yield _fault(place, f"{what} has a qualifyingTokenIndex that is no token of its sequence")


def _references(heads: dict[str, Line]) -> Iterator[Fault]:
    for name, field, other, key in (
        ("source", "modelId", "model", "id"),
        ("sourceset", "modelId", "model", "id"),
        ("source", "setName", "sourceset", "name"),
        ("sourceset", "releaseName", "release", "name"),
    ):
        if name in heads and other in heads and heads[name].row.get(field) != heads[other].row.get(key):
            yield _fault(
                heads[name],
                f"{field} is {heads[name].row.get(field)!r}, the {other} is {heads[other].row.get(key)!r}",
            )


def _sequences(
    place: Line, what: str, activations: list[dict[str, Any]], bags: set[int] | None = None
) -> Iterator[Fault]:
    """Lengths, limits and repeated token multisets of one feature's sequences."""
    bags = set() if bags is None else bags
    for activation in activations:
        tokens, values = activation.get("tokens"), activation.get("values")
        if not isinstance(tokens, list) or not isinstance(values, list):
            continue
        if not 1 <= len(tokens) <= MAX_TOKENS:
            yield _fault(place, f"{what} has a sequence of {len(tokens)} tokens, expected 1 to {MAX_TOKENS}")
        if len(tokens) != len(values):
            yield _fault(place, f"{what} has {len(tokens)} tokens with {len(values)} values")
        bag = hash((activation.get("index"), tuple(sorted(map(str, tokens)))))
        if bag in bags:
            yield _fault(place, f"{what} has two sequences of the same tokens; the page shows one of them")
        bags.add(bag)


def _lines(path: Path, folder: Path) -> Iterator[Line | Fault]:
    """Objects of a JSON lines file, gzipped or not; a Fault in place of a line that is none."""
    name = str(path.relative_to(folder))
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, text in enumerate(file, 1):
                try:
                    yield Line(name, number, json.loads(text, parse_constant=_refuse))
                except (ValueError, UnicodeDecodeError) as error:
                    yield Fault(name, number, f"no JSON: {error}")
    except FileNotFoundError:
        yield Fault(name, 1, "the file is missing")
    except (OSError, EOFError, zlib.error) as error:
        yield Fault(name, number + 1, f"the file is damaged or cut off: {error}")


def _feature_lines(text: str, count: int) -> list[int]:
    """Line of every feature of a batch file."""
    start = re.search(r'"features"\s*:\s*\[', text)
    position, lines, decoder = start.end() if start else 0, [], json.JSONDecoder()
    line, counted = 1, 0
    for _ in range(count):
        position = text.index("{", position)
        line += text.count("\n", counted, position)
        counted = position
        lines.append(line)
        position = decoder.raw_decode(text, position)[1]
    return lines


def _their_verdict(place: Line) -> Iterator[Fault]:
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import (  # pyright: ignore[reportMissingImports]: an extra
        NeuronpediaDashboardBatch,
    )

    try:
        same = NeuronpediaDashboardBatch(**place.row).to_dict() == place.row
    except (TypeError, AttributeError) as error:
        yield _fault(place, f"sae-dashboard does not read the batch: {error}")
        return
    if not same:
        yield _fault(place, "sae-dashboard reads the batch and writes another; a field is missing")


def _known(row: dict[str, Any], alive: dict[int, bool]) -> bool:
    index = row.get("index")
    return (
        int(index) in alive
        if isinstance(index, int) or (isinstance(index, str) and index.isdigit())
        else False
    )


def _unique(place: Line, what: str, key: Any, seen: Any) -> Iterator[Fault]:
    if key in seen:
        yield _fault(place, f"{what} comes twice; the importer drops one of them in silence")
    if isinstance(seen, set):
        seen.add(key)


def _public(place: Line, field: str) -> Iterator[Fault]:
    if place.row.get(field) != PUBLIC_CREATOR:
        yield _fault(place, f"{field} is {place.row.get(field)!r}; only rows of {PUBLIC_CREATOR} are shown")


def _few_zeros(place: Line, what: str, zeros: int) -> Iterator[Fault]:
    if zeros < ZERO_CONTEXTS:
        message = f"{what} has {zeros} sequences without activation; scorers on the site need {ZERO_CONTEXTS}"
        yield Fault(place.file, place.number, message, "advice")


def _fault(place: Line, message: str) -> Fault:
    return Fault(place.file, place.number, message)


def _told(place: Line, messages: Any) -> Iterator[Fault]:
    for message in messages:
        yield _fault(place, message)


def _ordered(faults: Iterator[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda fault: (fault.file, fault.line))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")

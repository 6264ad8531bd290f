"""Validation of a dashboard folder of any of the three formats: every fault with its file and line.

It checks what importers accept in silence and then lose: types and finite numbers, limits, ids that are not unique,
sequences that hold the same tokens, rows that refer to nothing. It reads a line at a time, writes nothing, and knows
nothing about records. Where sae-dashboard is installed, its own classes judge batch files too.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards import schema
from sae_lens_maira.dashboards.api import MAX_EXPLANATION, MAX_FEATURES, MAX_LOGITS
from sae_lens_maira.dashboards.faults import (
    Fault,
    Line,
    fault,
    faults_of,
    few_zeros,
    hidden,
    hit_faults,
    lines_of,
    refuse_constant,
    repeated,
    sequence_faults,
)
from sae_lens_maira.errors import RecordError


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
    yield from faults_of(place, schema.misfits(payload, schema.PAYLOAD, "the payload", exact=True))
    if not isinstance(payload, dict):
        return
    features, wrong = schema.objects(payload, "features", "the payload")
    yield from faults_of(place, wrong)
    if not 1 <= len(features) <= MAX_FEATURES:
        yield fault(place, f"{len(features)} features, expected 1 to {MAX_FEATURES}")
    for feature in features:
        what = f"feature {feature.get('index')}"
        yield from faults_of(place, schema.misfits(feature, schema.PAYLOAD_FEATURE, what, exact=True))
        activations, wrong = schema.objects(feature, "activations", what)
        yield from faults_of(
            place, wrong or ([] if activations else [f"{what} has no activation (dead?); leave it out"])
        )
        for activation in activations:
            yield from faults_of(
                place, schema.misfits(activation, schema.PAYLOAD_ACTIVATION, what, exact=True)
            )
            fraction = activation.get("quantileFraction")
            if isinstance(fraction, (int, float)) and not 0 <= fraction <= 1:
                yield fault(
                    place, f"{what} has a quantileFraction of {fraction}, expected 0 to 1, null for the top"
                )
        yield from sequence_faults(place, what, activations)
        for name in ("topLogits", "bottomLogits"):
            logits, wrong = schema.objects(feature, name, what)
            yield from faults_of(place, wrong)
            if len(logits) > MAX_LOGITS:
                yield fault(place, f"{what} has {len(logits)} {name}, at most {MAX_LOGITS} are taken")
            for logit in logits:
                yield from faults_of(place, schema.misfits(logit, schema.PAYLOAD_LOGIT, f"{what}, {name}"))
        explanations, wrong = schema.objects(feature, "explanations", what)
        yield from faults_of(place, wrong)
        for told in explanations:
            yield from faults_of(
                place, schema.misfits(told, schema.PAYLOAD_EXPLANATION, f"{what}, explanation")
            )
            if len(str(told.get("text"))) > MAX_EXPLANATION:
                yield fault(place, f"{what} has an explanation of more than {MAX_EXPLANATION} characters")


def _api(folder: Path) -> Iterator[Fault]:
    seen: set[int] = set()
    for path in sorted(folder.glob("payloads*.jsonl")):
        for place in lines_of(path, folder):
            if isinstance(place, Fault):
                yield place
                continue
            yield from payload_faults(place.row, place)
            for feature in (
                schema.objects(place.row, "features", "")[0] if isinstance(place.row, dict) else ()
            ):
                yield from repeated(place, f"feature {feature.get('index')}", feature.get("index"), seen)


def _saedashboard(folder: Path) -> Iterator[Fault]:
    seen: set[int] = set()
    heads: set[str] = set()
    paths = sorted(folder.glob("batch-*.json"), key=lambda p: (len(p.name), p.name))
    for path in paths:
        name = path.name
        try:
            text = path.read_text(encoding="utf-8")
            batch = json.loads(text, parse_constant=refuse_constant)
        except (ValueError, UnicodeDecodeError) as error:
            yield Fault(name, getattr(error, "lineno", 1), f"no JSON: {error}")
            continue
        place = Line(name, 1, batch)
        yield from faults_of(place, schema.misfits(batch, schema.BATCH, "the batch", exact=True))
        if not isinstance(batch, dict):
            continue
        heads.add(json.dumps([batch.get(k) for k in ("model_id", "layer", "sae_set", "sae_id_suffix")]))
        features, wrong = schema.objects(batch, "features", "the batch")
        yield from faults_of(place, wrong)
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
    yield from faults_of(place, schema.misfits(feature, schema.BATCH_FEATURE, what, exact=True))
    yield from repeated(place, what, feature.get("feature_index"), seen)
    activations, wrong = schema.objects(feature, "activations", what)
    yield from faults_of(place, wrong)
    for activation in activations:
        yield from faults_of(place, schema.misfits(activation, schema.BATCH_ACTIVATION, what, exact=True))
        yield from hit_faults(
            place,
            what,
            "qualifying_token_index",
            activation.get("qualifying_token_index"),
            activation.get("tokens"),
        )
    yield from sequence_faults(place, what, activations)
    if feature.get("frac_nonzero"):
        zeros = sum(1 for a in activations if not any(v for v in a.get("values") or ()))
        yield from few_zeros(place, what, zeros)


def _export(folder: Path) -> Iterator[Fault]:
    heads: dict[str, Line] = {}
    for name, fields in schema.HEADS.items():
        found = list(lines_of(folder / f"{name}.jsonl", folder))
        yield from (one for one in found if isinstance(one, Fault))
        rows = [one for one in found if isinstance(one, Line)]
        if len(rows) != 1:
            yield Fault(f"{name}.jsonl", 1, f"{len(rows)} rows, expected one")
        for place in rows:
            yield from faults_of(place, schema.misfits(place.row, fields, f"the {name}"))
            if isinstance(place.row, dict):
                heads[name] = place
                yield from hidden(place, "creatorId")
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
            for place in lines_of(path, folder):
                if isinstance(place, Fault):
                    yield place
                    continue
                row = place.row
                what = f"the row of feature {row.get('index')}" if isinstance(row, dict) else "the row"
                faults = [fault(place, m) for m in schema.misfits(row, fields, what)]
                yield from faults
                if not isinstance(row, dict):
                    continue
                columns = columns or set(row)
                if set(row) != columns:
                    yield fault(
                        place, f"{what} has other fields than line 1, whose fields alone are imported"
                    )
                if (row.get("modelId"), row.get("layer")) != (source.get("modelId"), source.get("id")):
                    yield fault(
                        place, f"{what} belongs to {row.get('modelId')}/{row.get('layer')}, not to the source"
                    )
                yield from hidden(place, "authorId" if table == "explanations" else "creatorId")
                if table == "features":
                    yield from repeated(place, what, row.get("index"), alive)
                    alive[row.get("index", -1)] = bool(row.get("maxActApprox"))
                    continue
                yield from repeated(place, f"the id {row.get('id')}", f"{table}{row.get('id')}", ids)
                if not _known(row, alive):
                    yield fault(place, f"{what} refers to a feature that the folder does not have")
                if table == "activations" and not faults:
                    yield from _activation(place, what, bags)
                    zeros[row["index"]] += row["maxValue"] == 0
                    last[row["index"]] = place
    for index, place in last.items():
        if alive.get(index):
            yield from few_zeros(place, f"feature {index}", zeros[index])


def _activation(place: Line, what: str, bags: set[int]) -> Iterator[Fault]:
    row = place.row
    values = row["values"]
    yield from sequence_faults(place, what, [row], bags)
    if not values or not 0 <= row["maxValueTokenIndex"] < len(values):
        yield fault(place, f"{what} has a maxValueTokenIndex that is no token of its sequence")
    elif not row["maxValue"] == max(values) == values[row["maxValueTokenIndex"]]:
        yield fault(place, f"{what} has a maxValue of {row['maxValue']}, its largest value is {max(values)}")
    yield from hit_faults(place, what, "qualifyingTokenIndex", row["qualifyingTokenIndex"], row["tokens"])


def _references(heads: dict[str, Line]) -> Iterator[Fault]:
    for name, field, other, key in (
        ("source", "modelId", "model", "id"),
        ("sourceset", "modelId", "model", "id"),
        ("source", "setName", "sourceset", "name"),
        ("sourceset", "releaseName", "release", "name"),
    ):
        if name in heads and other in heads and heads[name].row.get(field) != heads[other].row.get(key):
            yield fault(
                heads[name],
                f"{field} is {heads[name].row.get(field)!r}, the {other} is {heads[other].row.get(key)!r}",
            )


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
        yield fault(place, f"sae-dashboard does not read the batch: {error}")
        return
    if not same:
        yield fault(place, "sae-dashboard reads the batch and writes another; a field is missing")


def _known(row: dict[str, Any], alive: dict[int, bool]) -> bool:
    index = row.get("index")
    return (
        int(index) in alive
        if isinstance(index, int) or (isinstance(index, str) and index.isdigit())
        else False
    )


def _ordered(faults: Iterator[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda one: (one.file, one.line))

"""Validate a folder of dashboards in any of the three formats; report every issue with its file and line.

Checks what importers accept without a message and then lose: types and finite numbers, limits, ids that are not
unique, sequences with equal tokens, rows that refer to nothing. If sae-dashboard is installed, its own classes also
check batch files.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_lens_maira.checksums import SUMS, damaged_files
from sae_lens_maira.dashboards import schema
from sae_lens_maira.dashboards.schema import (
    MAX_EXPLANATION,
    MAX_FEATURES,
    MAX_LOGITS,
    Issue,
    Line,
    creator_issues,
    hit_issues,
    object_issues,
    objects,
    order_issues,
    read_lines,
    refuse_constant,
    repeated_issues,
    sequence_issues,
    type_issues,
    zero_issues,
)
from sae_lens_maira.errors import RecordError


def validate(folder: Path | str) -> tuple[str, list[Issue]]:
    """Check a folder.

    Args:
        folder: Output of sae-dashboard or `write_saedashboard`, a bulk export, or API payloads.

    Returns:
        The format ("saedashboard", "export" or "api") and its issues in order of file and line.

    Raises:
        RecordError: The folder contains none of the formats.
    """
    folder = Path(folder)
    if any(folder.glob("batch-*.json")):
        return "saedashboard", _ordered(folder, _saedashboard(folder))
    if (folder / "source.jsonl").exists() or (folder / "features").is_dir():
        return "export", _ordered(folder, _export(folder))
    if any(folder.glob("payloads*.jsonl")):
        return "api", _ordered(folder, _api(folder))
    raise RecordError(
        f"{folder} contains no dashboards: expected batch-0.json, source.jsonl with a folder features, or "
        "payloads.jsonl. Give the folder that `dashboards neuronpedia` wrote."
    )


def payload_issues(payload: Any, place: Line) -> Iterator[Issue]:
    """Check one upload payload against the server's limits."""
    yield from object_issues(place, payload, schema.PAYLOAD, "the payload", exact=True)
    if not isinstance(payload, dict):
        return
    features, wrong = objects(place, payload, "features", "the payload")
    yield from wrong
    if not 1 <= len(features) <= MAX_FEATURES:
        yield place.issue(f"{len(features)} features, expected 1 to {MAX_FEATURES}")
    for feature in features:
        what = f"feature {feature.get('index')}"
        yield from object_issues(place, feature, schema.PAYLOAD_FEATURE, what, exact=True)
        activations, wrong = objects(place, feature, "activations", what)
        yield from wrong
        if not activations and not wrong:
            yield place.issue(f"{what} has no activation (dead?); leave it out")
        for activation in activations:
            yield from object_issues(place, activation, schema.PAYLOAD_ACTIVATION, what, exact=True)
            fraction = activation.get("quantileFraction")
            if isinstance(fraction, (int, float)) and not 0 <= fraction <= 1:
                yield place.issue(
                    f"{what} has quantileFraction = {fraction}, expected 0 to 1, null for the top"
                )
        yield from sequence_issues(place, what, activations)
        for name in ("topLogits", "bottomLogits"):
            logits, wrong = objects(place, feature, name, what)
            yield from wrong
            if len(logits) > MAX_LOGITS:
                yield place.issue(f"{what} has {len(logits)} {name}, expected at most {MAX_LOGITS}")
            for logit in logits:
                yield from object_issues(place, logit, schema.PAYLOAD_LOGIT, f"{what}, {name}")
        explanations, wrong = objects(place, feature, "explanations", what)
        yield from wrong
        for explanation in explanations:
            yield from object_issues(place, explanation, schema.PAYLOAD_EXPLANATION, f"{what}, explanation")
            yield from type_issues(place, what, explanation.get("methodName"))
            if len(str(explanation.get("text"))) > MAX_EXPLANATION:
                yield place.issue(f"{what} has an explanation of more than {MAX_EXPLANATION} characters")


def _api(folder: Path) -> Iterator[Issue]:
    seen: set[int] = set()
    for path in sorted(folder.glob("payloads*.jsonl")):
        for place in read_lines(path, folder):
            if isinstance(place, Issue):
                yield place
                continue
            yield from payload_issues(place.row, place)
            features = objects(place, place.row, "features", "")[0] if isinstance(place.row, dict) else ()
            for feature in features:
                yield from repeated_issues(
                    place, f"feature {feature.get('index')}", feature.get("index"), seen
                )


def _saedashboard(folder: Path) -> Iterator[Issue]:
    seen: set[int] = set()
    heads: set[str] = set()
    paths = sorted(folder.glob("batch-*.json"), key=lambda p: (len(p.name), p.name))
    for path in paths:
        name = path.name
        try:
            text = path.read_text(encoding="utf-8")
            batch = json.loads(text, parse_constant=refuse_constant)
        except (ValueError, UnicodeDecodeError, RecursionError) as error:
            yield Issue(name, getattr(error, "lineno", 1), f"not valid JSON: {error}")
            continue
        place = Line(name, 1, batch)
        yield from object_issues(place, batch, schema.BATCH, "the batch", exact=True)
        if not isinstance(batch, dict):
            continue
        heads.add(json.dumps([batch.get(k) for k in ("model_id", "layer", "sae_set", "sae_id_suffix")]))
        features, wrong = objects(place, batch, "features", "the batch")
        yield from wrong
        for number, feature in zip(_feature_lines(text, len(features)), features, strict=True):
            yield from _batch_feature(Line(name, number, feature), seen)
        if importlib.util.find_spec("sae_dashboard"):
            yield from _sae_dashboard_issues(place)
    if len(heads) > 1:
        yield Issue(paths[-1].name, 1, f"the batches name different sources: {sorted(heads)}")
    for name in ("run_settings.json", "skipped_indexes.json"):
        if not (folder / name).exists():
            yield Issue(name, 1, "the file is missing; the converter reads the folder's settings")


def _batch_feature(place: Line, seen: set[int]) -> Iterator[Issue]:
    feature = place.row
    what = f"feature {feature.get('feature_index')}"
    yield from object_issues(place, feature, schema.BATCH_FEATURE, what, exact=True)
    yield from repeated_issues(place, what, feature.get("feature_index"), seen)
    activations, wrong = objects(place, feature, "activations", what)
    yield from wrong
    for activation in activations:
        yield from object_issues(place, activation, schema.BATCH_ACTIVATION, what, exact=True)
        hit, tokens = activation.get("qualifying_token_index"), activation.get("tokens")
        yield from hit_issues(place, what, "qualifying_token_index", hit, tokens)
    tops = [a.get("bin_max") for a in activations if a.get("bin_min") == -1]
    for high in sorted({a["bin_max"] for a in activations if isinstance(a.get("bin_max"), (int, float))}):
        yield from order_issues(place, what, high, tops[0] if tops else None)
    yield from sequence_issues(place, what, activations)
    if feature.get("frac_nonzero"):
        zeros = sum(1 for a in activations if not any(v for v in a.get("values") or ()))
        yield from zero_issues(place, what, zeros)


def _export(folder: Path) -> Iterator[Issue]:
    heads: dict[str, Line] = {}
    for name, fields in schema.HEADS.items():
        found = list(read_lines(folder / f"{name}.jsonl", folder))
        yield from (one for one in found if isinstance(one, Issue))
        rows = [one for one in found if isinstance(one, Line)]
        if len(rows) != 1:
            yield Issue(f"{name}.jsonl", 1, f"{len(rows)} rows, expected one")
        for place in rows:
            yield from object_issues(place, place.row, fields, f"the {name}")
            if isinstance(place.row, dict):
                heads[name] = place
                yield from creator_issues(place, "creatorId")
    yield from _references(heads)
    source = heads["source"].row if "source" in heads else {}
    largest: dict[str, float] = {}
    zeros: Counter[str] = Counter()
    bounds: defaultdict[str, set[float]] = defaultdict(set)
    ids: set[str] = set()
    bags: set[int] = set()
    last: dict[str, Line] = {}
    for table, fields in schema.EXPORT_ROWS.items():
        for path in sorted((folder / table).glob("*.jsonl.gz"), key=lambda p: (len(p.name), p.name)):
            columns: set[str] | None = None
            for place in read_lines(path, folder):
                if isinstance(place, Issue):
                    yield place
                    continue
                row = place.row
                what = f"the row of feature {row.get('index')}" if isinstance(row, dict) else "the row"
                issues = list(object_issues(place, row, fields, what))
                yield from issues
                if not isinstance(row, dict):
                    continue
                columns = columns or set(row)
                if set(row) != columns:
                    yield place.issue(
                        f"{what} has other fields than line 1; only those of line 1 are imported"
                    )
                if (row.get("modelId"), row.get("layer")) != (source.get("modelId"), source.get("id")):
                    owner = f"{row.get('modelId')}/{row.get('layer')}"
                    yield place.issue(f"{what} belongs to {owner}, not to the source")
                yield from creator_issues(place, "authorId" if table == "explanations" else "creatorId")
                index = str(row.get("index"))
                if table == "features":
                    yield from repeated_issues(place, what, index, largest)
                    largest[index] = row.get("maxActApprox") or 0.0
                    continue
                yield from repeated_issues(place, f"the id {row.get('id')}", f"{table}{row.get('id')}", ids)
                if index not in largest:
                    yield place.issue(f"{what} refers to a feature that the folder does not have")
                if table == "explanations":
                    yield from type_issues(place, what, row.get("typeName"))
                if table == "activations" and not issues:
                    yield from _activation(place, what, bags)
                    if row["binMax"] not in bounds[index]:
                        bounds[index].add(row["binMax"])
                        yield from order_issues(place, what, row["binMax"], largest.get(index))
                    zeros[index] += row["maxValue"] == 0
                    last[index] = place
    for index, place in last.items():
        if largest.get(index):
            yield from zero_issues(place, f"feature {index}", zeros[index])


def _activation(place: Line, what: str, bags: set[int]) -> Iterator[Issue]:
    row = place.row
    values = row["values"]
    yield from sequence_issues(place, what, [row], bags)
    if not values or not 0 <= row["maxValueTokenIndex"] < len(values):
        yield place.issue(f"{what} has a maxValueTokenIndex that is not a token of its sequence")
    elif not row["maxValue"] == max(values) == values[row["maxValueTokenIndex"]]:
        yield place.issue(f"{what} has maxValue = {row['maxValue']}, but its largest value is {max(values)}")
    yield from hit_issues(place, what, "qualifyingTokenIndex", row["qualifyingTokenIndex"], row["tokens"])


def _references(heads: dict[str, Line]) -> Iterator[Issue]:
    for name, field, other, key in (
        ("source", "modelId", "model", "id"),
        ("sourceset", "modelId", "model", "id"),
        ("source", "setName", "sourceset", "name"),
        ("sourceset", "releaseName", "release", "name"),
    ):
        if name in heads and other in heads and heads[name].row.get(field) != heads[other].row.get(key):
            yield heads[name].issue(
                f"{field} is {heads[name].row.get(field)!r}, the {other} is {heads[other].row.get(key)!r}"
            )


def _feature_lines(text: str, count: int) -> list[int]:
    """Line number of every feature of a batch file."""
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


def _sae_dashboard_issues(place: Line) -> Iterator[Issue]:
    """Round trip through sae-dashboard's own class."""
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import (  # pyright: ignore[reportMissingImports]: an extra
        NeuronpediaDashboardBatch,
    )

    try:
        same = NeuronpediaDashboardBatch(**place.row).to_dict() == place.row
    except (TypeError, AttributeError) as error:
        yield place.issue(f"sae-dashboard cannot read the batch: {error}")
        return
    if not same:
        yield place.issue("sae-dashboard reads the batch and writes a different one; a field is missing")


def _ordered(folder: Path, issues: Iterator[Issue]) -> list[Issue]:
    """Order the issues of a folder's contents and of its checksums by file and line."""
    text = f"the file is missing or was changed; if you changed it on purpose, remove {SUMS}"
    changed = (Issue(name, 0, text) for name in damaged_files(folder))
    return sorted([*changed, *issues], key=lambda one: (one.file, one.line))

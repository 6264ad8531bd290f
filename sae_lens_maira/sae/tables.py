"""Interpretations of latents from a table whose columns nobody has described, as one pandas frame.

    latent (int) | interpretation (str) | score (float) | every other column as it was | source (file)

Columns are known by name where they have a usual one, and otherwise by content: the latent is a column of
distinct whole numbers, the interpretation the column with the longest texts. What stays ambiguous is
refused with a list. This module knows nothing about SAEs; it reads CSV, TSV, JSON, JSON lines and Parquet.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sae_lens_maira.errors import SAEError

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")

_LATENT_NAMES = (
    "latent", "latent_id", "latent_index", "latent_idx", "feature", "feature_id", "feature_index",
    "feature_idx", "feature_number", "neuron", "neuron_id", "sae_feature", "sae_latent", "unit", "index",
    "idx", "id",
)  # fmt: skip
_TEXT_NAMES = (
    "interpretation", "explanation", "description", "label", "concept", "hypothesis", "summary", "text",
    "name",
)  # fmt: skip
_SCORE_NAMES = (
    "score", "detection_score", "detection", "interpretation_score", "f1", "f1_score", "balanced_accuracy",
    "accuracy", "auroc", "auc", "correlation",
)  # fmt: skip


def read_interpretations(
    path: str | Path,
    *,
    latent: str | None = None,
    interpretation: str | None = None,
    score: str | None = None,
) -> pd.DataFrame:
    """One frame from a table of interpretations, or from all tables below a folder.

    Args:
        path: a table or a folder.
        latent: name of the column of latent indices, where sniffing is not to decide.
        interpretation: name of the column of texts, likewise.
        score: name of the column of scores, likewise. A table without scores gets NaN.

    Returns:
        Columns latent, interpretation, score and source first, then all others of the tables; sorted by
        source and latent. A latent may have several rows.

    Raises:
        SAEError: there is no table, or no column can be made out as the latent's or the text's.
    """
    root = Path(path)
    below = (file for file in root.rglob("*") if file.suffix.lower() in TABLE_SUFFIXES)
    files = [root] if root.is_file() else sorted(below)
    chosen = {"latent": latent, "interpretation": interpretation, "score": score}
    frames, problems = [], []
    for file in files:
        try:
            frame = _named(_read(file), file, chosen)
        except SAEError as error:
            if root.is_file():
                raise
            problems.append(str(error))  # a folder also holds configurations and other JSON files
            continue
        frame.insert(3, "source", file.name if root.is_file() else file.relative_to(root).as_posix())
        frames.append(frame)
    if not frames:
        raise SAEError(
            f"{root} holds no table of interpretations ({', '.join(TABLE_SUFFIXES)}). "
            + (" ".join(problems[:3]) or "Check the path.")
        )
    return pd.concat(frames, ignore_index=True).sort_values(
        ["source", "latent"], ignore_index=True, kind="stable"
    )


def _read(file: Path) -> pd.DataFrame:
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            return pd.read_parquet(file)
        if suffix in (".csv", ".tsv"):
            return pd.read_csv(file, sep="\t" if suffix == ".tsv" else None, engine="python")
        text = file.read_text(encoding="utf-8")
        if suffix in (".jsonl", ".ndjson"):
            return pd.DataFrame([json.loads(line) for line in text.splitlines() if line.strip()])
        return _frame_of(json.loads(text), file)
    except (ValueError, OSError) as error:
        raise SAEError(f"{file} is not a readable {suffix} table: {error}.") from error


def _frame_of(value: Any, file: Path) -> pd.DataFrame:
    """A frame from JSON: records, columns, {latent: text}, {latent: record}, or one of these below a key."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return pd.DataFrame(value)
    if isinstance(value, dict) and value:
        if all(_index_of(key) is not None for key in value):
            rows = [row if isinstance(row, dict) else {"interpretation": row} for row in value.values()]
            return pd.DataFrame(
                [{"latent": _index_of(key)} | row for key, row in zip(value, rows, strict=True)]
            )
        lengths = {len(column) if isinstance(column, list) else None for column in value.values()}
        if len(lengths) == 1 and None not in lengths and not isinstance(next(iter(value.values()))[0], dict):
            return pd.DataFrame(value)
        nested = [inner for inner in value.values() if isinstance(inner, (dict, list)) and len(inner) > 0]
        for inner in sorted(nested, key=len, reverse=True):
            try:
                return _frame_of(inner, file)
            except SAEError:
                continue
    seen = list(value)[:8] if isinstance(value, dict) else type(value).__name__
    raise SAEError(f"{file} holds {seen}: no records and no columns of interpretations.")


def _named(frame: pd.DataFrame, file: Path, chosen: dict[str, str | None]) -> pd.DataFrame:
    if frame.empty:
        raise SAEError(f"{file} is an empty table with the columns {list(frame.columns)}.")
    unknown = [name for name in chosen.values() if name is not None and name not in frame.columns]
    if unknown:
        raise SAEError(f"{file} has the columns {list(frame.columns)}, not {', '.join(unknown)}.")
    columns = {str(column): column for column in frame.columns}
    latent = chosen["latent"] or _by_name(columns, _LATENT_NAMES, lambda c: _indices(frame[c]) is not None)
    latent = latent or _only([c for c in columns if _is_index(frame[c])])
    text = chosen["interpretation"]
    text = text or _by_name(columns, _TEXT_NAMES, lambda c: c != latent and _is_text(frame[c]))
    if text is None:
        texts = [c for c in columns if c != latent and _is_text(frame[c])]
        text = max(texts, key=lambda c: frame[c].dropna().astype(str).str.len().mean(), default=None)
    indices = None if latent is None else _indices(frame[latent])
    if indices is None or text is None:
        raise SAEError(
            f"{file} has the columns {list(frame.columns)}: "
            + ("no column of latent indices" if indices is None else "no column of texts")
            + " could be made out. Pass latent= and interpretation= by name."
        )
    score = chosen["score"]
    score = score or _by_name(
        columns, _SCORE_NAMES, lambda c: c not in (latent, text) and _is_number(frame[c])
    )
    result = pd.DataFrame({"latent": indices, "interpretation": frame[text].astype(object)})
    result["score"] = float("nan") if score is None else frame[score].astype(float)
    rest = frame.drop(columns=[c for c in (latent, text, score) if c is not None])
    taken = set(result.columns) | {"source"}
    return result.join(rest.rename(columns={c: f"{c}_original" for c in rest.columns if c in taken}))


def _by_name(columns: dict[str, Any], names: Sequence[str], fits: Any) -> str | None:
    normal = {re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_"): column for column in columns}
    exact = [normal[name] for name in names if name in normal and fits(normal[name])]
    if exact:
        return exact[0]
    for key, column in normal.items():
        if any(name in key.split("_") for name in names) and fits(column):
            return column
    return None


def _only(columns: Sequence[str]) -> str | None:
    return columns[0] if len(columns) == 1 else None


def _index_of(value: Any) -> int | None:
    """12 from 12, 12.0, "12", "latent 12" or "feature_12"; None from anything else."""
    if isinstance(value, bool) or value is None:
        return None
    match = re.fullmatch(r"(?:[A-Za-z_ #/:.-]*?)(\d+)(?:\.0)?", str(value).strip())
    return int(match[1]) if match else None


def _indices(column: pd.Series) -> pd.Series | None:
    numbers = [_index_of(value) for value in column.tolist()]
    return None if None in numbers else pd.Series(numbers, index=column.index, dtype="int64")


def _is_index(column: pd.Series) -> bool:
    numbers = _indices(column)
    return numbers is not None and bool(numbers.is_unique)


def _is_text(column: pd.Series) -> bool:
    values = column.dropna()
    return len(values) > 0 and all(isinstance(value, str) for value in values)


def _is_number(column: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column)) and not bool(pd.api.types.is_bool_dtype(column))

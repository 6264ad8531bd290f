"""Read published interpretations from a table whose columns are not documented.

    latent (int) | interpretation (str) | score (float, 0..1) | every other column as it was | source (file)

Columns are found by their usual names, otherwise by content: the latent is a column of distinct whole numbers, the
interpretation the column with the longest texts. If this is ambiguous, an error lists the columns. The columns used and
the conversions are listed in the frame's `attrs["notes"]`. A published score has no counts and no control here. It was
measured on other examples, so that its value cannot be compared with this package's scores.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.offline import category_of_text
from sae_lens_maira.interp.records import Interpretation, Score

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".pq")

_LATENT_NAMES = (
    "latent", "latent_id", "latent_index", "latent_idx", "feature", "feature_id", "feature_index",
    "feature_idx", "feature_number", "neuron", "neuron_id", "sae_feature", "sae_latent", "unit", "index",
    "idx", "id", "unnamed_0", "index_level_0",
)  # fmt: skip
_TEXT_NAMES = (
    "interpretation", "explanation", "description", "label", "concept", "hypothesis", "summary", "text",
    "name",
)  # fmt: skip
_SCORE_NAMES = (
    "score", "detection_score", "detection", "interpretation_score", "interpretability_score",
    "interpretability", "fuzzing", "f1", "f1_score", "balanced_accuracy", "accuracy", "auroc", "auc", "correlation",
)  # fmt: skip
_PERCENT = re.compile(r"percent|pct|%", re.IGNORECASE)


def read_published(
    path: Path | str,
    name: str = "published",
    latent: str | None = None,
    text: str | None = None,
    score: str | None = None,
) -> tuple[list[Interpretation], list[str]]:
    """Read a table of interpretations as records.

    Args:
        path: Table or folder of tables; see `read_interpretations`.
        name: Name for the explainer of these interpretations.
        latent: Column with the latent's index; found by its name or content if not given.
        text: Column with the explanation; found by its name or content if not given.
        score: Column with a score; found by its name if not given. "none" for no score.

    Returns:
        Interpretations that have a text, and notes on the columns used and the conversions.

    Raises:
        RecordError: The file cannot be read, or a column is missing, ambiguous or of an unknown scale.
    """
    frame = read_interpretations(path, latent=latent, interpretation=text, score=score)
    found = []
    for row in frame.to_dict("records"):
        sentence, value = row["interpretation"], float(row["score"])
        if not isinstance(sentence, str) or not sentence.strip():
            continue
        rated = Score("published", name, 0, 0, 0, 0, 0, 0, 0, value, None, None)
        found.append(
            Interpretation(
                latent=int(row["latent"]),
                explanation=" ".join(sentence.split()),
                explainer=name,
                method="",
                category=category_of_text(sentence, ()),
                scores=(rated,) if math.isfinite(value) else (),
                control=(),
                control_latent=None,
                status="ok",
                n_train=0,
                n_test=0,
                prompt_version="",
            )
        )
    return found, list(frame.attrs["notes"])


def read_interpretations(
    path: str | Path,
    *,
    latent: str | None = None,
    interpretation: str | None = None,
    score: str | None = None,
) -> pd.DataFrame:
    """Read one frame from a table of interpretations, or from all tables below a folder.

    Args:
        path: CSV, TSV, Parquet, JSON lines, or JSON: records, {latent: text or record}, columns, any `orient` of
            pandas' `to_json`, or one of these under a key.
        latent: Name of the column of latent indices; found if not given.
        interpretation: Name of the column of texts; found if not given.
        score: Name of the column of scores; found by its name if not given, "none" for no score. Percentages are
            divided by 100. A table without scores gets NaN.

    Returns:
        Columns latent, interpretation, score and source first, then all others of the tables; sorted by source and
        latent. A latent may have several rows. `attrs["notes"]` lists the columns used and the conversions.

    Raises:
        RecordError: There is no table, no column can be identified as the latent's or the text's, or the scores are of
            an unknown scale.
    """
    root = Path(path)
    below = (file for file in root.rglob("*") if file.suffix.lower() in TABLE_SUFFIXES)
    files = [root] if root.is_file() else sorted(below)
    chosen = {"latent": latent, "interpretation": interpretation, "score": score}
    frames, problems, notes = [], [], []
    for file in files:
        try:
            frame = _named(_read(file), file, chosen, notes)
        except RecordError as error:
            if root.is_file():
                raise
            problems.append(str(error))  # the folder may contain configurations and other JSON files
            continue
        frame.insert(3, "source", file.name if root.is_file() else file.relative_to(root).as_posix())
        frames.append(frame)
    if not frames:
        raise RecordError(
            f"{root} contains no table of interpretations ({', '.join(TABLE_SUFFIXES)}). "
            + (" ".join(problems[:3]) or "Check the path.")
        )
    result = pd.concat(frames, ignore_index=True).sort_values(
        ["source", "latent"], ignore_index=True, kind="stable"
    )
    result.attrs["notes"] = notes
    return result


def _read(file: Path) -> pd.DataFrame:
    suffix = file.suffix.lower()
    try:
        if suffix in (".parquet", ".pq"):
            frame = pd.read_parquet(file)
            return frame if frame.index.equals(pd.RangeIndex(len(frame))) else frame.reset_index()
        if suffix in (".csv", ".tsv"):
            sep = "\t" if suffix == ".tsv" else None
            return pd.read_csv(file, sep=sep, engine="python", encoding="utf-8-sig")
        if suffix not in TABLE_SUFFIXES:
            raise RecordError(
                f"{file} ends in {suffix or 'nothing'}; expected one of {', '.join(TABLE_SUFFIXES)}."
            )
        text = file.read_text(encoding="utf-8-sig")
        if suffix in (".jsonl", ".ndjson"):
            return _records([json.loads(line) for line in text.splitlines() if line.strip()])
        frame = _frame_of(json.loads(text))
    except (ValueError, OSError, RecursionError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{file} is not a readable {suffix} table: {error}.") from error
    if frame is None:
        raise RecordError(f"{file} contains no records and no columns of interpretations.")
    return frame


def _frame_of(value: Any) -> pd.DataFrame | None:
    """Convert JSON of any layout that `read_interpretations` lists to a frame; None for other JSON."""
    if isinstance(value, list):
        if value and all(isinstance(row, dict) for row in value):
            return _records(value)
        is_table = len(value) > 0 and all(isinstance(row, list) and len(row) > 1 for row in value)
        return pd.DataFrame(value).rename(columns=str) if is_table else None  # orient="values"
    if not isinstance(value, dict) or not value:
        return None
    if isinstance(value.get("data"), list) and isinstance(value.get("columns"), list):  # orient="split"
        frame = pd.DataFrame(value["data"], columns=value["columns"])
        return _with_index(frame, value.get("index", range(len(frame))))
    if "schema" in value and isinstance(value.get("data"), list):  # orient="table"
        return _frame_of(value["data"])
    if all(_index_of(key) is not None for key in value):  # {latent: text or record}, orient="index"
        rows = [row if isinstance(row, dict) else {"interpretation": row} for row in value.values()]
        if any(
            isinstance(entry, str) for row in rows for entry in row.values()
        ):  # else keys such as "layer_15"
            return _with_index(_records(rows), [_index_of(key) for key in value])
    columns = list(value.values())
    if all(isinstance(column, list) for column in columns) and len({len(column) for column in columns}) == 1:
        if columns[0] and not isinstance(columns[0][0], (dict, list)):
            return pd.DataFrame(value)
    elif all(isinstance(column, dict) for column in columns):  # orient="columns"
        keys = list(columns[0])
        plain = not any(isinstance(entry, dict) for column in columns for entry in column.values())
        numbers = [_index_of(key) for key in keys]
        if keys and plain and None not in numbers and all(list(column) == keys for column in columns):
            return _with_index(pd.DataFrame(value), numbers)
    nested = [inner for inner in columns if isinstance(inner, (dict, list)) and len(inner) > 0]
    for inner in sorted(nested, key=len, reverse=True):
        frame = _frame_of(inner)
        if frame is not None:
            return frame
    return None


def _records(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Convert records to a frame; entries of a mapping inside a record become columns such as "scores_detection"."""
    return pd.json_normalize(rows, sep="_")


def _with_index(frame: pd.DataFrame, index: Any) -> pd.DataFrame:
    """Add the row labels as the column "index", if no column contains the latents."""
    frame = frame.reset_index(drop=True)
    own = {str(column): column for column in frame.columns}
    if _by_name(own, _LATENT_NAMES, lambda c: _indices(frame[c]) is not None) is None:
        frame.insert(0, "index", list(index))
    return frame


def _named(frame: pd.DataFrame, file: Path, chosen: dict[str, str | None], notes: list[str]) -> pd.DataFrame:
    if frame.empty:
        raise RecordError(f"{file} is an empty table with the columns {list(frame.columns)}.")
    frame = frame.rename(columns=str)
    columns = {column: column for column in frame.columns}
    absent = [c for c in chosen.values() if c is not None and c not in columns and c != "none"]
    if absent:
        raise RecordError(
            f"{file} has the columns {list(columns)}, not {', '.join(absent)}. Give --latent-column, --text-column or "
            "--score-column by a name from that list."
        )
    latent = chosen["latent"] or _by_name(columns, _LATENT_NAMES, lambda c: _indices(frame[c]) is not None)
    if latent is None:
        distinct = [c for c in columns if _is_index(frame[c])]
        latent = distinct[0] if len(distinct) == 1 else None
    text = chosen["interpretation"]
    text = text or _by_name(columns, _TEXT_NAMES, lambda c: c != latent and _is_text(frame[c]))
    if text is None:
        texts = [c for c in columns if c != latent and _is_text(frame[c])]
        text = max(texts, key=lambda c: frame[c].dropna().astype(str).str.len().mean(), default=None)
    indices = None if latent is None else _indices(frame[latent])
    if indices is None or text is None:
        raise RecordError(
            f"{file} has the columns {list(frame.columns)}: "
            + ("no column of latent indices" if indices is None else "no column of texts")
            + " could be identified. Pass latent= and interpretation= by name (--latent-column, --text-column)."
        )
    rest = [c for c in columns if c not in (latent, text) and _numbers(frame[c]) is not None]
    score = (
        None
        if chosen["score"] == "none"
        else chosen["score"] or _by_name({c: c for c in rest}, _SCORE_NAMES, lambda c: True)
    )
    result = pd.DataFrame({"latent": indices, "interpretation": frame[text].astype(object)})
    result["score"] = float("nan") if score is None else _scores(frame[score], score, file, notes)
    others = [c for c in rest if c != score and _by_name({c: c}, _SCORE_NAMES, lambda c: True) is not None]
    notes.append(
        f"{file.name}: latent from {latent!r}, text from {text!r}, "
        + ("no score" if score is None else f"score from {score!r}")
        + (f"; other score columns: {', '.join(map(repr, others))}" if others and score is not None else "")
    )
    more = frame.drop(columns=[c for c in (latent, text, score) if c is not None])
    taken = set(result.columns) | {"source"}
    return result.join(more.rename(columns={c: f"{c}_original" for c in more.columns if c in taken}))


def _scores(column: pd.Series, name: str, file: Path, notes: list[str]) -> pd.Series:
    """Read scores from -1 to 1; percentages are divided by 100, other scales are refused."""
    numbers = _numbers(column)
    if numbers is None:
        raise RecordError(
            f"{file}: the column {name!r} contains no numbers; name another with --score-column."
        )
    low, high = float(numbers.min()), float(numbers.max())
    written = column.astype(str).str.contains("%").any()
    if (10 < high <= 100 and low >= 0) or ((written or _PERCENT.search(name)) and low >= 0 and high <= 100):
        notes.append(
            f"{file.name}: {name!r} contains percentages ({low:g} to {high:g}) and was divided by 100"
        )
        return numbers / 100
    if high > 1 or low < -1:
        raise RecordError(
            f"{file}: the scores in {name!r} run from {low:g} to {high:g}; expected 0 to 1, or percentages. Convert "
            "them, name another column with --score-column, or use none with --score-column none."
        )
    return numbers


def _by_name(columns: dict[str, str], names: Sequence[str], fits: Any) -> str | None:
    spaced = {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", column): column for column in columns.values()}
    normal = {re.sub(r"[^a-z0-9]+", "_", key.lower()).strip("_"): column for key, column in spaced.items()}
    exact = [normal[name] for name in names if name in normal and fits(normal[name])]
    if exact:
        return exact[0]
    for key, column in normal.items():
        if any(name in key.split("_") for name in names) and fits(column):
            return column
    return None


def _index_of(value: Any) -> int | None:
    """Parse a latent index: 12 from 12, 12.0, "12", "latent 12" or "feature_12"; None for other values."""
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
    return len(values) > 0 and all(isinstance(value, str) for value in values) and _numbers(column) is None


def _numbers(column: pd.Series) -> pd.Series | None:
    """Convert a column to floats, also from "80" or "80 %"; None if a value is something else."""
    if pd.api.types.is_bool_dtype(column):
        return None
    bare: Any = pd.to_numeric(column.map(_bare), errors="coerce")
    numbers: pd.Series = bare.astype(float)
    return numbers if bool(column.notna().any()) and bool((numbers.notna() | column.isna()).all()) else None


def _bare(value: Any) -> Any:
    return value.strip().removesuffix("%").strip() if isinstance(value, str) else value

"""Interpretations that others published, read from a table as records like ours.

The release of MAIRA-2's SAEs comes with interpretations and scores whose column names are not documented, so columns
are found by their names and can be given. A published score is kept as it is, without counts or a control: it was
made with other examples and can not be set against ours number by number. It knows nothing about releases.
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.offline import category_of_text
from sae_lens_maira.interp.records import Interpretation, Score

LATENT = ("latent", "latent_id", "latent_idx", "latent_index", "feature", "feature_id", "feature_idx")
LATENT += ("feature_index", "neuron", "index", "id")
TEXT = ("interpretation", "explanation", "description", "label", "text")
SCORE = ("detection", "detection_score", "balanced_accuracy", "score", "accuracy")


def read_published(
    path: Path | str,
    name: str = "published",
    latent: str | None = None,
    text: str | None = None,
    score: str | None = None,
) -> list[Interpretation]:
    """Read a table of interpretations.

    Args:
        path: CSV, TSV, Parquet, JSON (a list of objects, or {latent: sentence}) or JSON lines.
        name: stands as their explainer.
        latent: column with the latent's number; found by its name if not given.
        text: column with the sentence; found by its name if not given.
        score: column with a score from 0 to 1; found by its name if not given, and not needed.

    Raises:
        RecordError: the file cannot be read, or the columns are not there.
    """
    path = Path(path)
    frame = _frame(path)
    number = _column(frame, latent, LATENT, path, "the latent's number")
    sentence = _column(frame, text, TEXT, path, "the sentence")
    known = {str(column).lower(): str(column) for column in frame}
    rating = score or next((known[c] for c in SCORE if c in known), None)
    if rating is not None and rating not in frame:
        raise RecordError(f"{path} has no column {rating!r}; it has {', '.join(map(str, frame))}.")
    found = []
    for row in frame.to_dict("records"):
        value = row[sentence]
        if not isinstance(value, str) or not value.strip():
            continue
        try:
            which = int(row[number])
        except (TypeError, ValueError):
            raise RecordError(
                f"{path} has {row[number]!r} in the column {number}, where a latent's number was expected. Name "
                "another column."
            ) from None
        rated = _score(row[rating], name) if rating is not None else None
        found.append(
            Interpretation(
                latent=which,
                explanation=" ".join(value.split()),
                explainer=name,
                method="",
                category=category_of_text(value, ()),
                scores=() if rated is None else (rated,),
                control=(),
                control_latent=None,
                status="ok",
                n_train=0,
                n_test=0,
                prompt_version="",
            )
        )
    return found


def _frame(path: Path) -> pd.DataFrame:
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            return pd.read_csv(path, sep="\t" if kind == ".tsv" else ",")
        if kind in (".parquet", ".pq"):
            return pd.read_parquet(path)
        if kind == ".jsonl":
            return pd.read_json(path, lines=True)
        if kind == ".json":
            held = pd.read_json(path, typ="series")
            if held.map(lambda value: isinstance(value, str)).all():
                return pd.DataFrame({"latent": held.index, "explanation": held.to_numpy()})
            return pd.DataFrame(held.tolist(), index=held.index).rename_axis("index").reset_index()
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path} cannot be read as {kind} ({error}); expected a table of interpretations. Check the file."
        ) from error
    raise RecordError(f"{path} ends in {kind or 'nothing'}; expected .csv, .tsv, .parquet, .json or .jsonl.")


def _column(frame: pd.DataFrame, given: str | None, names: tuple[str, ...], path: Path, what: str) -> str:
    known = {str(column).lower(): str(column) for column in frame}
    found = given if given is not None else next((known[n] for n in names if n in known), None)
    if found is None or found not in frame:
        raise RecordError(
            f"{path} has the columns {', '.join(map(str, frame))}, none of which is known to hold {what}. Name it with "
            "--latent-column, --text-column or --score-column."
        )
    return found


def _score(value: object, name: str) -> Score | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return Score("published", name, 0, 0, 0, 0, 0, 0, 0, float(value), None, None)

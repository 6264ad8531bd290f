"""The page's index as columns: one list per quantity, aligned by latent, strings looked up in small tables.

16,384 latents make about two megabytes, which a browser parses in tens of milliseconds. It knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sae_lens_maira.interp.records import Interpretation, Score
from sae_lens_maira.latents.records import Firing, LatentRecord

WORDS_SHOWN = 4
NAME_LENGTH = 160


def rounded(value: float | None, digits: int = 3) -> float | int | None:
    """`value` to `digits` significant digits; whole numbers without their point."""
    if value is None:
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


@lru_cache(65536)
def readable(token: str) -> str:
    """A vocabulary piece as it reads: sentencepiece's mark becomes a space, its byte for a new line the line."""
    return token.replace("▁", " ").replace("<0x0A>", "\n")


def leading_score(scores: Sequence[Score]) -> Score | None:
    """The score that the index shows: detection, or whichever came first."""
    for score in scores:
        if score.method == "detection" and score.balanced_accuracy is not None:
            return score
    return next((score for score in scores if score.balanced_accuracy is not None), None)


def named(interpretations: Sequence[Interpretation]) -> Interpretation | None:
    """The interpretation that names a latent: the best leading score among those that say something."""
    said = [one for one in interpretations if one.explanation]
    return max(said, key=lambda one: _value(leading_score(one.scores)), default=None)


def control_of(interpretation: Interpretation) -> Score | None:
    """The control that belongs to the leading score: same method and judge."""
    lead = leading_score(interpretation.scores)
    if lead is None:
        return None
    same = [c for c in interpretation.control if (c.method, c.judge) == (lead.method, lead.judge)]
    return same[0] if same else None


def _value(score: Score | None) -> float:
    return -1.0 if score is None or score.balanced_accuracy is None else score.balanced_accuracy


COLUMNS = (
    *("latent", "level", "status", "text", "image", "max", "finding", "f1", "at"),
    *("name", "category", "score", "control", "words", "refines"),
)


def index_row(record: LatentRecord, interpretations: Sequence[Interpretation]) -> dict[str, Any]:
    """What the index says of one latent, by column; words as they are, None where there is none."""
    best = max(record.agreement, key=lambda a: a.f1, default=None)
    name = named(interpretations)
    lead = leading_score(name.scores) if name else None
    control = control_of(name) if name else None
    density: dict[str, Firing] = {firing.kind: firing for firing in record.firing if firing.rows}
    return {
        "latent": record.latent,
        "level": record.level,
        "status": record.status,
        "text": rounded(density["text"].density) if "text" in density else None,
        "image": rounded(density["image"].density) if "image" in density else None,
        "max": rounded(record.max),
        "finding": best.finding if best else None,
        "f1": rounded(best.f1) if best else None,
        "at": best.kind[0] if best else "",
        "name": (name.explanation or "")[:NAME_LENGTH] if name else "",
        "category": (name.category or None) if name else None,
        "score": rounded(lead.balanced_accuracy) if lead else None,
        "control": rounded(control.balanced_accuracy) if control else None,
        "words": " ".join(readable(t.token).strip() for t in record.top_tokens[:WORDS_SHOWN]),
        # The page turns these around, so that a coarse latent names those that refine it.
        "refines": [[n.latent, rounded(n.value)] for n in record.neighbours if n.relation == "refines"],
    }


class IndexColumns:
    """Columns filled latent by latent."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._tables: dict[str, dict[str, int]] = {"status": {}, "finding": {}, "category": {}}

    def add(self, row: dict[str, Any]) -> None:
        """Append the row of one latent; words of the small tables become their numbers, -1 where there is none."""
        for key, column in self._columns.items():
            value, table = row[key], self._tables.get(key)
            if table is not None:
                value = -1 if value is None else table.setdefault(value, len(table))
            column.append(value)

    def to_plain(self) -> dict[str, Any]:
        """`{"columns": {...}, "tables": {...}}`, ready for JSON."""
        return {
            "columns": self._columns,
            "tables": {name: list(table) for name, table in self._tables.items()},
        }

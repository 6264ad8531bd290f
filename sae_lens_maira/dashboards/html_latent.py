"""One latent as the page reads it: a record made small.

    numbers     three significant digits
    roles       runs of equal ones, [role, count]
    heat        one character per patch, 0 to 89 of the map's own maximum; patch numbers beside them where few fire

A latent never exceeds its size: contexts that do not fit are left out from the tail of the longest list, and counted.
It knows nothing about files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from sae_lens_maira.dashboards.html_columns import readable, rounded
from sae_lens_maira.dashboards.html_images import ImageFolder
from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.records import Interpretation, Score
from sae_lens_maira.latents.records import Context, LatentRecord, StudyInfo

# Printable ASCII that JSON and JavaScript write as itself.
ALPHABET = "".join(chr(code) for code in range(ord("#"), ord("~") + 1) if chr(code) not in "<\\")
_LETTERS = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)


def levels(values: Sequence[float], top: float) -> str:
    """Every value as one character; `ALPHABET[0]` is no activation, its last character is `top`."""
    last = len(ALPHABET) - 1
    if top <= 0:
        return ALPHABET[0] * len(values)
    given = np.asarray(values, dtype=np.float64)
    number = np.where(given > 0, np.clip(np.rint(last * given / top), 1, last), 0).astype(np.intp)
    return _LETTERS[number].tobytes().decode("ascii")


def latent_page(
    record: LatentRecord,
    interpretations: Sequence[Interpretation],
    studies: dict[str, StudyInfo],
    images: ImageFolder | None,
    limit: int,
) -> dict[str, Any]:
    """A record ready for JSON of at most `limit` bytes.

    Raises:
        RecordError: a context names a study that the record set does not have, or no context fits.
    """
    lists = [
        [_context(c, studies) for c in record.top],
        *([_context(c, studies) for c in interval.contexts] for interval in record.intervals),
        [_context(c, studies) for c in record.zero],
    ]
    page: dict[str, Any] = {
        "latent": record.latent,
        "level": record.level,
        "status": record.status,
        "density": rounded(record.density),
        "max": rounded(record.max),
        "histogram": {
            "edges": [rounded(e) for e in record.histogram.edges],
            "counts": list(record.histogram.counts),
        },
        "firing": [_short(asdict(f)) | {"density": rounded(f.density)} for f in record.firing],
        "top_tokens": [[readable(t.token), t.token_id, rounded(t.weight)] for t in record.top_tokens],
        "bottom_tokens": [[readable(t.token), t.token_id, rounded(t.weight)] for t in record.bottom_tokens],
        "agreement": [_short(asdict(a)) for a in record.agreement],
        "neighbours": [[n.latent, n.relation, rounded(n.value)] for n in record.neighbours],
        "maps": [
            {
                "view": m.view,
                "rows": m.rows,
                "cols": m.cols,
                "studies": m.studies,
                "max": rounded(max(m.values, default=0.0)),
                "dense": levels(m.values, max(m.values, default=0.0)),
            }
            for m in record.maps
        ],
        "interpretations": [_interpretation(one) for one in interpretations],
        "alphabet": ALPHABET,
        "left_out": 0,
    }
    # Studies are repeated in many contexts; 400 bytes each and their images' names are set aside for them.
    room = limit - _size(page) - 2_000
    page["left_out"] = _fit(lists, room)
    page["top"], page["zero"] = lists[0], lists[-1]
    page["intervals"] = [
        {
            "low": rounded(i.low),
            "high": rounded(i.high),
            "fraction": rounded(i.fraction),
            "contexts": contexts,
        }
        for i, contexts in zip(record.intervals, lists[1:-1], strict=True)
    ]
    shown = {context["study"] for contexts in lists for context in contexts}
    page["studies"] = {name: _study(studies[name], images) for name in sorted(shown)}
    return page


def _size(plain: Any) -> int:
    # "<" is written as six characters.
    text = json.dumps(plain, separators=(",", ":"))
    return len(text) + 5 * text.count("<")


def _fit(lists: list[list[dict[str, Any]]], room: int) -> int:
    """Drop contexts from the tails until the rest fits; returns how many were dropped."""
    sizes = [[_size(context) + 400 for context in contexts] for contexts in lists]
    total, dropped = sum(map(sum, sizes)), 0
    while total > room:
        longest = max(range(len(lists)), key=lambda i: (len(lists[i]), i))
        if not lists[longest]:
            raise RecordError(
                f"A latent's numbers alone exceed its page by {total - room} bytes; expected room for contexts. "
                "Write the records with fewer findings, tokens or interpretations."
            )
        lists[longest].pop()
        total -= sizes[longest].pop()
        dropped += 1
    return dropped


def _context(context: Context, studies: dict[str, StudyInfo]) -> dict[str, Any]:
    if context.study not in studies:
        raise RecordError(
            f"A context names study {context.study!r}, which the record set's table of studies lacks; the files do "
            "not belong together. Write the records again."
        )
    heat = []
    for one in context.heat:
        top = max(one.values, default=0.0)
        plain: dict[str, Any] = {"view": one.view, "rows": one.rows, "cols": one.cols, "max": rounded(top)}
        if 4 * len(one.patches) < one.rows * one.cols:
            plain |= {"patches": list(one.patches), "sparse": levels(one.values, top)}
        else:
            full = [0.0] * (one.rows * one.cols)
            for patch, value in zip(one.patches, one.values, strict=True):
                full[patch] = value
            plain["dense"] = levels(full, top)
        heat.append(plain)
    return {
        "study": context.study,
        "value": rounded(context.value),
        "kind": context.kind,
        "peak": context.peak,
        "patch": list(context.patch) if context.patch else None,
        "tokens": _readable(context.tokens),
        "roles": _runs(context.roles),
        "values": [rounded(value) if value else value if value is None else 0 for value in context.values],
        "heat": heat,
    }


@lru_cache(4096)
def _readable(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Tokens of a study as they read; many latents show the same study."""
    return tuple(map(readable, tokens))


@lru_cache(4096)
def _runs(roles: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((role, len(list(run))) for role, run in groupby(roles))


def _study(entry: StudyInfo, images: ImageFolder | None) -> dict[str, Any]:
    """What the page shows of a study; boxes only beside their radiograph, whose crop they are moved to."""
    shown = images.add(entry) if images is not None else None
    return {
        "findings": list(entry.findings),
        "labelled_by": entry.labelled_by,
        "licence": entry.licence,
        "images": dict(shown.paths) if shown else {},
        "boxes": [[box[0], *(rounded(v) for v in box[1:])] for box in shown.boxes] if shown else [],
    }


def _interpretation(one: Interpretation) -> dict[str, Any]:
    return {
        "explanation": one.explanation,
        "explainer": one.explainer,
        "category": one.category,
        "status": one.status,
        "control_latent": one.control_latent,
        "n_train": one.n_train,
        "n_test": one.n_test,
        "scores": [_score(score) for score in one.scores],
        "control": [_score(score) for score in one.control],
    }


def _score(score: Score) -> dict[str, Any]:
    names = ("method", "judge", "asked", "answered", "unusable", "balanced_accuracy", "low", "high")
    return _short({name: getattr(score, name) for name in names})


def _short(plain: dict[str, Any]) -> dict[str, Any]:
    """Floats to three digits; counts stay exact."""
    return {key: rounded(value) if isinstance(value, float) else value for key, value in plain.items()}

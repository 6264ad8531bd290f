"""The form in which records lie on disk: what all latents share is written once.

    texts.jsonl   a study's tokens, positions, roles, which of them were read, and its views; one line a study
    a context     the study's name and what this latent does there: sparse values, sparse heat
    a mean map    float16 shares of its largest value, base64

A context whose text is not its study's, and a map that float16 does not hold exactly, are written in full, so reading
gives back what was written. It knows nothing about how records come to be.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.records import ActivationMap, Context, LatentRecord, MeanMap
from sae_lens_maira.latents.serialization import from_plain

TEXTS = "texts.jsonl"


class Text(NamedTuple):
    """What every latent's context of one study shares.

    Attributes:
        tokens, positions, roles: as in `Context`.
        silent: (tokens) 0.0 where the token's activation was read, None elsewhere.
        views: (view, rows, cols) of every image.
        special: (position, token, role) of special tokens that were read; shown where a latent peaks there.
    """

    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    roles: tuple[str, ...]
    silent: tuple[float | None, ...]
    views: tuple[tuple[str, int, int], ...]
    special: tuple[tuple[int, str, str], ...] = ()


def text_line(study: str, text: Text) -> bytes:
    """One line of `texts.jsonl`; the name comes first, so that a reader finds it without reading the rest."""
    roles = [[name, len(list(run))] for name, run in groupby(text.roles)]
    read = [int(v is not None) for v in text.silent]
    row = [study, text.tokens, text.positions, roles, read, text.views, text.special]
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


class TextReader:
    """Texts of one or more files, by the study's name; a bounded number of them stays in memory."""

    def __init__(self, *paths: Path, cached: int = 4096) -> None:
        self._paths = paths
        self._places: dict[str, tuple[int, int, int]] | None = None
        self._load = lru_cache(cached)(self._read)

    def __getitem__(self, study: str) -> Text:
        """The text of a study; raises RecordError where it is missing or damaged."""
        return self._load(study)

    def __contains__(self, study: str) -> bool:
        return study in self._index()

    def _index(self) -> dict[str, tuple[int, int, int]]:
        if self._places is None:
            self._places = {}
            for number, path in enumerate(self._paths):
                offset = 0
                try:
                    with path.open("rb") as file:
                        for line in file:
                            name = _DECODER.raw_decode(line[1:200].decode(errors="ignore"))[0]
                            self._places[name] = (number, offset, len(line))
                            offset += len(line)
                except (OSError, ValueError) as error:
                    raise _damaged(path, error) from None
        return self._places

    def _read(self, study: str) -> Text:
        place = self._index().get(study)
        if place is None:
            raise RecordError(
                f"Study {study} has no line in {', '.join(str(path) for path in self._paths)}; the record set is "
                "incomplete. Write the records again."
            )
        number, offset, length = place
        path = self._paths[number]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                name, tokens, positions, roles, read, views, special = json.loads(file.read(length))
            if name != study:
                raise ValueError(f"{name} stands where {study} was")
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
        return Text(
            tuple(tokens),
            tuple(positions),
            tuple(role for role, n in roles for _ in range(n)),
            tuple(0.0 if was else None for was in read),
            tuple((view, rows, cols) for view, rows, cols in views),
            tuple((position, token, role) for position, token, role in special),
        )


class Packer:
    """Packs records for one folder and writes the texts they need to its `texts.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / TEXTS).open("wb")
        self._known: dict[str, int] = {}

    def close(self) -> None:
        """Finish the file of texts."""
        self._file.close()

    def record(self, record: LatentRecord) -> dict[str, Any]:
        """A record as it is written."""
        intervals = [
            vars(i) | {"contexts": [self.context(context) for context in i.contexts]}
            for i in record.intervals
        ]
        return vars(record) | {
            "maps": [pack_map(mean) for mean in record.maps],
            "top": [self.context(context) for context in record.top],
            "intervals": intervals,
            "zero": [self.context(context) for context in record.zero],
        }

    def context(self, context: Context) -> dict[str, Any]:
        """A context as it is written."""
        text = Text(
            context.tokens,
            context.positions,
            context.roles,
            tuple(None if v is None else 0.0 for v in context.values),
            tuple((heat.view, heat.rows, heat.cols) for heat in context.heat),
        )
        digest = hash(text)
        known = self._known.get(context.study)
        if known is None:
            self._file.write(text_line(context.study, text))
            self._known[context.study] = digest
        elif known != digest:
            return vars(context)
        at = [i for i, v in enumerate(context.values) if v]
        return {
            "study": context.study,
            "value": context.value,
            "kind": context.kind,
            "peak": context.peak,
            "patch": context.patch,
            "at": at,
            "values": [context.values[i] for i in at],
            "heat": [[heat.patches, heat.values] for heat in context.heat],
        }


def unpack_record(plain: dict[str, Any], texts: TextReader) -> LatentRecord:
    """The record that `Packer.record` packed.

    Raises:
        RecordError: a field is missing or unknown, or a text is.
    """
    try:
        contexts = {name: tuple(_context(c, texts) for c in plain[name]) for name in ("top", "zero")}
        inside = [tuple(_context(c, texts) for c in i["contexts"]) for i in plain["intervals"]]
        intervals = [i | {"contexts": ()} for i in plain["intervals"]]
        maps = tuple(_map(mean) for mean in plain["maps"])
        record = from_plain(LatentRecord, plain | {"top": (), "zero": (), "maps": (), "intervals": intervals})
    except (KeyError, TypeError, IndexError) as error:
        raise RecordError(
            f"A latent record is incomplete or of another version ({error!r}); write the records again."
        ) from None
    # The instances are fresh, so filling them in place saves a copy of each.
    for interval, own in zip(record.intervals, inside, strict=True):
        object.__setattr__(interval, "contexts", own)
    for name, value in (*contexts.items(), ("maps", maps)):
        object.__setattr__(record, name, value)
    return record


def _context(plain: dict[str, Any], texts: TextReader) -> Context:
    if "tokens" in plain:
        return from_plain(Context, plain)
    text = texts[plain["study"]]
    values = list(text.silent)
    for i, value in zip(plain["at"], plain["values"], strict=True):
        values[i] = value
    patch = plain["patch"]
    return Context(
        study=plain["study"],
        value=plain["value"],
        kind=plain["kind"],
        peak=plain["peak"],
        patch=None if patch is None else (patch[0], patch[1], patch[2]),
        tokens=text.tokens,
        positions=text.positions,
        roles=text.roles,
        values=tuple(values),
        heat=tuple(
            ActivationMap(*view, tuple(patches), tuple(heat))
            for view, (patches, heat) in zip(text.views, plain["heat"], strict=True)
        ),
    )


def half_precision(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """Values >= 0 as a packed map holds them: float16 shares of the largest."""
    array = np.asarray(values, dtype=np.float64)
    peak = float(f"{array.max():.6g}") if array.size else 0.0
    return _from_half((array / peak).astype("<f2"), peak) if peak > 0 else (0.0,) * array.size


def pack_map(mean: MeanMap) -> dict[str, Any]:
    """A mean map as it is written."""
    peak = max(mean.values, default=0.0)
    if peak > 0:
        half = (np.asarray(mean.values) / peak).astype("<f2")
        if _from_half(half, peak) == mean.values:
            own = {name: value for name, value in vars(mean).items() if name != "values"}
            return own | {"peak": peak, "float16": base64.b64encode(half.tobytes()).decode()}
    return vars(mean)


def _map(plain: dict[str, Any]) -> MeanMap:
    if "float16" not in plain:
        return from_plain(MeanMap, plain)
    half = np.frombuffer(base64.b64decode(plain["float16"]), dtype="<f2")
    own = {name: value for name, value in plain.items() if name not in ("peak", "float16")}
    return MeanMap(**own, values=_from_half(half, plain["peak"]))


def _from_half(half: np.ndarray, peak: float) -> tuple[float, ...]:
    return tuple((half.astype(np.float64) * peak).tolist())


def _damaged(path: Path, error: Exception) -> RecordError:
    return RecordError(
        f"{path} cannot be read ({error}); the record set is incomplete or damaged. Write it again."
    )


_DECODER = json.JSONDecoder()

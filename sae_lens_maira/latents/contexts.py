"""Contexts of latents, the text of their studies, and records as JSON.

    place >= 0: index of the shown token;    place < 0: patch -1 - place, over all views in order
    pseudonym = first 16 hex digits of SHA-256(salt, kind, id)
    from_plain(kind, to_plain(record)) == record              any dataclass of numbers, strings and tuples
    record_from_plain(record_to_plain(record), texts) == record

Text is stored once per study, as one line of `texts.jsonl`; contexts refer to it by the study's pseudonym. A missing or
unknown field is an error, since it means another version or a truncated file. Credentialed studies never appear under
their own ids. Public and synthetic studies keep their ids, so that records can be traced to them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, is_dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.records import Context, Interval, LatentRecord, MeanMap, StudyText
from sae_lens_maira.privacy import is_shareable
from sae_lens_maira.token_roles import VIEWS, TokenRole

if TYPE_CHECKING:
    from sae_lens_maira.activations import ActivationRows
    from sae_lens_maira.maira2 import Maira2Processor
    from sae_lens_maira.studies import Study

T = TypeVar("T")


class Pseudonyms:
    """Pseudonyms of studies and patients. Without a given salt, a random one is used and not stored."""

    def __init__(self, salt: str | None = None) -> None:
        self._salt = secrets.token_hex(16) if salt is None else salt

    def study(self, study: Study) -> str:
        return self._name(study, "study", study.study_id)

    def patient(self, study: Study) -> str:
        return self._name(study, "patient", study.patient_id)

    def _name(self, study: Study, kind: str, original: str) -> str:
        if is_shareable(study.licence):
            return original
        return hashlib.sha256(f"{self._salt}\0{kind}\0{original}".encode()).hexdigest()[:16]


SHOWN = (
    TokenRole.INDICATION,
    TokenRole.TECHNIQUE,
    TokenRole.COMPARISON,
    TokenRole.PRIOR_REPORT,
    TokenRole.PHRASE,
    TokenRole.REPORT,
)
"""Roles whose tokens a context always shows; tokens of other roles are shown if their activations were read."""


def study_text(
    processor: Maira2Processor, study: Study, rows: ActivationRows, grid: tuple[int, int], name: str
) -> StudyText:
    """Make the text of a study for its contexts, checked against the tokens that were read.

    Images are not opened.

    Args:
        processor: Processor of the model.
        study: Study with its report.
        rows: Activation rows of the study.
        grid: Rows and columns of patches.
        name: Pseudonym of the study.

    Raises:
        RecordError: The rows were read from another text.
    """
    from sae_lens_maira.maira2.reports import teacher_text
    from sae_lens_maira.maira2.tokenization import append_reports, tokenize_prompts

    tokenizer = processor.tokenizer
    prompt = processor.build_prompt(study)
    (row,) = append_reports(
        tokenizer,
        tokenize_prompts(tokenizer, [prompt], processor.image_token_id, processor.patches_per_side),
        [teacher_text(study, "findings", None)],
    )
    at, token = rows.position[~rows.is_image], rows.token[~rows.is_image]
    fits = (at < len(row.input_ids)) & (row.input_ids[np.minimum(at, len(row.input_ids) - 1)] == token)
    if not fits.all():
        raise RecordError(
            f"The rows of study {name} come from another text than the study has now: {int((~fits).sum())} of "
            f"{len(at)} tokens differ, the first at position {int(at[~fits][0])}. Give the table that was harvested, "
            "or harvest it again."
        )
    read = np.zeros(len(row.input_ids), dtype=bool)
    read[at] = True
    special = np.isin(row.input_ids, tokenizer.all_special_ids)
    positions = np.flatnonzero((np.isin(row.roles, [int(role) for role in SHOWN]) & ~special) | read)
    present = (study.frontal, study.lateral, study.prior_frontal)
    plain = np.flatnonzero(~special[positions])
    return StudyText(
        study=name,
        tokens=tuple(spell(t) for t in tokenizer.convert_ids_to_tokens(row.input_ids[positions].tolist())),
        positions=tuple(positions.tolist()),
        roles=tuple(TokenRole(int(role)).name.lower() for role in row.roles[positions]),
        read=tuple(read[positions].tolist()),
        span=(int(plain[0]), int(plain[-1]) + 1) if len(plain) else (0, len(positions)),
        views=tuple((view, *grid) for view, image in zip(VIEWS, present, strict=True) if image is not None),
    )


def spell(token: str) -> str:
    """Convert a SentencePiece token to readable text: the word mark to a space, an ASCII byte to its character."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        code = int(token[3:5], 16)
        return chr(code) if code < 128 else token
    return token.replace("\u2581", " ")


def short(value: float) -> float:
    """Round to six significant digits, which takes half the space of exact float32 decimals."""
    return float(f"{value:.6g}")


def places_of(rows: ActivationRows, text: StudyText, grid: tuple[int, int]) -> np.ndarray:
    """(n,) place of each row of a study, as defined in the module docstring."""
    number = np.searchsorted(np.asarray(text.positions, dtype=np.int64), rows.position)
    patch = rows.view.astype(np.int64) * grid[0] * grid[1] + rows.patch_row.astype(np.int64) * grid[1]
    return np.where(rows.is_image, -1 - patch - rows.patch_col, number)


def make_context(
    texts: Mapping[str, StudyText], study: str, place: np.ndarray, value: np.ndarray, modality: str = "text"
) -> Context:
    """Make the context of one latent in one study.

    The shown span is the whole text without special tokens at its ends, unless the latent fires at them.

    Args:
        texts: Source of the study's text.
        study: Pseudonym of the study.
        place: (n,) places of the latent's activations, in any order.
        value: (n,) activations there, above zero.
        modality: Modality to set if there are no activations.
    """
    text = texts[study]
    order = np.argsort(place, kind="stable")
    place, value = np.asarray(place)[order], np.asarray(value)[order]
    if len(value):
        modality = "image" if place[value.argmax()] < 0 else "text"
    first = int(np.searchsorted(place, 0))
    indices, number, strength = tuple(place[first:].tolist()), -1 - place[:first][::-1], value[:first][::-1]
    patches = []
    for view, rows, cols in text.views:
        low = VIEWS.index(view) * rows * cols
        here = slice(*np.searchsorted(number, [low, low + rows * cols]))
        patches.append(
            (tuple((number[here] - low).tolist()), tuple(short(v) for v in strength[here].tolist()))
        )
    start, end = text.span
    return Context(
        study=study,
        start=min((start, *indices[:1])),
        end=max((end, *(i + 1 for i in indices[-1:]))),
        modality=modality,
        token_indices=indices,
        token_values=tuple(short(v) for v in value[first:].tolist()),
        patches=tuple(patches),
        texts=texts,
    )


def to_plain(record: Any) -> dict[str, Any]:
    """Convert a record to dicts, lists, numbers and strings for `json.dumps(..., allow_nan=False)`."""
    return asdict(record)


def from_plain(kind: type[T], plain: dict[str, Any]) -> T:
    """Convert the result of `to_plain` back to the record.

    Raises:
        RecordError: A field is missing or unknown.
    """
    builders = _builders(kind)
    if not plain.keys() <= builders.keys():
        raise RecordError(
            f"{kind.__name__} has no field {sorted(set(plain) - set(builders))}; the records were written by another "
            "version. Write them again with this one."
        )
    try:
        return kind(
            **{
                name: value if value is None or (build := builders[name]) is None else build(value)
                for name, value in plain.items()
            }
        )
    except TypeError as error:
        raise RecordError(
            f"A {kind.__name__} is incomplete ({error}); the file was cut off or written by another version. "
            "Write the records again."
        ) from None


@cache
def _builders(kind: type) -> dict[str, Callable[[Any], Any] | None]:
    """Field -> function from the JSON value to the field's value; None if they are equal."""
    return {name: _builder(hint) for name, hint in typing.get_type_hints(kind).items()}


def _builder(hint: Any) -> Callable[[Any], Any] | None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return _builder(next(a for a in args if a is not type(None)))
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            inner = _builder(args[0])
            return tuple if inner is None else lambda value: tuple(inner(v) for v in value)
        each = [_builder(a) for a in args]
        if not any(each):
            return tuple
        return lambda value: tuple(v if b is None else b(v) for b, v in zip(each, value, strict=True))
    if is_dataclass(hint) and isinstance(hint, type):
        return lambda value: from_plain(hint, value)
    return None


# Study texts and contexts are JSON lists, since a record set contains up to a million of them.

TEXTS = "texts.jsonl"


def text_line(text: StudyText) -> bytes:
    """Make one line of `texts.jsonl`. The study comes first, so that the index is built without parsing the rest."""
    roles = [[name, len(list(run))] for name, run in groupby(text.roles)]
    read = [int(was) for was in text.read]
    row = [text.study, text.tokens, text.positions, roles, read, text.span, text.views]
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


class StudyTexts(Mapping[str, StudyText]):
    """Texts of studies from one or more files of `text_line`s; a bounded number of texts is kept in memory."""

    def __init__(self, *paths: Path, cached: int = 4096) -> None:
        self._paths = paths
        self._load = lru_cache(cached)(self._read)

    def __getitem__(self, study: str) -> StudyText:
        """Read the text of a study. Raises RecordError if it is missing or damaged."""
        return self._load(study)

    def __contains__(self, study: object) -> bool:
        return study in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def _places(self) -> dict[str, tuple[Path, int, int]]:
        """Study -> (file, offset, length) of its line."""
        places: dict[str, tuple[Path, int, int]] = {}
        for path in self._paths:
            offset = 0
            try:
                with path.open("rb") as file:
                    for line in file:
                        study = _DECODER.raw_decode(line[1:200].decode(errors="ignore"))[0]
                        places[study] = (path, offset, len(line))
                        offset += len(line)
            except (OSError, ValueError) as error:
                raise _damaged(path, error) from None
        return places

    def _read(self, study: str) -> StudyText:
        if study not in self._places:
            names = ", ".join(str(path) for path in self._paths)
            raise RecordError(
                f"Study {study} has no line in {names}; the record set is incomplete. Write the records again."
            )
        path, offset, length = self._places[study]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                line = file.read(length).decode("utf-8", "surrogatepass")
            name, tokens, positions, roles, read, span, views = json.loads(line)
            if name != study:
                raise ValueError(f"the line of {study} contains {name}")
            return StudyText(
                study,
                tuple(tokens),
                tuple(positions),
                tuple(role for role, n in roles for _ in range(n)),
                tuple(map(bool, read)),
                (span[0], span[1]),
                tuple((view, rows, cols) for view, rows, cols in views),
            )
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(path, error) from None


def record_to_plain(record: LatentRecord) -> dict[str, Any]:
    """Convert a record to the content of its line: contexts as lists, without mean maps, which have their own file."""
    intervals = [
        {"low": i.low, "high": i.high, "fraction": i.fraction, "contexts": [_row(c) for c in i.contexts]}
        for i in record.intervals
    ]
    plain = {name: value for name, value in vars(record).items() if name != "maps"}
    return plain | {
        "top": [_row(context) for context in record.top],
        "intervals": intervals,
        "zero": [_row(context) for context in record.zero],
    }


def record_from_plain(
    plain: dict[str, Any], texts: Mapping[str, StudyText], maps: tuple[MeanMap, ...] = ()
) -> LatentRecord:
    """Convert the result of `record_to_plain` back to the record.

    Args:
        plain: Parsed line.
        texts: Source of the contexts' texts.
        maps: Mean maps of the latent.

    Raises:
        RecordError: A field is missing or unknown.
    """
    try:
        top, zero = ([_context(row, texts) for row in plain[name]] for name in ("top", "zero"))
        inside = [[_context(row, texts) for row in i["contexts"]] for i in plain["intervals"]]
        intervals = [
            Interval(i["low"], i["high"], i["fraction"], tuple(contexts))
            for i, contexts in zip(plain["intervals"], inside, strict=True)
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RecordError(
            f"A latent record is incomplete or of another version ({error!r}); write the records again."
        ) from None
    record = from_plain(LatentRecord, plain | {"top": (), "zero": (), "intervals": (), "maps": ()})
    return replace(record, top=tuple(top), zero=tuple(zero), intervals=tuple(intervals), maps=maps)


def _row(context: Context) -> list[Any]:
    return [
        context.study,
        context.start,
        context.end,
        context.modality,
        context.token_indices,
        context.token_values,
        context.patches,
    ]


def _context(row: list[Any], texts: Mapping[str, StudyText]) -> Context:
    study, start, end, modality, indices, values, patches = row
    return Context(
        study,
        start,
        end,
        modality,
        tuple(indices),
        tuple(values),
        tuple((tuple(where), tuple(strength)) for where, strength in patches),
        texts,
    )


def _damaged(path: Path, error: Exception) -> RecordError:
    return RecordError(
        f"{path} cannot be read ({error}); the record set is incomplete or damaged. Write the records again."
    )


_DECODER = json.JSONDecoder()

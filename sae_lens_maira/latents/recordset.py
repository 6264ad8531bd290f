"""A set of latent records on disk: written once, read by number without loading the rest.

    meta.json            what the records were made from; written last, so a folder without it is unfinished
    latents.parquet      one row of numbers per latent, and where its record begins
    records-00000.jsonl  256 records a file, one a line, packed
    texts.jsonl          what all contexts of one study share: its tokens and views
    studies.jsonl        the studies that contexts point to, under pseudonyms

Interpretations may lie beside them in `interpretations.jsonl`; they are left alone here. It knows nothing about
models, SAEs or how a record came to be.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import pandas as pd
import pyarrow as pa

from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.packing import TEXTS, Packer, TextReader, unpack_record
from sae_lens_maira.latents.records import (
    MODALITIES,
    LatentRecord,
    RecordsMeta,
    StudyInfo,
)
from sae_lens_maira.latents.serialization import from_plain

META, TABLE, STUDIES = "meta.json", "latents.parquet", "studies.jsonl"
LATENTS_PER_FILE = 256

T = TypeVar("T")


class RecordSet:
    """Records of one SAE at one hook point, opened with `RecordSet.open(folder)`.

    `records[latent]` reads one record, `records.stream()` reads all in order of number, `len(records)` counts them.

    Attributes:
        folder: where they lie.
        meta: what they were made from.
        table: one row per latent: number, level, status, density, max, then per kind of position the columns of
            `Firing` and the finding of highest F1; `file`, `offset` and `length` say where the record is.
    """

    def __init__(self, folder: Path, meta: RecordsMeta, table: pd.DataFrame) -> None:
        self.folder, self.meta, self.table = folder, meta, table
        self._row = {int(latent): i for i, latent in enumerate(table["latent"])}
        self._texts = TextReader(folder / TEXTS)

    @classmethod
    def open(cls, folder: Path | str) -> RecordSet:
        """Open a folder that `write_records` made.

        Raises:
            RecordError: the folder holds no records, or they are unfinished, damaged or of another version.
        """
        folder = Path(folder)
        if not (folder / META).is_file():
            raise RecordError(
                f"{folder} has no {META}: it holds no latent records, or writing them was interrupted. Give the "
                "folder that `sae-lens-maira latents --out` wrote, or run that command again."
            )
        meta = _parsed(RecordsMeta, (folder / META).read_bytes(), folder / META)
        try:
            table = pd.read_parquet(folder / TABLE)
        except (OSError, pa.ArrowException) as error:
            raise RecordError(
                f"{folder / TABLE} cannot be read ({error}); the records are incomplete or damaged. Write them again."
            ) from error
        missing = {"latent", "file", "offset", "length"} - set(table.columns)
        if missing:
            raise RecordError(
                f"{folder / TABLE} lacks the columns {sorted(missing)}; it was written by another version. Write the "
                "records again with this one."
            )
        return cls(folder, meta, table)

    @cached_property
    def studies(self) -> dict[str, StudyInfo]:
        """The studies by pseudonym; raises RecordError where the file is missing or damaged."""
        path = self.folder / STUDIES
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise RecordError(
                f"{path} cannot be read ({error.strerror}); the record set is incomplete. Write the records again."
            ) from None
        entries = [_parsed(StudyInfo, line, path) for line in lines if line]
        return {entry.study: entry for entry in entries}

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, latent: object) -> bool:
        return latent in self._row

    def __iter__(self) -> Iterator[LatentRecord]:
        return self.stream()

    def __getitem__(self, latent: int) -> LatentRecord:
        """The record of one latent; raises RecordError where there is none or it is damaged."""
        if latent not in self._row:
            numbers = self.table["latent"]
            span = f"{numbers.min()} to {numbers.max()}" if len(self) else "none"
            raise RecordError(
                f"Latent {latent} was asked of a record set with {len(self)} latents ({span}). Ask for one of those, "
                "or write records that include it."
            )
        row = self.table.iloc[self._row[latent]]
        path = self.folder / str(row["file"])
        with _opened(path) as file:
            file.seek(int(row["offset"]))
            line = file.read(int(row["length"]))
        return self._checked(line, latent, path)

    def stream(self) -> Iterator[LatentRecord]:
        """All records in order of number, one in memory at a time.

        Raises:
            RecordError: a file is missing, cut off or damaged.
        """
        for name, group in self.table.groupby("file", sort=True):
            path = self.folder / str(name)
            with _opened(path) as file:
                for latent, length in zip(group["latent"], group["length"], strict=True):
                    yield self._checked(file.read(int(length)), int(latent), path)

    def _checked(self, line: bytes, latent: int, path: Path) -> LatentRecord:
        record = unpack_record(_plain(line, path, LatentRecord), self._texts)
        if record.latent != latent:
            raise RecordError(
                f"{path} holds latent {record.latent} where {TABLE} places latent {latent}; the files belong to "
                "different record sets. Write the records again."
            )
        return record


def write_records(
    folder: Path | str,
    meta: RecordsMeta,
    studies: Iterable[StudyInfo],
    records: Iterable[LatentRecord],
) -> RecordSet:
    """Write a record set; nothing of it can be seen half-written.

    Files are completed in a hidden folder and moved into place, the old `meta.json` first removed and the new one
    moved last. Other files of the folder (images, interpretations) stay.

    Args:
        folder: made if missing.
        meta: what the records were made from.
        studies: the studies that contexts point to, each once.
        records: in ascending order of number; read one at a time.

    Raises:
        RecordError: records are out of order, a study comes twice, or a number is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        seen: set[str] = set()
        with (scratch / STUDIES).open("wb") as file:
            for entry in studies:
                if entry.study in seen:
                    raise RecordError(
                        f"Study {entry.study} was given twice; a record set names every study once. Remove the double."
                    )
                seen.add(entry.study)
                file.write(_line(entry))
        _write_lines(scratch, records).to_parquet(scratch / TABLE, index=False)
        (scratch / META).write_bytes(_line(meta))
        (folder / META).unlink(missing_ok=True)
        for old in folder.glob("records-*.jsonl"):
            old.unlink()
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == META):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return RecordSet.open(folder)


def _write_lines(scratch: Path, records: Iterable[LatentRecord]) -> pd.DataFrame:
    """Write the record files and return the table."""
    rows: list[dict[str, Any]] = []
    file: IO[bytes] | None = None
    packer = Packer(scratch)
    try:
        for number, record in enumerate(records):
            if rows and record.latent <= rows[-1]["latent"]:
                raise RecordError(
                    f"Latent {record.latent} follows latent {rows[-1]['latent']}; records are written in ascending "
                    "order, each latent once. Sort them first."
                )
            name = f"records-{number // LATENTS_PER_FILE:05d}.jsonl"
            if number % LATENTS_PER_FILE == 0:
                if file is not None:
                    file.close()
                file = (scratch / name).open("wb")
            assert file is not None
            line = _line(packer.record(record))
            rows.append(_table_row(record) | {"file": name, "offset": file.tell(), "length": len(line)})
            file.write(line)
    finally:
        packer.close()
        if file is not None:
            file.close()
    columns = None if rows else ["latent", "level", "status", "density", "max", "file", "offset", "length"]
    return pd.DataFrame(rows, columns=columns)


def _table_row(record: LatentRecord) -> dict[str, Any]:
    row: dict[str, Any] = {
        "latent": record.latent,
        "level": record.level,
        "status": record.status,
        "density": record.density,
        "max": record.max,
    }
    firing = {f.kind: f for f in record.firing}
    for kind in MODALITIES:
        f = firing.get(kind)
        for name in ("rows", "fired", "studies", "studies_fired", "density", "mean", "max", "p99"):
            row[f"{name}_{kind}"] = None if f is None else getattr(f, name)
        best = max((a for a in record.agreement if a.kind == kind), key=lambda a: a.f1, default=None)
        row[f"finding_{kind}"] = None if best is None else best.finding
        row[f"f1_{kind}"] = float("nan") if best is None else best.f1
    return row


def _line(record: Any) -> bytes:
    try:
        # `vars` of a dataclass is what `to_plain` gives, without copying every number of it.
        text = json.dumps(record, default=vars, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError as error:
        name = "LatentRecord" if isinstance(record, dict) else type(record).__name__
        raise RecordError(
            f"A {name} holds a number that is not finite ({error}); records hold finite numbers only. "
            "Look for an activation or a weight that overflowed."
        ) from None
    return text.encode() + b"\n"


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read ({error.strerror}); the record set is incomplete. Write the records again."
        ) from None


def _parsed(kind: type[T], line: bytes, path: Path) -> T:
    return from_plain(kind, _plain(line, path, kind))


def _plain(line: bytes, path: Path, kind: type) -> dict[str, Any]:
    try:
        plain = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise RecordError(
            f"{path} is cut off or damaged: a {kind.__name__} of {len(line)} bytes is no JSON. Write the records again."
        ) from None
    if not isinstance(plain, dict):
        raise RecordError(
            f"{path} holds a {type(plain).__name__} where a {kind.__name__} was expected; it is damaged. Write the "
            "records again."
        )
    return plain

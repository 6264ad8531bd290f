"""Write a record set atomically, with a hash of every file.

Files are written to a hidden folder and then moved into place. `meta.json` contains the SHA-256 of all other files and
is moved last, so that a partly written folder is never read.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from sae_lens_maira.checksums import with_checksum
from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import atomic_folder, sha256_of
from sae_lens_maira.latents.contexts import TEXTS, record_to_plain, text_line
from sae_lens_maira.latents.maps import MapSums, write_maps
from sae_lens_maira.latents.records import MODALITIES, LatentRecord, RecordsMeta, StudyInfo, StudyText
from sae_lens_maira.latents.recordset import FORMAT, META, STUDIES, TABLE, RecordSet, maps_name
from sae_lens_maira.privacy import private_files

LATENTS_PER_FILE = 256
DERIVED = ("interpretations.jsonl", "journal.jsonl")
"""Files that are made from a record set and stored in its folder."""


def write_records(
    folder: Path | str,
    meta: RecordsMeta,
    studies: Iterable[StudyInfo],
    texts: Iterable[StudyText],
    records: Iterable[LatentRecord],
    map_sums: MapSums | None = None,
) -> RecordSet:
    """Write a record set atomically.

    Files are completed in a hidden folder and moved into place, `meta.json` last. Files left by a killed process are
    replaced. Files contain text of reports: only their owner can read them, unless you share the folder.

    An existing record set is moved, with its interpretations, journal and images, to `replaced-<fingerprint>`, and a
    warning names that folder. If the new set is the same, its interpretations and journal are kept.

    Args:
        folder: Output folder; created if missing.
        meta: Origin of the records.
        studies: Studies that contexts refer to, each once.
        texts: Text of each of these studies.
        records: Records in ascending order of latents; read one at a time.
        map_sums: Source of the mean maps per finding.

    Raises:
        RecordError: Records are out of order, a study occurs twice, a context does not match its study's text, or a
            number is not finite.
    """
    folder = Path(folder)
    with private_files(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replaced = _move_away(folder)
        try:
            _write(folder, meta, studies, texts, records, map_sums)
        except BaseException:
            _put_back(replaced, folder)
            raise
    made = RecordSet.open(folder)
    same = folder / _name_of_replaced(made.fingerprint)  # moved in this call, or by a process that was killed
    if same.is_dir():
        _put_back(same, folder, only=DERIVED)
    if replaced is not None and replaced.exists():
        warnings.warn(
            f"{folder} contained another record set. It is now in {replaced}, with the interpretations, journal and "
            "images that belong to it.",
            stacklevel=2,
        )
    return made


def _write(
    folder: Path,
    meta: RecordsMeta,
    studies: Iterable[StudyInfo],
    texts: Iterable[StudyText],
    records: Iterable[LatentRecord],
    map_sums: MapSums | None,
) -> None:
    staged = folder / ".written"
    with atomic_folder(staged, "replace") as scratch:
        _write_once(scratch / STUDIES, ((entry.study, _line(entry)) for entry in studies))
        sizes: dict[str, tuple[int, int]] = {}
        _write_once(scratch / TEXTS, _text_lines(texts, sizes))
        _write_lines(scratch, records, sizes, map_sums).to_parquet(scratch / TABLE, index=False)
        files = {path.name: sha256_of(path) for path in sorted(scratch.iterdir())}
        content = {"format": FORMAT} | vars(meta) | {"files": files}
        (scratch / META).write_bytes(_line(with_checksum(content)))
    for path in sorted(staged.iterdir(), key=lambda path: path.name == META):
        os.replace(path, folder / path.name)
    staged.rmdir()


def _move_away(folder: Path) -> Path | None:
    """Move a record set, and the files made from it, to a separate folder; return None if there is nothing to move.

    A set without `meta.json` and without files made from it was left by a killed process, and is removed.
    """
    derived = [path for pattern in DERIVED for path in sorted(folder.glob(pattern))]
    patterns = (TABLE, STUDIES, TEXTS, "images", "records-*.jsonl", "maps-*.npz", META)
    there = [*derived, *(path for pattern in patterns for path in sorted(folder.glob(pattern)))]
    if not there:
        return None
    complete = (folder / META).is_file()
    if not complete and not derived:
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None
    base = _name_of_replaced(sha256_of(folder / META)) if complete else "replaced-incomplete"
    replaced, number = folder / base, 1
    while any((replaced / path.name).exists() for path in there):
        number += 1
        replaced = folder / f"{base}.{number}"
    replaced.mkdir(exist_ok=True)
    for (
        path
    ) in there:  # META is moved last: without it the other files would count as left by a killed process
        path.replace(replaced / path.name)
    return replaced


def _put_back(replaced: Path | None, folder: Path, only: Sequence[str] | None = None) -> None:
    """Move missing files back to the folder, and delete the others."""
    if replaced is None:
        return
    for path in sorted(replaced.iterdir(), key=lambda path: path.name == META):
        target = folder / path.name
        if only is None or (path.name in only and not target.exists()):
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    shutil.rmtree(replaced)


def _name_of_replaced(fingerprint: str) -> str:
    return f"replaced-{fingerprint[:12]}"


def _write_once(path: Path, lines: Iterable[tuple[str, bytes]]) -> None:
    """Write lines, one per study."""
    seen: set[str] = set()
    with path.open("wb") as file:
        for study, line in lines:
            if study in seen:
                raise RecordError(
                    f"Study {study} was given twice; a record set names every study once. Remove the duplicate."
                )
            seen.add(study)
            file.write(line)


def _text_lines(texts: Iterable[StudyText], sizes: dict[str, tuple[int, int]]) -> Iterator[tuple[str, bytes]]:
    """Yield lines of texts; store the number of tokens and views of each study in `sizes`."""
    for text in texts:
        sizes[text.study] = len(text.tokens), len(text.views)
        yield text.study, text_line(text)


def _check_contexts(record: LatentRecord, sizes: dict[str, tuple[int, int]]) -> None:
    for context in (*record.top, *(c for i in record.intervals for c in i.contexts), *record.zero):
        tokens, views = sizes.get(context.study, (-1, -1))
        indices = context.token_indices
        fits = 0 <= context.start <= context.end <= tokens and len(context.patches) == views
        if not fits or any(not context.start <= i < context.end for i in indices):
            raise RecordError(
                f"A context of latent {record.latent} does not fit the text of study {context.study}, which has "
                f"{max(tokens, 0)} tokens and {max(views, 0)} images. Give the text that the context was made from."
            )


def _write_lines(
    scratch: Path,
    records: Iterable[LatentRecord],
    sizes: dict[str, tuple[int, int]],
    map_sums: MapSums | None,
) -> pd.DataFrame:
    """Write the record and map files and return the table."""
    rows: list[dict[str, Any]] = []
    for number, part in groupby(enumerate(records), lambda pair: pair[0] // LATENTS_PER_FILE):
        name = f"records-{number:05d}.jsonl"
        latents, maps = [], []
        with (scratch / name).open("wb") as file:
            for _, record in part:
                if rows and record.latent <= rows[-1]["latent"]:
                    raise RecordError(
                        f"Latent {record.latent} follows latent {rows[-1]['latent']}; records are written in "
                        "ascending order, each latent once. Sort them first."
                    )
                _check_contexts(record, sizes)
                line = _line(record_to_plain(record))
                place = {"file": name, "offset": file.tell(), "length": len(line)}
                rows.append(_table_row(record) | place)
                file.write(line)
                latents.append(record.latent)
                maps.append(record.maps)
        write_maps(scratch / maps_name(name), latents, maps, map_sums)
    columns = ["latent", "level", "status", "density", "max", "p99", "file", "offset", "length"]
    return pd.DataFrame(rows, columns=None if rows else columns)


def _table_row(record: LatentRecord) -> dict[str, Any]:
    row: dict[str, Any] = {
        "latent": record.latent,
        "level": record.level,
        "status": record.status,
        "density": record.density,
        "max": record.max,
        "p99": record.p99,
    }
    firing = {f.modality: f for f in record.firing}
    for modality in MODALITIES:
        f = firing.get(modality)
        for name in ("rows", "fired", "studies", "studies_fired", "density", "mean", "max", "p99"):
            row[f"{name}_{modality}"] = None if f is None else getattr(f, name)
        best = max((a for a in record.agreement if a.modality == modality), key=lambda a: a.f1, default=None)
        row[f"finding_{modality}"] = None if best is None else best.finding
        row[f"f1_{modality}"] = float("nan") if best is None else best.f1
    return row


def _line(record: Any) -> bytes:
    try:
        # `vars` of a dataclass equals `to_plain`, without a copy of every number.
        text = json.dumps(record, default=vars, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError as error:
        name = "LatentRecord" if isinstance(record, dict) else type(record).__name__
        raise RecordError(
            f"A {name} contains a number that is not finite ({error}); records contain finite numbers only. "
            "Check for an activation or a weight that overflowed."
        ) from None
    return text.encode() + b"\n"

"""The two passes over the rows of a collection; see `workdir` for the scratch folder.

    pass 1   rows -> statistics of all latents                        saved every `save_seconds` and at the end
    pass 2   rows of the selected studies -> activations of the latents with contexts there, and the studies' texts

A process reads units rank, rank + world, ... After a kill it repeats at most the work since its last save.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.activations.prefetch import prefetch
from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import atomic_file
from sae_lens_maira.latents.contexts import TEXTS, Pseudonyms, places_of, study_text, text_line
from sae_lens_maira.latents.source import ActivationSource, active_entries, encode_sparse, rows_of_studies
from sae_lens_maira.latents.statistics import LatentStatistics
from sae_lens_maira.latents.workdir import Workdir
from sae_lens_maira.maira2 import Maira2Processor
from sae_lens_maira.studies import Study


def fingerprint_of_ids(ids: list[str]) -> str:
    """SHA-256 of a list of ids."""
    return hashlib.sha256("\0".join(ids).encode()).hexdigest()


def count(
    blocks: ActivationSource,
    n_studies: int,
    sae: SAE[Any],
    make: Callable[[], LatentStatistics],
    place: Workdir,
    chunk: int,
    save_seconds: float,
    progress: bool,
) -> tuple[LatentStatistics, str]:
    """Run pass 1 of this process; return the statistics of all processes together, and the hook point of the rows.

    Raises:
        RecordError: Rows do not match the studies or the SAE, or there are none.
    """
    own, path = make(), place.counted(place.rank)
    following, hook_name = place.rank, ""
    if path.exists():
        saved = _load_counted(path)
        own.restore(saved["statistics"])
        following, hook_name = saved["next"], saved["hook_name"]
    at = began = time.monotonic()
    units = range(following, len(blocks), place.world)
    shown = tqdm(units, desc="statistics", unit="unit", disable=not progress)
    for unit, block in _encoded(blocks, shown, sae, chunk):
        if block is not None:
            rows, acts = block
            if len(rows) and rows.study.max() >= n_studies:
                raise RecordError(
                    f"Rows refer to study {rows.study.max()}, but {n_studies} studies were given; blocks number "
                    "studies as in that sequence. Give the same studies to both."
                )
            hook_name = rows.hook_name
            own.update(rows, acts)
        elif time.monotonic() - at >= save_seconds:
            _save_counted(place, own, unit + place.world, hook_name)
            at = time.monotonic()
    if not place.finished("counted"):
        if place.world > 1 or time.monotonic() - began >= save_seconds:
            _save_counted(place, own, len(blocks), hook_name)
        place.finish("counted")
    place.ranks.barrier("statistics of latents")
    for rank in range(place.world):
        if rank != place.rank:
            other, saved = make(), _load_counted(place.counted(rank))
            other.restore(saved["statistics"])
            own.add(other)
            hook_name = hook_name or saved["hook_name"]
    if not own.n_studies:
        raise RecordError(
            "The blocks contain no rows, so there is nothing to record; give studies with reports."
        )
    return own, hook_name


def _encoded(
    blocks: ActivationSource, units: Iterable[int], sae: SAE[Any], chunk: int
) -> Iterator[tuple[int, tuple[ActivationRows, torch.Tensor] | None]]:
    """Read and encode in a thread, at most three blocks ahead, while the caller counts.

    Yields:
        Unit, its rows without their values, and activations (n, d_sae); rows are None when the unit is complete.
    """

    def read() -> Iterator[tuple[int, tuple[ActivationRows, torch.Tensor] | None]]:
        for unit in units:
            for rows in blocks[unit]:
                acts = encode_sparse(sae, rows.values, chunk)
                yield unit, (replace(rows, values=rows.values[:, :0].clone()), acts)
            yield unit, None

    source = read()
    for found in prefetch(repeat(lambda: next(source, None)), workers=1):
        if found is None:
            return
        yield found


def _save_counted(place: Workdir, own: LatentStatistics, following: int, hook_name: str) -> None:
    with atomic_file(place.counted(place.rank)) as draft:
        torch.save({"statistics": own.state(), "next": following, "hook_name": hook_name}, draft)


def _load_counted(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many types for a damaged archive
        raise RecordError(
            f"{path} cannot be read ({error}); remove its folder and collect the records again."
        ) from None


class Wanted:
    """Pairs (study, latent) that need a context, as sorted numbers."""

    def __init__(self, pairs: Sequence[tuple[int, Sequence[int]]], d_sae: int) -> None:
        """Store the pairs, given as (latent, its studies)."""
        self._d_sae = d_sae
        parts = [np.asarray(studies, dtype=np.int64) * d_sae + latent for latent, studies in pairs]
        self._pairs = np.sort(np.concatenate([np.zeros(0, np.int64), *parts]))
        self.studies = np.unique(self._pairs // d_sae)

    def holds(self, study: np.ndarray, latent: np.ndarray) -> np.ndarray:
        """Mask of the pairs (n,), (n,) that need a context."""
        if not len(self._pairs):
            return np.zeros(len(study), dtype=bool)
        pair = study * self._d_sae + latent
        at = np.minimum(np.searchsorted(self._pairs, pair), len(self._pairs) - 1)
        return self._pairs[at] == pair


@dataclass(frozen=True)
class ContextReader:
    """Settings for converting rows to activations and texts.

    Attributes:
        studies: Studies, in the order that rows refer to.
        sae: SAE that encodes the rows.
        processor: Processor of the model, which tokenizes the texts.
        wanted: Pairs of study and latent that need a context.
        names: Pseudonyms of studies.
        grid: Rows and columns of patches.
        chunk: Rows encoded at once.
    """

    studies: Sequence[Study]
    sae: SAE[Any]
    processor: Maira2Processor
    wanted: Wanted
    names: Pseudonyms
    grid: tuple[int, int]
    chunk: int


def spool(
    blocks: ActivationSource, reader: ContextReader, place: Workdir, save_seconds: float, progress: bool
) -> None:
    """Run pass 2 of this process; return when all processes are done.

    Raises:
        RecordError: A study of the first pass is missing in this pass.
    """
    folder = place.contexts(place.rank)
    files = ActivationFiles(folder)
    texts, log = folder / TEXTS, folder / "progress.json"
    saved = {"next": place.rank, "sizes": {}, "texts": 0, "found": 0}
    if log.exists():
        saved = json.loads(log.read_text(encoding="utf-8"))
    if not place.finished("contexts"):
        files.cut(saved["sizes"])
        texts.touch()
        with texts.open("r+b") as file:
            file.truncate(saved["texts"])
    at, found = time.monotonic(), saved["found"]
    for unit in tqdm(
        range(saved["next"], len(blocks), place.world), desc="contexts", unit="unit", disable=not progress
    ):
        for rows in rows_of_studies(blocks, unit, reader.wanted.studies):
            found += _spool_block(rows, reader, files, texts)
        if time.monotonic() - at >= save_seconds or unit + place.world >= len(blocks):
            saved = {
                "next": unit + place.world,
                "sizes": files.sizes(),
                "texts": texts.stat().st_size,
                "found": found,
            }
            place.write(log, saved)
            at = time.monotonic()
    if not log.exists():
        place.write(log, saved)
    place.finish("contexts")
    place.ranks.barrier("contexts of latents")
    logs = [place.contexts(rank) / "progress.json" for rank in range(place.world)]
    all_found = sum(json.loads(path.read_text(encoding="utf-8"))["found"] for path in logs)
    if all_found != len(reader.wanted.studies):
        raise RecordError(
            f"The second pass over the blocks found {all_found} studies, but the first one selected "
            f"{len(reader.wanted.studies)}; blocks must contain the same rows in both passes."
        )


@torch.no_grad()
def _spool_block(rows: ActivationRows, reader: ContextReader, files: ActivationFiles, texts: Path) -> int:
    """Write activations and texts of a block of selected studies; return its number of studies."""
    edges = np.r_[0, np.flatnonzero(np.diff(rows.study)) + 1, len(rows)]
    where = np.zeros(len(rows), dtype=np.int32)
    lines = []
    for a, b in pairwise(edges.tolist()):
        mask = np.zeros(len(rows), dtype=bool)
        mask[a:b] = True
        own = rows.where(mask)
        study = reader.studies[int(own.study[0])]
        text = study_text(reader.processor, study, own, reader.grid, reader.names.study(study))
        where[a:b] = places_of(own, text, reader.grid)
        lines.append(text_line(text))
    row, latent, value = (
        x.numpy() for x in active_entries(encode_sparse(reader.sae, rows.values, reader.chunk))
    )
    kept = reader.wanted.holds(rows.study[row], latent)
    row, latent, value = row[kept], latent[kept], value[kept]
    hits = np.zeros(len(row), ENTRY)
    hits["study"], hits["latent"], hits["place"], hits["value"] = rows.study[row], latent, where[row], value
    files.append(hits)
    with texts.open("ab") as file:
        file.writelines(lines)
    return len(edges) - 1


ENTRY = np.dtype([("study", "<i4"), ("latent", "<i4"), ("place", "<i4"), ("value", "<f4")])
LATENTS_PER_SHARD = 256


class ActivationFiles:
    """Activation files of one process in one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def append(self, entries: np.ndarray) -> None:
        """Append entries (n,) of `ENTRY`, in row order within each study."""
        shard = entries["latent"] // LATENTS_PER_SHARD
        order = np.argsort(shard, kind="stable")
        entries, shard = entries[order], shard[order]
        edges = np.r_[0, np.flatnonzero(np.diff(shard)) + 1, len(entries)]
        for start, stop in pairwise(edges.tolist()):
            if stop > start:
                with _path(self._folder, int(shard[start])).open("ab") as file:
                    file.write(entries[start:stop].tobytes())

    def sizes(self) -> dict[str, int]:
        """File name -> size in bytes, the argument of `cut`."""
        return {path.name: path.stat().st_size for path in self._folder.glob("activations-*")}

    def cut(self, sizes: dict[str, int]) -> None:
        """Truncate files to earlier `sizes`."""
        for path in self._folder.glob("activations-*"):
            with path.open("r+b") as file:
                file.truncate(sizes.get(path.name, 0))


Activations = dict[int, tuple[np.ndarray, np.ndarray]]
"""Study -> (n,) places and (n,) values of one latent's entries, in row order."""


def read_activations(folders: Sequence[Path], latents: Sequence[int]) -> Iterator[tuple[int, Activations]]:
    """Yield `(latent, its entries)` for ascending `latents`, with one shard of latents in memory at a time.

    Args:
        folders: Folders of all processes; each study is in one of them only.
        latents: Indices of latents, ascending.
    """
    current, entries, starts = -1, np.zeros(0, ENTRY), np.zeros(1, dtype=np.int64)
    for latent in latents:
        if latent // LATENTS_PER_SHARD != current:
            current = latent // LATENTS_PER_SHARD
            paths = [_path(folder, current) for folder in folders]
            parts = [np.fromfile(path, ENTRY) for path in paths if path.is_file()]
            entries = np.concatenate([np.zeros(0, ENTRY), *parts])
            entries = entries[
                np.lexsort((entries["study"], entries["latent"]))
            ]  # stable, so that rows of a study keep their order
            numbers = np.arange(LATENTS_PER_SHARD + 1) + current * LATENTS_PER_SHARD
            starts = np.searchsorted(entries["latent"], numbers)
        place = latent - current * LATENTS_PER_SHARD
        own = entries[starts[place] : starts[place + 1]]
        edges = np.r_[0, np.flatnonzero(np.diff(own["study"])) + 1, len(own)]
        yield (
            latent,
            {
                int(own["study"][a]): (own["place"][a:b], own["value"][a:b])
                for a, b in pairwise(edges.tolist())
                if b > a
            },
        )


def _path(folder: Path, shard: int) -> Path:
    return folder / f"activations-{shard:05d}"

"""The two passes over the rows, each of which continues where it was killed.

    pass 1   rows -> statistics of all latents                        saved every `save_seconds` and at the end
    pass 2   rows of the wanted studies -> hits of the latents that want them, and those studies' texts

A process reads units rank, rank + world, ... and goes back at most to the unit that it last saved. It knows nothing
about records.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.contexts import ENTRY, ActivationFiles, Pseudonyms, places_of, study_text
from sae_lens_maira.latents.serialization import TEXTS, text_line
from sae_lens_maira.latents.source import ActivationSource, encode_sparse, rows_of_studies
from sae_lens_maira.latents.statistics import LatentStatistics, active_entries, load_state, save_state
from sae_lens_maira.latents.workdir import Workdir
from sae_lens_maira.maira2 import Maira2Processor
from sae_lens_maira.studies import Study


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
    """Pass 1 of this process, then the statistics of all processes together and the rows' hook point.

    Raises:
        RecordError: rows do not fit the studies or the SAE, or there are none.
    """
    own, path = make(), place.counted(place.rank)
    following, hook_name = place.rank, ""
    if path.exists():
        saved = load_state(path)
        own.restore(saved["statistics"])
        following, hook_name = saved["next"], saved["hook_name"]
    at = began = time.monotonic()
    units = range(following, len(blocks), place.world)
    for unit in tqdm(units, desc="statistics", unit="unit", disable=not progress):
        for rows in blocks[unit]:
            if len(rows) and rows.study.max() >= n_studies:
                raise RecordError(
                    f"Rows name study {rows.study.max()}, and {n_studies} studies were given; blocks number studies "
                    "as in that sequence. Give the same studies to both."
                )
            hook_name = rows.hook_name
            own.update(rows, encode_sparse(sae, rows.values, chunk))
        if time.monotonic() - at >= save_seconds:
            _save_counted(place, own, unit + place.world, hook_name)
            at = time.monotonic()
    if not place.finished("counted"):
        if place.world > 1 or time.monotonic() - began >= save_seconds:
            _save_counted(place, own, len(blocks), hook_name)
        place.finish("counted")
    place.ranks.barrier("statistics of latents")
    for rank in range(place.world):
        if rank != place.rank:
            other, saved = make(), load_state(place.counted(rank))
            other.restore(saved["statistics"])
            own.add(other)
            hook_name = hook_name or saved["hook_name"]
    if not own.n_studies:
        raise RecordError(
            "The blocks held no rows, so there is nothing to record; give studies with reports."
        )
    return own, hook_name


def _save_counted(place: Workdir, own: LatentStatistics, following: int, hook_name: str) -> None:
    save_state(
        place.counted(place.rank), {"statistics": own.state(), "next": following, "hook_name": hook_name}
    )


class Wanted:
    """Pairs (study, latent) that need a context, as sorted numbers."""

    def __init__(self, pairs: Sequence[tuple[int, Sequence[int]]], d_sae: int) -> None:
        """Take (latent, its studies) of every latent."""
        self._d_sae = d_sae
        parts = [np.asarray(studies, dtype=np.int64) * d_sae + latent for latent, studies in pairs]
        self._pairs = np.sort(np.concatenate([np.zeros(0, np.int64), *parts]))
        self.studies = np.unique(self._pairs // d_sae)

    def holds(self, study: np.ndarray, latent: np.ndarray) -> np.ndarray:
        """Which of the pairs (n,), (n,) are wanted."""
        if not len(self._pairs):
            return np.zeros(len(study), dtype=bool)
        pair = study * self._d_sae + latent
        at = np.minimum(np.searchsorted(self._pairs, pair), len(self._pairs) - 1)
        return self._pairs[at] == pair


@dataclass(frozen=True)
class ContextReader:
    """What turns rows into hits and texts.

    Attributes:
        studies: the sequence that rows count in.
        sae: its latents.
        processor: of the model, writes the texts.
        wanted: pairs of study and latent to keep.
        names: pseudonyms of studies.
        grid: rows and columns of patches.
        chunk: rows encoded at once.
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
    """Pass 2 of this process; returns when all processes are done.

    Raises:
        RecordError: the pass lacked a study that the first one had.
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
            f"The second pass over the blocks found {all_found} studies where the first one wanted "
            f"{len(reader.wanted.studies)}; blocks must give the same rows whenever they are read."
        )


@torch.no_grad()
def _spool_block(rows: ActivationRows, reader: ContextReader, files: ActivationFiles, texts: Path) -> int:
    """Hits and texts of a block of wanted studies; returns how many studies it held."""
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

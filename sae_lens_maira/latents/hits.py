"""Where latents fire in the studies that show them, on disk as plain numbers until their records are written.

    (study, latent, place, value), 16 bytes, appended to the file of the latent's shard
    place >= 0: index of the shown token;    place < 0: patch -1 - place of the views one after another

A study in which a latent never fires has no hits, so zero contexts cost nothing here. Memory holds one block when
writing and one shard of latents when reading. It knows nothing about records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

HIT = np.dtype([("study", "<i4"), ("latent", "<i4"), ("place", "<i4"), ("value", "<f4")])
LATENTS_PER_SHARD = 256


class HitFiles:
    """Files of hits in one folder, written by one process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def append(self, hits: np.ndarray) -> None:
        """Append hits (n,) of `HIT`, in row order within each study."""
        shard = hits["latent"] // LATENTS_PER_SHARD
        order = np.argsort(shard, kind="stable")
        hits, shard = hits[order], shard[order]
        edges = np.r_[0, np.flatnonzero(np.diff(shard)) + 1, len(hits)]
        for start, stop in pairwise(edges.tolist()):
            if stop > start:
                with _path(self._folder, int(shard[start])).open("ab") as file:
                    file.write(hits[start:stop].tobytes())

    def sizes(self) -> dict[str, int]:
        """Bytes by file name: what `cut` goes back to."""
        return {path.name: path.stat().st_size for path in self._folder.glob("hits-*")}

    def cut(self, sizes: dict[str, int]) -> None:
        """Drop what was appended since `sizes` were taken."""
        for path in self._folder.glob("hits-*"):
            with path.open("r+b") as file:
                file.truncate(sizes.get(path.name, 0))


Hits = dict[int, tuple[np.ndarray, np.ndarray]]
"""Study -> (n,) places and (n,) values of one latent's hits there, in row order."""


def read_hits(folders: Sequence[Path], latents: Sequence[int]) -> Iterator[tuple[int, Hits]]:
    """`(latent, its hits)` for ascending `latents`, one shard of latents in memory at a time.

    Args:
        folders: of the processes that wrote them; no study was written by two.
        latents: ascending.
    """
    current, hits, starts = -1, np.zeros(0, HIT), np.zeros(1, dtype=np.int64)
    for latent in latents:
        if latent // LATENTS_PER_SHARD != current:
            current = latent // LATENTS_PER_SHARD
            paths = [_path(folder, current) for folder in folders]
            parts = [np.fromfile(path, HIT) for path in paths if path.is_file()]
            hits = np.concatenate([np.zeros(0, HIT), *parts])
            hits = hits[
                np.lexsort((hits["study"], hits["latent"]))
            ]  # stable: rows of a study keep their order
            numbers = np.arange(LATENTS_PER_SHARD + 1) + current * LATENTS_PER_SHARD
            starts = np.searchsorted(hits["latent"], numbers)
        place = latent - current * LATENTS_PER_SHARD
        own = hits[starts[place] : starts[place + 1]]
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
    return folder / f"hits-{shard:05d}"

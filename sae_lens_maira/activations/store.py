"""Activations on disk: append-only shards, each of which is in the manifest or does not exist.

    store.json                           what was harvested: hook points, filter, fingerprints, versions
    studies.json                         study ids in order
    shard-000012.<hook>.safetensors      (rows, d_in) bfloat16 or float32, one file a hook point
    shard-000012.parquet                 one index row per activation row
    shard-000012.json                    the shard's manifest entry, renamed into place last

A shard holds `shard_studies` consecutive studies. One entry file a shard lets many ranks write one store without a
lock. Segments of 4,096 rows carry an XXH3 checksum that every read compares. It knows nothing about models.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save as to_safetensors

from sae_lens_maira.activations.prefetch import empty_rows
from sae_lens_maira.activations.rows import COLUMNS, SOURCES, ActivationRows
from sae_lens_maira.activations.segments import checksums, read_rows
from sae_lens_maira.errors import StoreError
from sae_lens_maira.io import read_json, sha256_of, write_json, write_listed
from sae_lens_maira.maira2 import TokenRole

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store holds; two harvests may share a folder only if theirs are equal.

    Attributes:
        hooks: hook name -> d_in.
        dtype: "bfloat16" or "float32".
        shard_studies: studies a shard.
        n_studies: studies in all.
        rates: role name -> share of its rows that is kept.
        settings: everything else that decides which rows come out.
        model, processor: fingerprints.
        versions: of the libraries; recorded, not compared.
    """

    hooks: dict[str, int]
    dtype: str
    shard_studies: int
    n_studies: int
    rates: dict[str, float]
    settings: dict[str, Any]
    model: str
    processor: str
    versions: dict[str, str]

    @property
    def n_shards(self) -> int:
        """Shards of a finished store."""
        return -(-self.n_studies // self.shard_studies)


class ActivationStore:
    """A folder of shards. Open an existing one with `ActivationStore(folder)`, make one with `create`.

    Attributes:
        folder: where it lies.
        spec: what it holds.
        study_ids: ids by study number.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.spec = StoreSpec(**read_json(self.folder / "store.json"))
        except TypeError as error:
            raise StoreError(
                f"{self.folder}/store.json does not describe a store of this version ({error}). "
                "Harvest into a new folder."
            ) from error
        self.study_ids: list[str] = read_json(self.folder / "studies.json")

    @classmethod
    def create(cls, folder: Path | str, spec: StoreSpec, study_ids: Sequence[str]) -> "ActivationStore":
        """Make a store, or open the one that is there if it holds the same.

        Raises:
            StoreError: the folder holds another harvest, ids repeat, or the dtype is unknown.
        """
        folder = Path(folder)
        if spec.dtype not in DTYPES:
            raise StoreError(f"Stores hold {' or '.join(DTYPES)}, not {spec.dtype!r}; choose one of these.")
        if len(set(study_ids)) != len(study_ids):
            raise StoreError(
                f"{len(study_ids) - len(set(study_ids))} of {len(study_ids)} study ids repeat; every study needs its "
                "own, since resuming and sampling go by it."
            )
        if (folder / "store.json").exists():
            store = cls(folder)
            mine, theirs = json.loads(json.dumps(asdict(spec))), asdict(store.spec)
            differ = [name for name in mine if name != "versions" and mine[name] != theirs[name]]
            if store.study_ids != list(study_ids):
                differ.append("study ids")
            if differ:
                raise StoreError(
                    f"{folder} holds another harvest: {', '.join(differ)} differ from what was asked. Use the same "
                    "arguments to continue it, or another folder."
                )
            return store
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "studies.json", list(study_ids))
        write_json(folder / "store.json", asdict(spec))
        return cls(folder)

    # Manifest

    def committed(self) -> list[int]:
        """Numbers of the shards that exist, ascending; looked up anew each time."""
        return sorted(int(path.stem.removeprefix("shard-")) for path in self.folder.glob("shard-*.json"))

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return len(self.committed()) == self.spec.n_shards

    def entry(self, shard: int) -> dict[str, Any]:
        """A shard's manifest entry: rows, files with sizes and SHA-256, XXH3 per segment.

        Raises:
            StoreError: the entry lacks one of these, as those of earlier versions do.
        """
        entry: dict[str, Any] = read_json(self._path(shard, "json"))
        if lacking := [name for name in ("rows", "files", "xxh3") if name not in entry]:
            raise StoreError(
                f"The entry of shard {shard} in {self.folder} has no {', '.join(lacking)}; an earlier version wrote "
                "it. Delete the folder, or this shard's .json, and harvest again."
            )
        return entry

    @cached_property
    def rows(self) -> dict[int, int]:
        """Shard -> rows, as of the first look."""
        self._entries.update({shard: self.entry(shard) for shard in self.committed()})
        return {shard: entry["rows"] for shard, entry in sorted(self._entries.items())}

    def __len__(self) -> int:
        return sum(self.rows.values())

    def role_counts(self) -> dict[TokenRole, int]:
        """Rows of every role, from the manifest."""
        counts: Counter[TokenRole] = Counter()
        for shard in self.rows:
            counts.update({TokenRole(int(role)): n for role, n in self._entries[shard]["roles"].items()})
        return dict(sorted(counts.items()))

    def _path(self, shard: int, ending: str) -> Path:
        return self.folder / f"shard-{shard:06d}.{ending}"

    # Writing

    def commit(self, shard: int, values: dict[str, torch.Tensor], index: pd.DataFrame) -> None:
        """Write one shard: `values` (rows, d_in) a hook point, `index` with `COLUMNS` and as many rows.

        Raises:
            StoreError: shapes do not fit, or the disk is full; the store is then as before.
        """
        files, sums = [], {}
        # What a killed process left of this shard; a shard is written by one rank only.
        for left in self.folder.glob(f"shard-{shard:06d}.*.partial"):
            left.unlink(missing_ok=True)
        try:
            for hook, d_in in self.spec.hooks.items():
                tensor = values[hook].to(DTYPES[self.spec.dtype]).contiguous()
                if tensor.shape != (len(index), d_in):
                    raise StoreError(
                        f"Shard {shard} at {hook} has shape {tuple(tensor.shape)}; expected ({len(index)}, {d_in})."
                    )
                sums[hook] = checksums(tensor)
                content = to_safetensors({"values": tensor}, metadata={"hook": hook})
                files.append(write_listed(self._path(shard, f"{hook}.safetensors"), content))
            table = io.BytesIO()
            index[list(COLUMNS)].to_parquet(table, index=False)
            files.append(write_listed(self._path(shard, "parquet"), table.getvalue()))
            found = index["role"].value_counts()
            counts = dict(zip(found.index.tolist(), found.tolist(), strict=True))
            entry = {"rows": len(index), "roles": counts, "files": files, "xxh3": sums}
            write_json(self._path(shard, "json"), entry)
        except BaseException:
            if not self._path(shard, "json").exists():
                for file in files:
                    (self.folder / file["name"]).unlink(missing_ok=True)
            raise

    # Reading

    def validate(self) -> None:
        """Read every file once and compare sizes and SHA-256.

        Raises:
            StoreError: names every damaged shard and what is wrong with it.
        """
        damage = []
        for shard in self.committed():
            for file in self.entry(shard)["files"]:
                path = self.folder / file["name"]
                if not path.exists():
                    damage.append(f"shard {shard}: {path.name} is missing")
                elif path.stat().st_size != file["bytes"]:
                    damage.append(
                        f"shard {shard}: {path.name} has {path.stat().st_size} of {file['bytes']} bytes"
                    )
                elif sha256_of(path) != file["sha256"]:
                    damage.append(f"shard {shard}: {path.name} has another checksum")
        if damage:
            raise StoreError(
                f"{self.folder} is damaged. {'; '.join(damage)}. Delete the .json of each shard named here and harvest "
                "again: only those are made anew."
            )

    def index(self, shard: int, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """A shard's index rows.

        Raises:
            StoreError: the file is missing or damaged.
        """
        try:
            return pd.read_parquet(self._path(shard, "parquet"), columns=list(columns) if columns else None)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"The index of shard {shard} in {self.folder} cannot be read ({error}). Run validate, delete the "
                "shard's .json and harvest again."
            ) from error

    def read(self, hook: str, shard: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of a shard at a hook point, (n, d_in) in the store's dtype.

        Whole segments are read and checked.

        Raises:
            StoreError: no such hook point, or a segment is damaged.
        """
        entry = self._known(hook, shard)
        end: int = entry["rows"] if stop is None else min(stop, entry["rows"])
        place = empty_rows(max(end - start, 0), self.spec.hooks[hook], DTYPES[self.spec.dtype])
        self.read_into(place, hook, shard, start)
        return place

    def read_into(self, place: torch.Tensor, hook: str, shard: int, start: int) -> None:
        """Read the len(place) rows from `start` on into `place` (n, d_in), as `read` does.

        Raises:
            StoreError: as in `read`.
        """
        entry = self._known(hook, shard)
        path = self._path(shard, f"{hook}.safetensors")
        try:
            read_rows(path, entry["rows"], entry["xxh3"][hook], start, place)
        except StoreError as error:
            raise StoreError(
                f"Shard {shard} in {self.folder} is damaged: {error}. Delete the shard's .json and harvest again; only "
                "this shard is made anew."
            ) from error

    def _known(self, hook: str, shard: int) -> dict[str, Any]:
        """A shard's entry, kept from the first look."""
        if hook not in self.spec.hooks:
            raise StoreError(
                f"{self.folder} holds {', '.join(self.spec.hooks)}, not {hook!r}; name one of these."
            )
        return self._entries.get(shard) or self._entries.setdefault(shard, self.entry(shard))

    @cached_property
    def _entries(self) -> dict[int, dict[str, Any]]:
        return {}

    def blocks(
        self,
        hook: str,
        max_rows: int = 65536,
        source: str | None = None,
        shards: Sequence[int] | None = None,
        studies: np.ndarray | None = None,
    ) -> Iterator[ActivationRows]:
        """Rows in study order; a study is never split over two blocks.

        Args:
            hook: hook point.
            max_rows: a block ends before the study that would exceed this; one larger study is a block of its own.
            source: only "teacher" or only "generated" rows; all if not given.
            shards: numbers of the shards to read; all if not given.
            studies: numbers of the studies to read; values of others are not read from disk. All if not given.

        Yields:
            Rows whose `.study` is the number in `study_ids`.
        """
        for shard in self.committed() if shards is None else shards:
            index = self.index(shard)
            for start, stop in _spans(index["study"].to_numpy(), max_rows, studies):
                part = index.iloc[start:stop]
                values = self.read(hook, shard, start, stop).float()
                columns = {name: part[name].to_numpy() for name in COLUMNS if name != "source"}
                rows = ActivationRows(values=values, hook_name=hook, **columns)
                if source is not None:
                    rows = rows.where(part["source"].to_numpy() == SOURCES.index(source))
                if len(rows):
                    yield rows


def _spans(study: np.ndarray, max_rows: int, studies: np.ndarray | None) -> Iterator[tuple[int, int]]:
    """Ranges of adjacent rows of whole studies, each at most `max_rows` long or one study."""
    if not len(study):
        return
    edges = np.r_[0, np.flatnonzero(np.diff(study)) + 1, len(study)]
    wanted = np.ones(len(edges) - 1, bool) if studies is None else np.isin(study[edges[:-1]], studies)
    start = stop = 0
    for first, end in np.stack([edges[:-1], edges[1:]], 1)[wanted].tolist():
        if stop > start and (first != stop or end - start > max_rows):
            yield start, stop
            start = first
        elif stop == start:
            start = first
        stop = end
    if stop > start:
        yield start, stop

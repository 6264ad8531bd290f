"""Activations on disk: append-only shards, each of which is in the manifest or does not exist.

    store.json                           what was harvested: hook points, filter, fingerprints, versions
    studies.json                         study ids in order
    shard-000012.<hook>.safetensors      (rows, d_in) bfloat16 or float32, one file per hook point
    shard-000012.parquet                 one index row per activation row
    shard-000012.json                    the shard's manifest entry, renamed into place last

A shard holds the rows of `shard_studies` consecutive studies, shuffled, so that a segment of 1,024 rows mixes them.
One entry file per shard lets many ranks write one store. Every read compares the segment's XXH3 checksum.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sae_lens_maira.activations.manifest import Manifest
from sae_lens_maira.activations.prefetch import empty_rows
from sae_lens_maira.activations.rows import COLUMNS, SOURCES, ActivationRows, study_order
from sae_lens_maira.activations.segments import TORCH_DTYPES, read_rows, write_rows
from sae_lens_maira.activations.store_checks import wrong_contents, wrong_shards, wrong_sizes
from sae_lens_maira.activations.store_spec import DTYPES, SEGMENT, StoreSpec, differences, other_studies
from sae_lens_maira.checksums import with_checksum
from sae_lens_maira.errors import StoreError
from sae_lens_maira.io import write_json, write_listed


class ActivationStore(Manifest):
    """A folder of shards. Open an existing one with `ActivationStore(folder)`, make one with `create`."""

    @classmethod
    def create(cls, folder: Path | str, spec: StoreSpec, study_ids: Sequence[str]) -> "ActivationStore":
        """Make a store, or open the existing one if it holds the same.

        Raises:
            StoreError: The folder holds another harvest, ids repeat, or the dtype is unknown.
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
            differ = differences(theirs, mine)
            if store.study_ids != list(study_ids):
                differ.append(other_studies(store.study_ids, study_ids))
            if differ:
                raise StoreError(
                    f"{folder} holds another harvest: {'; '.join(differ)}. Use the same arguments to continue it, or "
                    "another folder."
                )
            return store
        folder.mkdir(parents=True, exist_ok=True)
        ids = write_json(folder / "studies.json", list(study_ids))
        write_json(folder / "store.json", with_checksum(asdict(spec) | {"studies_sha256": ids["sha256"]}))
        return cls(folder)

    # Writing

    def commit(
        self,
        shard: int,
        values: dict[str, torch.Tensor],
        index: pd.DataFrame,
        order: np.ndarray | None = None,
        inputs: Sequence[str] = (),
    ) -> None:
        """Write one shard.

        Args:
            shard: Number of the shard.
            values: Hook name -> (rows, d_in), best in the store's dtype already.
            index: As many rows, with `COLUMNS`.
            order: (rows,) order in which the rows are written; unchanged if not given.
            inputs: Fingerprint of every study of the shard, of `harvesting.study_fingerprint`.

        Raises:
            StoreError: Shapes do not fit, or the disk is full; the store is then as before.
        """
        files, sums = [], {}
        try:
            places = None if order is None else torch.from_numpy(order)
            for hook, d_in in self.spec.hooks.items():
                tensor = values[hook].to(TORCH_DTYPES[self.spec.dtype])
                if tensor.shape != (len(index), d_in):
                    raise StoreError(
                        f"Shard {shard} at {hook} has shape {tuple(tensor.shape)}; expected ({len(index)}, {d_in})."
                    )
                file, sums[hook] = write_rows(
                    self.path_of(shard, f"{hook}.safetensors"), hook, tensor, places
                )
                files.append(file)
            table = io.BytesIO()
            (index if order is None else index.iloc[order])[list(COLUMNS)].to_parquet(table, index=False)
            files.append(write_listed(self.path_of(shard, "parquet"), table.getvalue()))
            found = index["role"].value_counts()
            counts = dict(zip(found.index.tolist(), found.tolist(), strict=True))
            entry = {"rows": len(index), "roles": counts, "files": files, "xxh3": sums}
            entry |= {"segment": SEGMENT, "inputs": list(inputs)}
            write_json(self.path_of(shard, "json"), with_checksum(entry))
        except BaseException:
            if not self.path_of(shard, "json").exists():
                for file in files:
                    (self.folder / file["name"]).unlink(missing_ok=True)
            raise

    # Reading

    def check(self) -> None:
        """Compare the number of shards and the sizes of all files with the manifest, without reading them.

        Raises:
            StoreError: Shards are missing, or files are missing or have another size.
        """
        self._raise(
            [*wrong_shards(self), *(one for shard in self.committed() for one in wrong_sizes(self, shard))]
        )

    def validate(self, complete: bool = True) -> None:
        """Read every file once and compare it with the manifest.

        Args:
            complete: Missing shards are an error.

        Raises:
            StoreError: Names every shard that is missing, extra or damaged, and what is wrong with it.
        """
        damage = wrong_shards(self) if complete else []
        for shard in self.committed():
            damage += wrong_sizes(self, shard) or wrong_contents(self, shard)
        self._raise(damage)

    def _raise(self, damage: list[str]) -> None:
        if damage:
            raise StoreError(
                f"{self.folder} is incomplete or damaged. {'; '.join(damage)}. Delete the .json of each damaged shard "
                "and harvest again: only missing shards are written."
            )

    def index(self, shard: int, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """A shard's index rows.

        Raises:
            StoreError: The file is missing or damaged.
        """
        path = self.path_of(shard, "parquet")
        entry = self._entries.get(shard) or self._entries.setdefault(shard, self.entry(shard))
        expected = {file["name"]: file.get("sha256") for file in entry["files"]}.get(path.name)
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != expected:
                raise ValueError("it has another checksum")
            return pd.read_parquet(io.BytesIO(content), columns=list(columns) if columns else None)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"The index of shard {shard} in {self.folder} cannot be read ({error}). Run validate, delete the "
                "shard's .json and harvest again."
            ) from error

    def read(self, hook: str, shard: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of a shard at a hook point, (n, d_in) in the store's dtype.

        Whole segments are read and checked.

        Raises:
            StoreError: No such hook point, or a segment is damaged.
        """
        entry = self._known(hook, shard)
        end: int = entry["rows"] if stop is None else min(stop, entry["rows"])
        place = empty_rows(max(end - start, 0), self.spec.hooks[hook], TORCH_DTYPES[self.spec.dtype])
        self.read_into(place, hook, shard, start)
        return place

    def read_into(self, place: torch.Tensor, hook: str, shard: int, start: int) -> None:
        """Read the len(place) rows from `start` on into `place` (n, d_in), as `read` does.

        Raises:
            StoreError: As in `read`.
        """
        entry = self._known(hook, shard)
        path = self.path_of(shard, f"{hook}.safetensors")
        try:
            read_rows(path, entry["rows"], entry["xxh3"][hook], start, place)
        except StoreError as error:
            raise StoreError(
                f"Shard {shard} in {self.folder} is damaged: {error}. Delete the shard's .json and harvest again; only "
                "this shard is harvested again."
            ) from error

    def _known(self, hook: str, shard: int) -> dict[str, Any]:
        """A shard's entry, kept from the first look."""
        if hook not in self.spec.hooks:
            raise StoreError(
                f"{self.folder} holds {', '.join(self.spec.hooks)}, not {hook!r}; name one of these."
            )
        return self._entries.get(shard) or self._entries.setdefault(shard, self.entry(shard))

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
            hook: Hook point.
            max_rows: A block ends before the study that would exceed this; one larger study is a block of its own.
            source: Only "teacher" or only "generated" rows; all if not given.
            shards: Numbers of the shards to read; all if not given.
            studies: Numbers of the studies to read; all if not given.

        Yields:
            Rows whose `.study` is the number in `study_ids`.
        """
        for shard in self.committed() if shards is None else shards:
            values, index = self.in_study_order(hook, shard, studies)
            for start, stop in _spans(index["study"].to_numpy(), max_rows):
                part = index.iloc[start:stop]
                columns = {name: part[name].to_numpy() for name in COLUMNS if name != "source"}
                rows = ActivationRows(values=values(start, stop).float(), hook_name=hook, **columns)
                if source is not None:
                    rows = rows.where(part["source"].to_numpy() == SOURCES.index(source))
                if len(rows):
                    yield rows

    def in_study_order(
        self, hook: str, shard: int, studies: np.ndarray | None = None
    ) -> tuple[Callable[[int, int], torch.Tensor], pd.DataFrame]:
        """A shard's rows by study, source and position.

        Holds the rows in the store's dtype in memory, at most one shard.

        Args:
            hook: Hook point.
            shard: Number of the shard.
            studies: Numbers of the studies to read; segments without rows of them are not read. All if not given.

        Returns:
            Function (start, stop) -> (stop - start, d_in) rows in the store's dtype, and the index of all rows.
        """
        index = self.index(shard)
        if studies is None:
            values = self.read(hook, shard)
        else:
            wanted = np.flatnonzero(np.isin(index["study"].to_numpy(), studies))
            values = empty_rows(len(wanted), self.spec.hooks[hook], TORCH_DTYPES[self.spec.dtype])
            for number in np.unique(wanted // SEGMENT).tolist():
                first, last = np.searchsorted(wanted, [number * SEGMENT, (number + 1) * SEGMENT]).tolist()
                rows = self.read(hook, shard, number * SEGMENT, (number + 1) * SEGMENT)
                values[first:last] = rows[torch.from_numpy(wanted[first:last] - number * SEGMENT)]
            index = index.iloc[wanted]
        order = study_order(index)
        places = torch.from_numpy(order)
        return lambda start, stop: values[places[start:stop]], index.iloc[order].reset_index(drop=True)


def _spans(study: np.ndarray, max_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of adjacent rows of whole studies, each at most `max_rows` long or one study."""
    edges = np.r_[0, np.flatnonzero(np.diff(study)) + 1, len(study)]
    start = 0
    for edge, following in zip(edges[1:].tolist(), [*edges[2:].tolist(), None], strict=True):
        if edge > start and (following is None or following - start > max_rows):
            yield start, edge
            start = edge

"""What a store of activations holds, from its JSON files alone: neither its rows nor torch are loaded."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from sae_lens_maira.activations.store_spec import SEGMENT, StoreSpec
from sae_lens_maira.checksums import take_checksum
from sae_lens_maira.errors import StoreError
from sae_lens_maira.io import read_json, sha256_of
from sae_lens_maira.token_roles import TokenRole

_CHANGED = (
    "has another content than when it was written: it is damaged. Restore it from a copy, or remove it and harvest "
    "again; complete shards are kept."
)


class Manifest:
    """Description, studies and shards of a store.

    Attributes:
        folder: Folder of the store.
        spec: What it holds.
        study_ids: Ids by study number.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "store.json"
        if not path.exists():
            raise StoreError(
                f"{self.folder} is not an activation store: it has no store.json. Give the folder that "
                "`sae-lens-maira harvest` or `store import` wrote."
            )
        content = read_json(path)
        try:
            intact = take_checksum(content)
            ids_sum = content.pop("studies_sha256", None)
            self.spec = StoreSpec(**content)
        except (TypeError, AttributeError) as error:
            raise StoreError(
                f"{path} does not describe a store of this version ({error}). Harvest into a new folder."
            ) from error
        if not intact:
            raise StoreError(f"{path} {_CHANGED}")
        ids = self.folder / "studies.json"
        self.study_ids: list[str] = read_json(ids)
        if ids_sum is not None and sha256_of(ids) != ids_sum:
            raise StoreError(f"{ids} {_CHANGED}")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over what the store holds: its description, its studies and the checksums of its rows."""
        description = {k: v for k, v in asdict(self.spec).items() if k not in ("versions", "source")}
        digest = hashlib.sha256(json.dumps([description, self.study_ids], sort_keys=True).encode())
        for shard in self.rows:
            digest.update(json.dumps(self._entries[shard]["xxh3"], sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def committed(self) -> list[int]:
        """Numbers of the shards that exist, ascending; looked up on each access."""
        return sorted(int(path.stem.removeprefix("shard-")) for path in self.folder.glob("shard-*.json"))

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return len(self.committed()) == self.spec.n_shards

    def entry(self, shard: int) -> dict[str, Any]:
        """A shard's manifest entry: rows, files with their sizes, XXH3 per segment, fingerprints of studies.

        Raises:
            StoreError: The entry lacks one of these, as those of earlier versions do.
        """
        path = self.path_of(shard, "json")
        entry: dict[str, Any] = read_json(path)
        intact = isinstance(entry, dict) and take_checksum(entry)
        if lacking := [name for name in ("rows", "files", "xxh3", "segment") if name not in entry]:
            raise StoreError(
                f"The entry of shard {shard} in {self.folder} has no {', '.join(lacking)}; an earlier version wrote "
                "it. Delete the folder, or this shard's .json, and harvest again."
            )
        if not intact:
            raise StoreError(f"{path} {_CHANGED}")
        if entry["segment"] != SEGMENT:
            raise StoreError(
                f"Shard {shard} in {self.folder} has segments of {entry['segment']} rows; this version reads "
                f"{SEGMENT}. Harvest into a new folder."
            )
        return entry

    def studies_of(self, shard: int) -> range:
        """Numbers of a shard's studies."""
        start = shard * self.spec.shard_studies
        return range(start, min(start + self.spec.shard_studies, self.spec.n_studies))

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

    def path_of(self, shard: int, ending: str) -> Path:
        """File of a shard, by its ending."""
        return self.folder / f"shard-{shard:06d}.{ending}"

    @cached_property
    def _entries(self) -> dict[int, dict[str, Any]]:
        return {}

"""Compare the files of a store with its manifest; each function returns what is wrong, one text per finding."""

from collections import Counter
from typing import TYPE_CHECKING

from sae_lens_maira.activations.prefetch import empty_rows
from sae_lens_maira.activations.segments import TORCH_DTYPES, header, read_rows
from sae_lens_maira.activations.store_spec import SEGMENT
from sae_lens_maira.errors import StoreError
from sae_lens_maira.io import sha256_of

if TYPE_CHECKING:
    from sae_lens_maira.activations.store import ActivationStore


def wrong_shards(store: "ActivationStore") -> list[str]:
    """Shards that are missing, or beyond the number that the store has."""
    there = set(store.committed())
    lacking = sorted(set(range(store.spec.n_shards)) - there)
    extra = sorted(there - set(range(store.spec.n_shards)))
    shown = ", ".join(map(str, lacking[:10])) + (" ..." if len(lacking) > 10 else "")
    found = [f"{len(lacking)} of {store.spec.n_shards} shards are missing ({shown})"] if lacking else []
    return found + [f"shard {shard} is beyond the {store.spec.n_shards} of this store" for shard in extra]


def wrong_sizes(store: "ActivationStore", shard: int) -> list[str]:
    """Files of a shard that are missing, of another shard, or of another size; nothing is read."""
    found = []
    for file in store.entry(shard)["files"]:
        path = store.folder / file["name"]
        if not path.name.startswith(f"shard-{shard:06d}."):
            found.append(f"shard {shard}: its manifest entry is of {path.name}, another shard's file")
        elif not path.exists():
            found.append(f"shard {shard}: {path.name} is missing")
        elif path.stat().st_size != file["bytes"]:
            found.append(f"shard {shard}: {path.name} has {path.stat().st_size} of {file['bytes']} bytes")
    return found


def wrong_contents(store: "ActivationStore", shard: int) -> list[str]:
    """Files of a shard whose header, checksum or row counts differ from the manifest; every byte is read."""
    entry = store.entry(shard)
    found = []
    dtype = TORCH_DTYPES[store.spec.dtype]
    for hook, d_in in store.spec.hooks.items():
        path = store.path_of(shard, f"{hook}.safetensors")
        expected = header(hook, entry["rows"], d_in, dtype)
        with path.open("rb") as file:
            if file.read(len(expected)) != expected:
                found.append(f"shard {shard}: the header of {path.name} has changed")
                continue
        place = empty_rows(min(SEGMENT, entry["rows"]), d_in, dtype)
        try:
            for start in range(0, entry["rows"], SEGMENT):
                rows = place[: min(SEGMENT, entry["rows"] - start)]
                read_rows(path, entry["rows"], entry["xxh3"][hook], start, rows)
        except StoreError as error:
            found.append(f"shard {shard}: {error}")
    table = next(file for file in entry["files"] if file["name"].endswith(".parquet"))
    if sha256_of(store.folder / table["name"]) != table["sha256"]:
        found.append(f"shard {shard}: {table['name']} has another checksum")
    else:
        counts = Counter(store.index(shard, ["role"])["role"].tolist())
        if counts != {int(role): n for role, n in entry["roles"].items()} or counts.total() != entry["rows"]:
            found.append(f"shard {shard}: the manifest counts other rows than {table['name']} has")
    return found


__all__ = ["wrong_contents", "wrong_shards", "wrong_sizes"]

"""SAELens' cached activations: a store written as the data set that its `ActivationsStore` reads, and back.

    one data set row = context_size consecutive rows of the store: <hook> (context_size, d_in), token_ids (context_size)

SAELens reads float32 rows of whole sequences; here a "sequence" is any run of kept rows, and rows that do not fill
the last one are left out and counted. Columns that SAELens ignores (study, position, role, ...) are kept, so an export
of this package is imported unchanged; what SAELens wrote itself has no roles, and is given one.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Array2D, Dataset, Features, Sequence, Value, load_from_disk
from datasets.features.features import Array2DExtensionType, numpy_to_pyarrow_listarray

from sae_lens_maira.activations.rows import COLUMNS
from sae_lens_maira.activations.store import ActivationStore
from sae_lens_maira.activations.store_spec import StoreSpec
from sae_lens_maira.checksums import damaged_files, write_sums
from sae_lens_maira.errors import StoreError
from sae_lens_maira.io import read_json, write_json
from sae_lens_maira.maira2 import TokenRole

TOKENS = "token_ids"
EXTRA = tuple(name for name in COLUMNS if name != "token")
ORIGIN = "sae_lens_maira.json"
"""File next to the data set with the store's own description; SAELens does not read it."""
GATHERED = 65536
"""Rows per file; datasets keeps a file's list offsets in 32 bits, which 2^31 numbers would overflow."""


def export_cached(
    store: ActivationStore, folder: Path | str, hook: str | None = None, context_size: int = 128
) -> tuple[int, int]:
    """Write a store as SAELens' cached activations.

    Args:
        store: A complete store.
        folder: New or empty.
        hook: Hook point; the store's first if not given.
        context_size: Rows per data set row; pass it to SAELens.

    Returns:
        Data set rows written, and store rows left out because they do not fill one.

    Raises:
        StoreError: The store is incomplete, the folder is not empty, no such hook point, damage, or too few rows.
    """
    folder = Path(folder)
    store.check()
    hook = hook or next(iter(store.spec.hooks))
    if hook not in store.spec.hooks:
        raise StoreError(
            f"{store.folder} holds {', '.join(store.spec.hooks)}, not {hook!r}; name one of these."
        )
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(
            f"{folder} is not empty; SAELens' format needs a new or empty folder. Give another one."
        )
    if len(store) < context_size or context_size < 1:
        raise StoreError(
            f"{store.folder} has {len(store):,} rows, and a data set row takes {context_size}. Choose a context_size "
            "from 1 to that number."
        )
    width = store.spec.hooks[hook]
    features = Features(
        {
            hook: Array2D((context_size, width), "float32"),
            TOKENS: Sequence(Value("int32"), length=context_size),
            **{name: Sequence(Value("int64"), length=context_size) for name in EXTRA},
        }
    )
    scratch = folder / ".writing"
    scratch.mkdir(parents=True)
    count = left = 0
    try:
        for values, index in _whole_sequences(store, hook, context_size, max(1, GATHERED // context_size)):
            left = len(values) % context_size
            used = len(values) - left
            if used:
                part = _dataset(features, hook, values[:used], index.iloc[:used], context_size)
                part.save_to_disk(scratch / f"{count:09d}", num_shards=1)
                count += used // context_size
        _join(scratch, folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise StoreError(
            f"Writing to {folder} failed ({error}) and what was written is removed. The store is as before; free some "
            f"space ({len(store) * width * 4 / 1e9:,.1f} GB are needed) and export again."
        ) from error
    write_json(folder / ORIGIN, {"spec": asdict(store.spec), "study_ids": store.study_ids, "hook": hook})
    write_sums(folder)
    return count, left


def import_cached(
    cached: Path | str,
    folder: Path | str,
    hook: str | None = None,
    role: TokenRole = TokenRole.REPORT,
    dtype: str | None = None,
    shard_rows: int = 65536,
) -> ActivationStore:
    """Make a store of SAELens' cached activations; killed at any time, the same call continues.

    Args:
        cached: Folder that SAELens or `export_cached` wrote.
        folder: Folder of the store.
        hook: Column to read; the only one with rows of numbers if not given.
        role: Role of every token if the data set has none.
        dtype: Dtype of the stored rows; the exported store's own, else float32.
        shard_rows: Approximate rows per shard.

    Returns:
        The store. Each sequence that SAELens wrote is a study of its own.

    Raises:
        StoreError: No data set of this kind, or the folder holds something else.
    """
    cached = Path(cached)
    if damaged := damaged_files(cached):
        raise StoreError(
            f"{cached} is damaged: {', '.join(damaged)} is missing or not what `store export` wrote. Export again."
        )
    try:
        data: Any = load_from_disk(str(cached))
        hooks = [name for name, kind in data.features.items() if isinstance(kind, Array2D)]
    except (OSError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{cached} cannot be read as a data set ({error}); expected the folder that SAELens' "
            "CacheActivationsRunner or `store export` wrote."
        ) from error
    name = hook or (hooks[0] if len(hooks) == 1 else "")
    if name not in hooks:
        raise StoreError(
            f"{cached} has the activations {', '.join(hooks) or 'of no hook'}; name one of them with hook."
        )
    context, width = data.features[name].shape
    spec, ids = _description(cached, data, name, dtype, max(1, shard_rows // context))
    store = ActivationStore.create(folder, replace(spec, hooks={name: width}), ids)
    done = set(store.committed())
    for shard, values, index in _shards(data, name, context, width, role, store.spec):
        if shard not in done:
            order = np.random.default_rng([len(ids), shard]).permutation(len(index))
            store.commit(shard, {name: values}, index, order)
    return ActivationStore(folder)


def _whole_sequences(
    store: ActivationStore, hook: str, context: int, most: int
) -> Iterator[tuple[torch.Tensor, pd.DataFrame]]:
    """Rows in study order, in pieces of whole sequences; what is left over is the last piece's end."""
    held: list[tuple[torch.Tensor, pd.DataFrame]] = []
    rows = 0
    for shard, n in store.rows.items():
        read, index = store.in_study_order(hook, shard)
        for start in range(0, n, context * most):
            stop = min(start + context * most, n)
            held.append((read(start, stop), index.iloc[start:stop]))
            rows += stop - start
            if rows >= context * most:
                values, table = torch.cat([v for v, _ in held]), pd.concat([t for _, t in held])
                cut = rows // context * context
                yield values[:cut], table.iloc[:cut]
                held, rows = [(values[cut:], table.iloc[cut:])], rows - cut
    if rows:
        yield torch.cat([v for v, _ in held]), pd.concat([t for _, t in held])


def _dataset(
    features: Features, hook: str, values: torch.Tensor, index: pd.DataFrame, context: int
) -> Dataset:
    """The data set of whole sequences, without a copy through Python lists."""
    width = values.shape[1]
    blocks = numpy_to_pyarrow_listarray(values.float().numpy().reshape(-1, context, width))
    columns: dict[str, Any] = {
        hook: pa.ExtensionArray.from_storage(Array2DExtensionType((context, width), "float32"), blocks)
    }
    for name, kind in ((TOKENS, np.int32), *((name, np.int64) for name in EXTRA)):
        numbers = index["token" if name == TOKENS else name].to_numpy().astype(kind)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(numbers), context)
    return Dataset(pa.table(columns, schema=features.arrow_schema))


def _join(scratch: Path, folder: Path) -> None:
    """The parts' files under one description, as `datasets` lays out a data set of several files."""
    parts = sorted(scratch.iterdir())
    files = []
    for number, part in enumerate(parts):
        (file,) = part.glob("*.arrow")
        name = f"data-{number:05d}-of-{len(parts):05d}.arrow"
        file.replace(folder / name)
        files.append({"filename": name})
    state = read_json(parts[0] / "state.json")
    print_of = hashlib.sha256(repr([read_json(p / "state.json")["_fingerprint"] for p in parts]).encode())
    (parts[0] / "dataset_info.json").replace(folder / "dataset_info.json")
    write_json(
        folder / "state.json", state | {"_data_files": files, "_fingerprint": print_of.hexdigest()[:16]}
    )
    shutil.rmtree(scratch)


def _description(
    cached: Path, data: Any, hook: str, dtype: str | None, per_shard: int
) -> tuple[StoreSpec, list[str]]:
    """What the store will hold, and its study ids."""
    if (cached / ORIGIN).exists():
        origin = read_json(cached / ORIGIN)
        spec = StoreSpec(**origin["spec"])
        return replace(spec, dtype=dtype or spec.dtype), origin["study_ids"]
    spec = StoreSpec(
        hooks={hook: 0},
        dtype=dtype or "float32",
        shard_studies=per_shard,
        n_studies=len(data),
        rates={},
        settings={"imported": "SAELens cached activations", "rows": len(data)},
        model="unknown",
        processor="unknown",
        versions={},
    )
    return spec, [f"sequence-{number:09d}" for number in range(len(data))]


def _shards(
    data: Any, hook: str, context: int, width: int, role: TokenRole, spec: StoreSpec
) -> Iterator[tuple[int, torch.Tensor, pd.DataFrame]]:
    """Shards in order: rows (n, d_in) and their index, with empty shards where no row belongs to one."""
    step = max(1, GATHERED // context)
    nothing = (torch.zeros(0, width), _index({}, 0, context, 0, role))
    held: list[tuple[torch.Tensor, pd.DataFrame]] = []
    shard = 0
    for first in range(0, len(data), step):
        part = data.with_format("numpy")[first : first + step]
        values = torch.from_numpy(np.asarray(part[hook], dtype=np.float32).reshape(-1, width))
        index = _index(part, first, context, len(values), role)
        home = index["study"].to_numpy() // spec.shard_studies
        start = 0
        while start < len(values):
            stop = int(np.searchsorted(home, shard, side="right"))
            held.append((values[start:stop], index.iloc[start:stop]))
            start = stop
            if stop < len(values):
                yield shard, *_together(held)
                held, shard = [], shard + 1
    while shard < spec.n_shards:
        yield shard, *_together(held or [nothing])
        held, shard = [], shard + 1


def _together(held: list[tuple[torch.Tensor, pd.DataFrame]]) -> tuple[torch.Tensor, pd.DataFrame]:
    return torch.cat([v for v, _ in held]), pd.concat([t for _, t in held], ignore_index=True)


def _index(part: dict[str, Any], first: int, context: int, rows: int, role: TokenRole) -> pd.DataFrame:
    """Index rows of consecutive sequences, from the columns that are there."""
    number = np.arange(rows)
    columns: dict[str, Any] = {
        "study": first + number // context,
        "position": number % context,
        "role": np.full(rows, int(role)),
        "token": np.full(rows, -1),
        "view": np.full(rows, -1),
        "patch_row": np.full(rows, -1),
        "patch_col": np.full(rows, -1),
        "source": np.zeros(rows),
    }
    columns |= {name: np.asarray(part[name]).reshape(-1) for name in EXTRA if name in part}
    if TOKENS in part:
        columns["token"] = np.asarray(part[TOKENS]).reshape(-1)
    kinds = {"study": np.int64, "position": np.int32, "token": np.int32, "patch_row": np.int16}
    kinds |= {"patch_col": np.int16}
    return pd.DataFrame({name: columns[name].astype(kinds.get(name, np.int8)) for name in COLUMNS})

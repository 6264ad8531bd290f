"""Harvest activations of studies into a store, with any number of processes at a time.

Rows are cast to the store's type batch by batch; a process holds at most two shards of that type. A shard holds
`shard_studies` consecutive studies and is committed as a whole. Shard s belongs to rank s mod world_size, and which
rows it holds depends on neither, so a killed harvest loses at most one shard per rank and continues with any number of
ranks.
"""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from sae_lens_maira.activations.reader import RowReader
from sae_lens_maira.activations.rows import study_order
from sae_lens_maira.activations.sampling import RowSettings
from sae_lens_maira.activations.segments import TORCH_DTYPES
from sae_lens_maira.activations.store import ActivationStore
from sae_lens_maira.activations.store_spec import StoreSpec
from sae_lens_maira.errors import StoreError
from sae_lens_maira.io import locked
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.studies import Study

SHARD_BYTES = 1e9
MOST_STUDIES = 512
"""Studies per shard at most, which is what a kill can lose."""
LIBRARIES = ("sae-lens-maira", "torch", "transformers", "transformer-lens", "sae-lens", "safetensors")


def harvest(
    maira: Maira2,
    studies: Sequence[Study],
    folder: Path | str,
    hook_names: Sequence[str],
    settings: RowSettings | None = None,
    *,
    shard_studies: int | None = None,
    shard_bytes: float = SHARD_BYTES,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 1,
    progress: bool = True,
    source: dict[str, str] | None = None,
) -> ActivationStore:
    """Harvest into a folder, or continue a harvest there.

    Args:
        maira: Model and processor.
        studies: Any sequence, the same one in every rank and after a restart; items are read when needed.
        folder: Folder of the store.
        hook_names: Hook points of the language model, for example `["blocks.15.hook_resid_post"]`.
        settings: Which rows are kept; `RowSettings()` if not given.
        shard_studies: Studies per shard, which is what a kill can lose; as many as fit `shard_bytes` if not given.
        shard_bytes: Size of a shard in bytes at all hook points together, estimated from eight studies.
        dtype: Type of the stored numbers.
        rank: Number of this process, from 0.
        world_size: Number of processes that harvest into the folder.
        workers: Threads that read and encode images ahead of the model; the rows do not depend on it.
        progress: Show a progress bar on rank 0.
        source: Origin of the model, for the store's description; see `StoreSpec`.

    Returns:
        The store; complete when all ranks have returned.

    Raises:
        StoreError: The folder holds another harvest or one of other texts or images, the disk is full, a study has no
            report, or a hook point gives no row per token.
        LockError: Another process harvests into the folder.
    """
    if not 0 <= rank < world_size:
        raise StoreError(f"Rank {rank} of {world_size} does not exist; ranks count from 0.")
    # Ranks are one owner of the folder: each excludes only another process with its own number.
    with locked(folder, f"rank {rank} of {world_size}" if world_size > 1 else ""):
        settings = settings or RowSettings()
        reader = RowReader(maira, studies, hook_names, settings, workers)
        if shard_studies is None:
            shard_studies = _studies_per_shard(folder, reader, dtype, shard_bytes)
        store = ActivationStore.create(
            folder,
            StoreSpec(
                hooks=reader.hooks,
                dtype=dtype,
                shard_studies=shard_studies,
                n_studies=len(studies),
                rates=settings.rates_by_name,
                settings=settings.recorded(),
                model=model_fingerprint(maira.model, reader.stop),
                processor=processor_fingerprint(maira),
                versions=library_versions(),
                source=source or {},
            ),
            [study.study_id for study in studies],
        )
        done = set(store.committed())
        mine = range(rank, store.spec.n_shards, world_size)
        check_inputs(store, studies, [shard for shard in mine if shard in done])
        _harvest(
            store, reader, studies, [shard for shard in mine if shard not in done], progress and not rank
        )
    return ActivationStore(folder)


def _harvest(
    store: ActivationStore, reader: RowReader, studies: Sequence[Study], shards: list[int], progress: bool
) -> None:
    dtype, sources = TORCH_DTYPES[store.spec.dtype], len(reader.settings.sources)
    shares = {shard: store.studies_of(shard) for shard in shards}
    bar = tqdm(total=sum(map(len, shares.values())), desc="harvest", unit="study", disable=not progress)
    rows, began = 0, time.monotonic()
    for shard, numbers in shares.items():
        values: dict[str, list[torch.Tensor]] = {hook: [] for hook in store.spec.hooks}
        tables = []
        for part in reader.batches(numbers):
            for hook, parts in values.items():
                parts.append(part.values.pop(hook).to(dtype))
            tables.append(part.index)
            rows += len(part.index)
            bar.update(part.studies / sources)
            bar.set_postfix_str(f"{rows / (time.monotonic() - began):,.3g} rows/s")
        index = pd.concat(tables, ignore_index=True)
        whole = {}
        for hook in list(values):
            whole[hook] = torch.cat(values.pop(hook))
        # Sorted first, so that the order of a shard depends on its rows alone, and then shuffled.
        order = study_order(index)
        order = order[np.random.default_rng([reader.settings.seed, shard]).permutation(len(order))]
        store.commit(shard, whole, index, order, [study_fingerprint(studies[n]) for n in numbers])
    bar.close()


def _studies_per_shard(folder: Path | str, reader: RowReader, dtype: str, shard_bytes: float) -> int:
    """Studies per shard of the store that is there, or as many as are expected to fit the size."""
    if (Path(folder) / "store.json").exists():
        return ActivationStore(folder).spec.shard_studies
    size = reader.rows_per_study() * sum(reader.hooks.values()) * TORCH_DTYPES[dtype].itemsize
    return studies_that_fit(size, shard_bytes)


def studies_that_fit(study_bytes: float, shard_bytes: float) -> int:
    """Studies per shard of a size, each with so many bytes of rows; at least one and at most `MOST_STUDIES`."""
    return int(min(MOST_STUDIES, max(1, shard_bytes // max(study_bytes, 1))))


def study_fingerprint(study: Study) -> str:
    """16 hex digits over a study's texts and images.

    Of an image file, the size and the first and last 64 kB are used; of an image in memory, all pixels.
    """
    texts = (study.indication, study.technique, study.comparison, study.prior_report, study.report)
    digest = hashlib.sha256(json.dumps([study.study_id, texts]).encode())
    for image in (study.frontal, study.lateral, study.prior_frontal):
        digest.update(b"|")
        if isinstance(image, (str, Path)):
            try:
                with Path(image).open("rb") as file:
                    size = file.seek(0, 2)
                    digest.update(str(size).encode())
                    for start in {0, max(0, size - 65536)}:
                        file.seek(start)
                        digest.update(file.read(65536))
            except OSError as error:
                raise StoreError(
                    f"An image of study {study.study_id} cannot be read ({error}). Restore it, or leave the study out."
                ) from error
        elif image is not None:
            digest.update(np.ascontiguousarray(np.asarray(image)).tobytes())
    return digest.hexdigest()[:16]


def check_inputs(store: ActivationStore, studies: Sequence[Study], shards: Sequence[int]) -> None:
    """Refuse studies whose texts or images are not those that a store was harvested from.

    Args:
        store: The store.
        studies: The studies that are given now, numbered as in the store.
        shards: Shards to compare; those that do not record their studies are skipped.

    Raises:
        StoreError: Names the first study that has changed.
    """
    for shard in shards:
        numbers, known = store.studies_of(shard), store.entry(shard).get("inputs") or []
        for number, fingerprint in zip(numbers, known, strict=False):
            if study_fingerprint(studies[number]) != fingerprint:
                raise StoreError(
                    f"Study {store.study_ids[number]} has other texts or images than when shard {shard} of "
                    f"{store.folder} was harvested. Restore the files of that time, or harvest into another folder."
                )


def model_fingerprint(model: Any, layers: int | None = None) -> str:
    """16 hex digits over the parameters' names, shapes, dtypes and first 64 numbers.

    Args:
        model: The model.
        layers: Number of decoder layers that were run; None for all of them and the head. What comes after them is left
            out, so that a model which was loaded up to there is the same.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if layers is not None and _after(name, layers):
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _after(name: str, layers: int) -> bool:
    """Whether a parameter comes after the first `layers` decoder layers."""
    number = re.search(r"language_model\.layers\.(\d+)\.", name)
    if number is not None:
        return int(number.group(1)) >= layers
    return name.endswith(("language_model.norm.weight", "lm_head.weight"))


def processor_fingerprint(maira: Maira2) -> str:
    """16 hex digits over the vocabulary and the image recipe."""
    processor: Any = maira.processor
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(repr((vocabulary, processor.recipe)).encode()).hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape activations."""
    return {name: version(name) for name in LIBRARIES}

"""Harvest activations of studies into a store, with any number of processes at a time.

A shard is `shard_studies` consecutive studies and is committed as a whole. Shard s belongs to rank s mod world_size,
and which rows it holds depends on neither, so a killed harvest loses at most one shard per rank and continues with any
number of ranks.
"""

import hashlib
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from sae_lens_maira.activations.reader import RowReader, RowSettings
from sae_lens_maira.activations.store import ActivationStore, StoreSpec
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.studies import Study

LIBRARIES = ("sae-lens-maira", "torch", "transformers", "transformer-lens", "sae-lens", "safetensors")


def harvest(
    maira: Maira2,
    studies: Sequence[Study],
    folder: Path | str,
    hook_names: Sequence[str],
    settings: RowSettings | None = None,
    *,
    shard_studies: int = 256,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 1,
    progress: bool = True,
) -> ActivationStore:
    """Harvest into a folder, or continue a harvest there.

    Args:
        maira: Model and processor.
        studies: Any sequence, the same one in every rank and after a restart; items are read when needed.
        folder: Folder of the store.
        hook_names: Hook points of the language model, for example `["blocks.15.hook_resid_post"]`.
        settings: Which rows are kept; `RowSettings()` if not given.
        shard_studies: Studies per shard, which is what a kill can lose.
        dtype: Type of the stored numbers.
        rank: Number of this process, from 0.
        world_size: Number of processes that harvest into the folder.
        workers: Threads that read and encode images ahead of the model; the rows do not depend on it.
        progress: Show a progress bar on rank 0.

    Returns:
        The store; complete when all ranks have returned.

    Raises:
        StoreError: The folder holds another harvest, the disk is full, a study has no report, or a hook point gives
            no row per token.
    """
    if not 0 <= rank < world_size:
        raise StoreError(f"Rank {rank} of {world_size} does not exist; ranks count from 0.")
    settings = settings or RowSettings()
    reader = RowReader(maira, studies, hook_names, settings, workers)
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
        ),
        [study.study_id for study in studies],
    )
    done = set(store.committed())
    mine = [s for s in range(rank, store.spec.n_shards, world_size) if s not in done]
    shares = {s: range(s * shard_studies, min((s + 1) * shard_studies, len(studies))) for s in mine}
    total = sum(map(len, shares.values()))
    bar = tqdm(total=total, desc="harvest", unit="study", disable=not progress or rank > 0)
    rows, began = 0, time.monotonic()
    for shard, numbers in shares.items():
        parts = []
        for part in reader.batches(numbers):
            parts.append(part)
            bar.update(part.studies / len(settings.sources))
        shard_rows = reader.ordered(parts)
        store.commit(shard, shard_rows.values, shard_rows.index)
        rows += len(shard_rows.index)
        bar.set_postfix_str(f"{rows / (time.monotonic() - began):,.0f} rows/s")
    bar.close()
    return ActivationStore(folder)


def model_fingerprint(model: Any, layers: int | None = None) -> str:
    """16 hex digits over the parameters' names, shapes, dtypes and first 64 numbers.

    Args:
        model: The model.
        layers: Number of decoder layers that were run; None is all of them and the head. What comes after them is left
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

"""Studies through the model into a store, any number of processes at a time.

A shard is `shard_studies` consecutive studies and is committed whole; shard s belongs to rank s mod world_size, and
which rows it holds depends on neither. So a killed harvest loses at most one shard per rank and continues with any
number of ranks. It knows nothing about SAEs.
"""

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from sae_lens_maira.activations.fingerprints import library_versions, model_fingerprint, processor_fingerprint
from sae_lens_maira.activations.forward import Reports, RowReader, RowSettings
from sae_lens_maira.activations.sampling import RoleRates
from sae_lens_maira.activations.store import ActivationStore, StoreSpec
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import Maira2, TokenRole
from sae_lens_maira.studies import Study


def harvest(
    maira: Maira2,
    studies: Sequence[Study],
    folder: Path | str,
    hook_names: Sequence[str],
    roles: str | Collection[TokenRole | str] = "paper",
    rates: RoleRates | None = None,
    reports: Reports = "teacher",
    shard_studies: int = 256,
    batch_size: int = 8,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    max_norm: float | None = None,
    max_new_tokens: int = 300,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 1,
    progress: bool = True,
) -> ActivationStore:
    """Harvest into a folder, or continue there.

    Args:
        maira: model and processor.
        studies: any sequence, the same one in every rank and after a restart; items are read when needed.
        folder: of the store.
        hook_names: hook points of the language model, for example `["blocks.15.hook_resid_post"]`.
        roles: a preset or roles.
        rates: share to keep by role, e.g. `{"image": 0.05}`; adds the role if `roles` lacks it.
        reports: the studies' own, those the model writes, or both after one another.
        shard_studies: studies a shard; what a kill can lose.
        batch_size: studies a forward. Padding changes rounding, so it belongs to what a store is.
        dtype: of the stored rows.
        max_norm: rows with a larger norm at any of the hook points are dropped; None keeps all.
        max_new_tokens: budget of a generated report.
        seed: of the sample of rows.
        rank: this process, from 0.
        world_size: processes that harvest into the folder.
        workers: threads that read and encode images ahead of the model; the rows do not depend on it.
        progress: show a bar on rank 0.

    Returns:
        The store; complete when all ranks have returned.

    Raises:
        StoreError: the folder holds another harvest, the disk is full, a study lacks its report, or a hook point does
            not lie on the token sequence.
    """
    if not 0 <= rank < world_size:
        raise StoreError(f"Rank {rank} of {world_size} does not exist; ranks count from 0.")
    settings = RowSettings(
        roles=roles,
        rates=rates,
        reports=reports,
        batch_size=batch_size,
        max_norm=max_norm,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    reader = RowReader(maira, studies, hook_names, settings, workers)
    store = ActivationStore.create(
        folder,
        StoreSpec(
            hooks=reader.hooks,
            dtype=dtype,
            shard_studies=shard_studies,
            n_studies=len(studies),
            rates={role.name.lower(): rate for role, rate in settings.kept.items()},
            settings={
                "reports": reports,
                "batch_size": batch_size,
                "max_norm": max_norm,
                "max_new_tokens": max_new_tokens if reports != "teacher" else None,
                "seed": seed,
            },
            model=model_fingerprint(maira.model),
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
        whole = reader.ordered(parts)
        store.commit(shard, whole.values, whole.index)
        rows += len(whole.index)
        bar.set_postfix_str(f"{rows / (time.monotonic() - began):,.0f} rows/s")
    bar.close()
    return ActivationStore(folder)

"""Studies through the model into a store: several hook points a pass, stopped behind the last of them.

A shard is `shard_studies` consecutive studies and is committed whole; shard s belongs to rank s mod world_size, and
which rows it holds depends on neither. So a killed harvest loses at most one shard per rank and continues with any
number of ranks. It knows nothing about SAEs.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from sae_lens_maira.activations.fingerprints import library_versions, model_fingerprint, processor_fingerprint
from sae_lens_maira.activations.generated import encode_generated
from sae_lens_maira.activations.sampling import RoleRates, kept_positions, rate_table, role_rates
from sae_lens_maira.activations.store import COLUMNS, SOURCES, ActivationStore, StoreSpec
from sae_lens_maira.errors import StoreError
from sae_lens_maira.hooks.transformer_lens import HookedMaira2
from sae_lens_maira.maira2 import Maira2, Maira2Encoding, TokenRole
from sae_lens_maira.studies import Study

Reports = Literal["teacher", "generated", "both"]


@dataclass(frozen=True, kw_only=True)
class _Filter:
    table: np.ndarray
    seed: int
    max_norm: float | None


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
        progress: show a bar on rank 0.

    Returns:
        The store; complete when all ranks have returned.

    Raises:
        StoreError: the folder holds another harvest, the disk is full, a study lacks its report, or a hook point does
            not lie on the token sequence.
    """
    if not 0 <= rank < world_size:
        raise StoreError(f"Rank {rank} of {world_size} does not exist; ranks count from 0.")
    if reports not in ("teacher", "generated", "both"):
        raise StoreError(f"reports is {reports!r}; expected teacher, generated or both.")
    kept = role_rates(roles, rates)
    hooked = HookedMaira2(maira.model, maira.processor)
    stops = [hooked.points.resolve(name).stop for name in hook_names]
    known = [stop for stop in stops if stop is not None]
    stop = max(known) if len(known) == len(stops) and known else None
    store = ActivationStore.create(
        folder,
        StoreSpec(
            hooks=_widths(hooked, maira, studies, hook_names, stop),
            dtype=dtype,
            shard_studies=shard_studies,
            n_studies=len(studies),
            rates={role.name.lower(): rate for role, rate in kept.items()},
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
    wanted = _Filter(table=rate_table(kept), seed=seed, max_norm=max_norm)
    done = set(store.committed())
    mine = [s for s in range(rank, store.spec.n_shards, world_size) if s not in done]
    sources = {"teacher": (0,), "generated": (1,), "both": (0, 1)}[reports]
    bar = tqdm(
        total=len(mine) * shard_studies, desc="harvest", unit="study", disable=not progress or rank > 0
    )
    rows, began = 0, time.monotonic()
    for shard in mine:
        numbers = range(shard * shard_studies, min((shard + 1) * shard_studies, len(studies)))
        parts = []
        for chosen, encoding, source in _batches(
            maira, studies, numbers, sources, batch_size, max_new_tokens
        ):
            with torch.no_grad():
                _, cache = hooked.run_with_cache(encoding, names_filter=list(hook_names), stop_at_layer=stop)
            values = {name: cache[name] for name in hook_names}
            parts.append(
                _rows(encoding, values, chosen, source, [studies[i].study_id for i in chosen], wanted)
            )
            bar.update(len(chosen) / len(sources))
        values, index = _ordered(parts, hook_names)
        store.commit(shard, values, index)
        rows += len(index)
        bar.set_postfix_str(f"{rows / (time.monotonic() - began):,.0f} rows/s")
    bar.close()
    return ActivationStore(folder)


def _widths(
    hooked: HookedMaira2, maira: Maira2, studies: Sequence[Study], names: Sequence[str], stop: int | None
) -> dict[str, int]:
    """d_in of every hook point, from one study's forward."""
    if not names or not len(studies):
        raise StoreError(
            f"{len(names)} hook points and {len(studies)} studies were given; give at least one each."
        )
    encoding = maira.processor.encode([studies[0]], padding_side="right")
    with torch.no_grad():
        _, cache = hooked.run_with_cache(encoding, names_filter=list(names), stop_at_layer=stop)
    for name in names:
        if cache[name].shape[:2] != encoding.input_ids.shape:
            raise StoreError(
                f"{name} gives {tuple(cache[name].shape)} for {tuple(encoding.input_ids.shape)} tokens; a store needs "
                "one row per token. Choose a hook point of the language model's token sequence."
            )
    return {name: cache[name][0, 0].numel() for name in names}


def _batches(
    maira: Maira2,
    studies: Sequence[Study],
    numbers: range,
    sources: tuple[int, ...],
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[tuple[list[int], Maira2Encoding, int]]:
    """A shard's studies in batches of like length: numbers, encoding padded on the right, source."""
    if 0 in sources:
        lacking = [studies[i].study_id for i in numbers if not studies[i].report]
        if lacking:
            raise StoreError(
                f"{len(lacking)} studies have no report to teach, the first is {lacking[0]}. Leave them out, or "
                "harvest with reports='generated'."
            )
    order = sorted(numbers, key=lambda i: _length(studies[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [studies[i] for i in chosen]
        for source in sources:
            if SOURCES[source] == "teacher":
                yield chosen, maira.processor.encode(batch, report="teacher", padding_side="right"), source
            else:
                yield chosen, encode_generated(maira, batch, max_new_tokens), source


def _length(study: Study) -> tuple[int, int]:
    images = sum(image is not None for image in (study.frontal, study.lateral, study.prior_frontal))
    texts = (study.indication, study.technique, study.comparison, study.prior_report, study.report)
    return images, sum(len(text or "") for text in texts)


def _rows(
    encoding: Maira2Encoding,
    values: dict[str, torch.Tensor],
    chosen: list[int],
    source: int,
    ids: list[str],
    wanted: _Filter,
) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    """One batch's kept rows: values (n, d_in) a hook point and the index."""
    cpu = encoding.to("cpu")
    keep = np.zeros(tuple(cpu.roles.shape), dtype=bool)
    lengths = cpu.attention_mask.sum(1).tolist()
    for row, (length, study_id) in enumerate(zip(lengths, ids, strict=True)):
        roles = cpu.roles[row, :length].numpy()
        keep[row, :length] = kept_positions(roles, wanted.table, wanted.seed, study_id, source)
    mask = torch.from_numpy(keep)
    taken = {name: value[mask.to(value.device)].flatten(1).float().cpu() for name, value in values.items()}
    row, position = np.nonzero(keep)
    columns: dict[str, Any] = {
        "study": np.asarray(chosen, dtype=np.int64)[row],
        "position": position.astype(np.int32),
        "role": cpu.roles[mask].numpy(),
        "token": cpu.input_ids[mask].numpy().astype(np.int32),
        "kind": cpu.image_kind[mask].numpy(),
        "patch_row": cpu.patch_row[mask].numpy(),
        "patch_col": cpu.patch_col[mask].numpy(),
        "source": np.full(len(row), source, dtype=np.int8),
    }
    index = pd.DataFrame(columns)
    if wanted.max_norm is not None:
        small = torch.stack([value.norm(dim=1) <= wanted.max_norm for value in taken.values()]).all(0)
        taken = {name: value[small] for name, value in taken.items()}
        index = index.loc[small.numpy()]
    return taken, index


def _ordered(
    parts: list[tuple[dict[str, torch.Tensor], pd.DataFrame]], names: Sequence[str]
) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    """A shard's rows by study, source and position."""
    index = pd.concat([part for _, part in parts], ignore_index=True)[list(COLUMNS)]
    order = np.lexsort((index["position"], index["source"], index["study"]))
    turned = torch.from_numpy(order)
    return {name: torch.cat([v[name] for v, _ in parts])[turned] for name in names}, index.iloc[order]

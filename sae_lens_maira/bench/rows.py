"""The data path of the step benchmark: steps on batches from a store, the caller's time per batch, and mixing.

    share = time of a step on batches in memory / time of a step on batches from the store

Steps of the two kinds take turns. Processor time counts all threads, also those that read ahead; other processes do
not lengthen it. Stores of random rows are written to a temporary folder.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from sae_lens_maira.activations import ActivationStore, StoreProvider, StoreSpec
from sae_lens_maira.activations.rows import COLUMNS
from sae_lens_maira.activations.store_spec import SEGMENT
from sae_lens_maira.bench.arms import Arm, Shape, Way
from sae_lens_maira.bench.checks import wait
from sae_lens_maira.maira2 import TokenRole

HOOK = "hook"
MIXED = {"paper": (20_000, 237, 512), "all": (4_000, 2_938, 41)}
"""Studies, rows per study and studies per shard of the stores whose mixing is counted, by the roles they are like.

Rows per study are those of MAIRA-2's studies; as many studies per shard as harvest would take at 4,096 numbers per row.
"""
WIDTH_BYTES = 4096 * 2
"""Bytes of a row of MAIRA-2."""


def write_store(
    folder: Path,
    d_in: int,
    studies: int,
    rows_per_study: int,
    per_shard: int = 64,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> ActivationStore:
    """Write a complete store of random rows with shuffled shards, as a harvest does.

    Args:
        folder: New folder.
        d_in: Width of the rows.
        studies: Number of studies.
        rows_per_study: Rows of every study.
        per_shard: Studies per shard.
        dtype: Precision of the rows; in float32 the first number of a row is that of its study.
    """
    spec = StoreSpec(
        hooks={HOOK: d_in},
        dtype=dtype,
        shard_studies=per_shard,
        n_studies=studies,
        rates={},
        settings={},
        model="random",
        processor="none",
        versions={},
    )
    store = ActivationStore.create(folder, spec, [f"s{number}" for number in range(studies)])
    generator = torch.Generator().manual_seed(0)
    for shard in range(spec.n_shards):
        study = np.repeat(store.studies_of(shard), rows_per_study)
        index = pd.DataFrame({name: np.zeros(len(study), np.int32) for name in COLUMNS})
        index["study"], index["role"] = study, np.int8(TokenRole.IMAGE)
        order = np.random.default_rng([0, shard]).permutation(len(study))
        values = torch.randn(len(study), d_in, generator=generator)
        if dtype == "float32":
            values[:, 0] = torch.from_numpy(study)
        store.commit(shard, {HOOK: values.to(getattr(torch, dtype))}, index, order)
    return ActivationStore(folder)


def step_share(
    shape: Shape, way: Way, store: ActivationStore, rounds: int, steps: int = 4
) -> dict[str, float]:
    """Milliseconds of a step on batches in memory and from a store, wall and processor time, and their share.

    Args:
        shape: Problem size.
        way: How to train.
        store: Store of rows as wide as the problem.
        rounds: Rounds that count; two come before them.
        steps: Steps per round.
    """
    arm = Arm(shape, way)
    batches: dict[str, Iterator[torch.Tensor]] = {
        "memory": itertools.cycle([shape.rows(number) for number in range(4)]),
        "store": StoreProvider(store, HOOK, shape.batch, device=shape.device),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in batches}
    for turn in range(-2, rounds):
        for name, source in batches.items():
            wait(shape.device)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                arm.step(next(source))
            wait(shape.device)
            took = (time.perf_counter() - wall) * 1e3 / steps, (time.process_time() - cpu) * 1e3 / steps
            times[name] += [took] if turn >= 0 else []
    found: dict[str, float] = {}
    for place, clock in enumerate(("wall", "cpu")):
        medians = {name: float(np.median([t[place] for t in taken])) for name, taken in times.items()}
        found |= {f"{name}_{clock}_ms": round(ms, 2) for name, ms in medians.items()}
        found[f"share_{clock}"] = round(medians["memory"] / medians["store"], 3)
    return found


def caller_ms(
    store: ActivationStore, batch: int, device: str, ahead: int | None, batches: int = 60
) -> dict[str, float]:
    """Milliseconds that the thread which trains spends per batch, p50 and p80 of wall time and the mean of its own CPU.

    With a thread that works ahead a batch is asked for once it is ready, as after a long step.

    Args:
        store: The store.
        batch: Rows per batch.
        device: Device of the batches.
        ahead: Batches that a thread prepares; 0 prepares them in the caller's thread.
        batches: Batches that count.
    """
    provider: Any = StoreProvider(store, HOOK, batch, device=device, ahead=ahead)
    next(provider)
    wall, cpu = [], []
    for _ in range(batches):
        for job in list(provider._prepared):
            job.result()
        wait(device)
        began, used = time.perf_counter(), time.thread_time()
        next(provider)
        wall.append((time.perf_counter() - began) * 1e3)
        cpu.append((time.thread_time() - used) * 1e3)
    p50, p80 = np.percentile(wall, [50, 80])
    return {"p50": round(float(p50), 3), "p80": round(float(p80), 3), "cpu": round(float(np.mean(cpu)), 3)}


def counted_mixing(
    store: ActivationStore, batch: int, batches: int = 400, **provider: Any
) -> dict[str, float]:
    """Effective studies per batch: counted in batches, expected from the index, and ideal.

    Args:
        store: Store of `write_store` in float32.
        batch: Rows per batch.
        batches: Batches to count.
        **provider: Arguments of `StoreProvider`, such as buffer_rows.
    """
    rows = StoreProvider(store, HOOK, batch, **provider)
    squares = []
    for _ in range(batches):
        share = np.bincount(next(rows)[:, 0].long().numpy()) / batch
        squares.append((share**2).sum())
    expected, ideal = rows.mixing.effective(rows.buffer_rows // SEGMENT), rows.mixing.ideal
    counted = float(1 / np.mean(squares))
    return {
        "counted": round(counted),
        "expected": round(expected),
        "ideal": round(ideal),
        "share": round(counted / ideal, 3),
        "buffer_rows": rows.buffer_rows,
        "buffers_gb_at_4096": round(2 * rows.buffer_rows * WIDTH_BYTES / 1e9, 2),
    }


def data_path(
    shape: Shape, ways: Mapping[str, Way], rounds: int, rows_per_study: int = 512
) -> dict[str, Any]:
    """What reading, checking and shuffling rows adds to a step.

    Args:
        shape: Problem size.
        ways: Ways to train, by name.
        rounds: Rounds per way.
        rows_per_study: Rows of each of the 256 studies of the store.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "rows", shape.d_in, 256, rows_per_study)
        found["step"] = {name: step_share(shape, way, store, rounds) for name, way in ways.items()}
        threads = {"own thread": 0, "prefetch thread": 2}
        found["caller_ms"] = {
            name: caller_ms(store, shape.batch, shape.device, ahead) for name, ahead in threads.items()
        }
    return found


def mixing_by_roles() -> dict[str, dict[str, float]]:
    """`counted_mixing` of the stores of `MIXED`, whose rows are narrow: only their studies matter."""
    found = {}
    for name, (studies, rows, per_shard) in MIXED.items():
        with tempfile.TemporaryDirectory() as folder:
            thin = write_store(Path(folder) / name, 2, studies, rows, per_shard, "float32")
            found[f"mixing_{name}"] = counted_mixing(thin, 4096)
    return found


__all__ = ["caller_ms", "counted_mixing", "data_path", "mixing_by_roles", "step_share", "write_store"]

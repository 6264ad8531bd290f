"""Training from a store against the step alone, and how well batches mix: `python benchmarks/data_path.py`.

    share = time of a step on batches in memory / time of a step on batches that are read, checked and shuffled

Steps of the two kinds take turns. Processor time counts all threads, also those that read ahead; other processes do
not lengthen it. A store of random rows is written first and removed at the end.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gpu import TINY, Arm, Size

from sae_lens_maira.activations import ActivationStore, StoreProvider, StoreSpec
from sae_lens_maira.activations.rows import COLUMNS
from sae_lens_maira.maira2 import TokenRole

CPU = Size(1024, 8192, 1024, 32, "cpu")
HOOK = "hook"


def write_store(
    folder: Path, d_in: int, studies: int, rows_per_study: int, per_shard: int = 64
) -> ActivationStore:
    """A complete store of random bfloat16 rows, in study order as a harvest writes them."""
    spec = StoreSpec(
        hooks={HOOK: d_in},
        dtype="bfloat16",
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
        store.commit(
            shard, {HOOK: torch.randn(len(study), d_in, generator=generator).bfloat16()}, index, order
        )
    return ActivationStore(folder)


def compare(size: Size, store: ActivationStore, rounds: int, **options: Any) -> dict[str, float]:
    """Milliseconds of a step on batches in memory and from the store, wall and processor time, and their share."""
    arm = Arm(size, **options)
    memory = arm.batches
    provider = StoreProvider(store, HOOK, size.batch, device=size.device)
    times: dict[str, list[tuple[float, float]]] = {"memory": [], "store": []}
    for turn in range(-2, rounds):
        for name, batches in (("memory", memory), ("store", provider)):
            arm.batches = batches
            _wait(size.device)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(4):
                arm.step()
            _wait(size.device)
            took = (time.perf_counter() - wall) * 250, (time.process_time() - cpu) * 250
            times[name] += [took] if turn >= 0 else []
    found: dict[str, float] = {}
    for place, clock in enumerate(("wall", "cpu")):
        medians = {name: sorted(t[place] for t in taken)[len(taken) // 2] for name, taken in times.items()}
        found |= {f"{name}_{clock}_ms": round(ms, 2) for name, ms in medians.items()}
        found[f"share_{clock}"] = round(medians["memory"] / medians["store"], 3)
    return found


def mixing(store: ActivationStore, batch: int, buffer_rows: int) -> dict[str, float]:
    """Effective studies per batch, as computed from the index, and the ideal."""
    provider = StoreProvider(store, HOOK, batch, buffer_rows=buffer_rows)
    found, ideal = provider.mixing()
    return {"effective": round(found), "ideal": round(ideal), "share": round(found / ideal, 3)}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--tiny", action="store_true", help="to check the script itself")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    size = TINY if args.tiny else Size() if args.device == "cuda" else CPU
    with tempfile.TemporaryDirectory() as folder:
        rows = 64 if args.tiny else 512
        store = write_store(Path(folder) / "store", size.d_in, 256, rows)
        found: dict[str, Any] = {"this package": compare(size, store, args.rounds, ours=True)}
        if size.device == "cuda":
            found["this package, autocast"] = compare(
                size, store, args.rounds, ours=True, autocast=True, sole_writer=True
            )
        narrow = {
            "237 rows per study (a tenth of the patches)": (4096, 237),
            "2,938 rows per study (all tokens)": (512, 2938),
        }
        for name, (studies, per_study) in narrow.items() if not args.tiny else ():
            thin = write_store(Path(folder) / f"thin{studies}", 4, studies, per_study, 256)
            for buffer_rows in (65536, 1 << 20):
                found[f"mixing, {name}, buffer of {buffer_rows:,} rows"] = mixing(thin, 4096, buffer_rows)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Times the harvest and the store: `python benchmarks/harvest.py --json`.

    throughput  = t(bare transformers forward) / t(harvest), of the same studies in the same batches
      cut       = the decoder ends after the hooked layer, nothing is kept or written
      full      = the whole model with its logits
    reading     = bytes of rows that batches were made of / t, from the page cache
    first batch = time from opening a store to its first shuffled batch

All variants include the preprocessing of the studies. They alternate within each round, and ratios are taken within a
round, since other work on the machine changes wall clock times by more than the difference between variants. CPU
seconds are compared too, since cores may be shared. The store that is read contains repeated rows and is deleted
afterwards.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from timing import CPU, WALL, clocks, interleaved

from sae_lens_maira.activations import ActivationStore, RowSettings, StoreProvider, StoreSpec, harvest
from sae_lens_maira.activations.reader import study_length
from sae_lens_maira.maira2 import Maira2, TokenRole
from sae_lens_maira.phantom import generate_studies, load_phantom
from sae_lens_maira.studies import Study

LAYER = 3  # of 8: half of the decoder
HOOK = f"blocks.{LAYER}.hook_resid_post"
BATCH = 8
WANTED = {"cut": 0.95, "full": 1.7}
GB = 1e9


def median(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Median with its 95 % bootstrap interval."""
    draws = np.random.default_rng(seed).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high), "n": len(values)}


def measure_harvest(studies: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Measure throughput compared with the two bare forwards."""
    maira = load_phantom()
    chosen = generate_studies(studies, seed=50_000)
    batches = like_the_harvest(chosen)
    layers: Any = maira.model.model.language_model.layers
    language: Any = maira.model.model.language_model

    def encoded(batch: list[Study]) -> dict[str, torch.Tensor]:
        return maira.processor.encode(batch, report="teacher", padding_side="right").model_inputs()

    @torch.no_grad()
    def cut() -> None:
        language.layers = layers[: LAYER + 1]
        try:
            for batch in batches:
                maira.model.model(**encoded(batch), use_cache=False)
        finally:
            language.layers = layers

    @torch.no_grad()
    def full() -> None:
        for batch in batches:
            maira.model(**encoded(batch), use_cache=False)

    def ours() -> None:
        kept(maira, chosen, folder / "harvest")

    sides = {"harvest": ours, "cut": cut, "full": full}
    seconds = interleaved(sides, rounds)
    found: dict[str, Any] = {
        "studies": studies,
        "rows": len(ActivationStore(folder / "harvest")),
        "studies_per_s": {name: median(studies / taken[:, WALL]) for name, taken in seconds.items()},
    }
    for name in ("cut", "full"):
        for clock, unit in ((WALL, "wall"), (CPU, "cpu")):
            found[f"{name}_{unit}"] = median(seconds[name][:, clock] / seconds["harvest"][:, clock])
    return found


def like_the_harvest(studies: list[Study], shard: int = 256) -> list[list[Study]]:
    """Make the same batches as the harvest."""
    found = []
    for first in range(0, len(studies), shard):
        part = sorted(studies[first : first + shard], key=study_length)
        found += [part[start : start + BATCH] for start in range(0, len(part), BATCH)]
    return found


def kept(maira: Maira2, studies: list[Study], folder: Path) -> None:
    """Run one harvest into an empty folder: the roles of `paper` and a quarter of the patches."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = RowSettings(roles="paper", rates={"image": 0.25}, batch_size=BATCH)
    harvest(maira, studies, folder, [HOOK], settings, progress=False)


def measure_reading(size_gb: float, width: int, seconds: float, workers: int, folder: Path) -> dict[str, Any]:
    """Measure first batch and throughput of a store of `size_gb` GB, rows of `width` bfloat16 numbers."""
    store = made_store(folder / "store", size_gb, width)
    drop_from_cache(store.folder)
    cold = clocks(lambda: next(StoreProvider(ActivationStore(store.folder), HOOK, 4096)))[0]
    warm = np.array(
        [clocks(lambda: next(StoreProvider(ActivationStore(store.folder), HOOK, 4096))) for _ in range(5)]
    )
    small = cached_store(store, folder / "cached", 3)
    for shard in small.committed():
        small.read(HOOK, shard)
    provider = StoreProvider(small, HOOK, 4096, workers=workers)
    next(provider)
    rates, cpu = [], []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(rates) < 5:
        wall, used = clocks(lambda: [next(provider) for _ in range(16)])
        done = 16 * 4096 * width * 2 / GB
        rates.append(done / wall)
        cpu.append(used / done)
    shards = small.committed()
    blocks = [clocks(lambda s=s: small.read(HOOK, s))[0] for s in shards for _ in range(4)]
    sizes = [small.rows[s] * width * 2 / GB for s in shards for _ in range(4)]
    return {
        "size_gb": len(store) * width * 2 / GB,
        "rows": len(store),
        "width": width,
        "first_batch_cold_s": cold,
        "first_batch_s": median(warm[:, 0]),
        "first_batch_cpu_s": median(warm[:, 1]),
        "shuffled_gb_per_s": median(np.array(rates)),
        "shuffled_cpu_s_per_gb": median(np.array(cpu)),
        "in_order_gb_per_s": median(np.array(sizes) / np.array(blocks)),
    }


def made_store(folder: Path, size_gb: float, width: int) -> ActivationStore:
    """Make a store of equal shards of about 340 MB: one is written, the others are copies of its files."""
    rows, studies = 5 * 8192, 256
    shards = max(1, round(size_gb * GB / (rows * width * 2)))
    spec = StoreSpec(
        hooks={HOOK: width},
        dtype="bfloat16",
        shard_studies=studies,
        n_studies=shards * studies,
        rates={"report": 1.0},
        settings={},
        model="",
        processor="",
        versions={},
    )
    store = ActivationStore.create(folder, spec, [f"s{i}" for i in range(spec.n_studies)])
    values = torch.randn(4096, width).to(torch.bfloat16).repeat(rows // 4096, 1)
    numbers = np.arange(rows)
    columns: dict[str, Any] = dict.fromkeys(("position", "token"), numbers.astype(np.int32))
    columns |= dict.fromkeys(("view", "patch_row", "patch_col", "source"), np.zeros(rows, np.int8))
    index = pd.DataFrame(columns | {"study": numbers * studies // rows, "role": np.int8(TokenRole.REPORT)})
    store.commit(0, {HOOK: values}, index)
    for shard in range(1, shards):
        for path in folder.glob("shard-000000.*"):
            if path.suffix == ".json":
                entry = path.read_text().replace("shard-000000", f"shard-{shard:06d}")
                (folder / f"shard-{shard:06d}.json").write_text(entry)
            else:
                shutil.copyfile(path, folder / path.name.replace("000000", f"{shard:06d}"))
    return ActivationStore(folder)


def cached_store(store: ActivationStore, folder: Path, shards: int) -> ActivationStore:
    """Make a store of the first shards (hard links), small enough to stay in the page cache."""
    folder.mkdir()
    for path in store.folder.iterdir():
        if path.name in ("store.json", "studies.json") or int(path.name[6:12]) < shards:
            os.link(path, folder / path.name)
    return ActivationStore(folder)


def drop_from_cache(folder: Path) -> None:
    """Drop the files from the page cache, on systems that support this."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def table(found: dict[str, Any]) -> str:
    """Format the figures as lines."""

    def interval(value: dict[str, float]) -> str:
        return f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g}, n {value['n']})"

    lines = []
    if "harvest" in found:
        made = found["harvest"]
        lines.append(f"harvest at {HOOK}, {made['studies']} phantom studies, {made['rows']:,} rows:")
        lines += [f"  {name:8} {interval(value)} studies/s" for name, value in made["studies_per_s"].items()]
        for name, wanted in WANTED.items():
            lines += [
                f"  of the {name} forward, {unit}: {interval(made[f'{name}_{unit}'])}; wanted {wanted}"
                for unit in ("wall", "cpu")
            ]
    if "reading" in found:
        read = found["reading"]
        lines += [
            f"store of {read['size_gb']:.1f} GB, {read['rows']:,} rows of {read['width']} bfloat16:",
            f"  first batch {interval(read['first_batch_s'])} s, {interval(read['first_batch_cpu_s'])} CPU s, "
            f"from disk {read['first_batch_cold_s']:.2f} s; wanted 2 s",
            f"  shuffled, checked batches {interval(read['shuffled_gb_per_s'])} GB/s, "
            f"{interval(read['shuffled_cpu_s_per_gb'])} CPU s/GB; wanted 1 GB/s",
            f"  in order, checked {interval(read['in_order_gb_per_s'])} GB/s",
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark: a table on standard error, and with --json the figures on standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    parser.add_argument(
        "--studies", type=int, default=128, help="phantom studies of one harvest; 0 leaves it out"
    )
    parser.add_argument("--rounds", type=int, default=9, help="times that every side runs")
    parser.add_argument(
        "--store-gb", type=float, default=2.0, help="size of the store to read; 0 leaves it out"
    )
    parser.add_argument("--width", type=int, default=4096, help="numbers a row of that store")
    parser.add_argument("--seconds", type=float, default=20.0, help="of shuffled reading")
    parser.add_argument("--workers", type=int, default=2, help="threads that read")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    machine = "{cores} cores, load {load:.1f}, torch {torch}, {threads} threads\n"
    sys.stderr.write(machine.format(**found))
    with tempfile.TemporaryDirectory() as scratch:
        if options.studies:
            found["harvest"] = measure_harvest(options.studies, options.rounds, Path(scratch))
            sys.stderr.write(table({"harvest": found["harvest"]}) + "\n")
        if options.store_gb:
            found["reading"] = measure_reading(
                options.store_gb, options.width, options.seconds, options.workers, Path(scratch)
            )
            sys.stderr.write(table({"reading": found["reading"]}) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

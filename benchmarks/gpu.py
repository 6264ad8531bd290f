"""Measure the fused step on one GPU in at most ten minutes: `python benchmarks/gpu.py --out gpu.json`.

    ceilings        copy bandwidth, bfloat16, TF32 and float32 products at the encoder's size
    errors          triton against the sparse backend: loss and every gradient
    arms            the arms of `bench step`, one after another: uniform firing with 0, 2,048 and 8,192 dead latents,
                    Zipf firing with 0 and 2,048; launches, host syncs and peak memory
    data path       steps on batches from a store against steps on batches in memory; the caller's time per batch
    kernels         device time per kernel

It is `sae-lens-maira bench step` in an order of value, with a clock: sections that do not fit into the time limit are
skipped and named. The last lines are its table. `--device cpu` runs everything at a tiny size, to check the script
itself; figures of such a run mean nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sae_lens_maira.bench import ARMS, Arm, Shape
from sae_lens_maira.bench.arms import chosen_arms
from sae_lens_maira.bench.checks import errors_of, host_work, kernels_of, peak_above, wait
from sae_lens_maira.bench.report import environment, rows_lines, table_of_arms
from sae_lens_maira.bench.rows import data_path
from sae_lens_maira.bench.step import quantiles, time_arms

SIZE = Shape(d_in=4096, d_sae=16384, batch=4096, k=64, device="cuda")
TINY = Shape(d_in=32, d_sae=128, batch=64, k=4, device="cpu")
ORDER = (
    *("saelens_autocast", "fused_autocast_sole_writer", "fused_candidates_sole_writer", "fused", "saelens"),
    *("saelens_autocast_compiled", "saelens_tf32", "fused_autocast_graphs", "fused_candidates_graphs"),
    *("saelens_fused_adam", "saelens_compiled", "fused_autocast", "fused_candidates"),
)
"""Arms, the most telling ones first."""


@dataclass
class Run:
    """Results, printed at once, and the clock."""

    limit: float
    began: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, value: Any) -> None:
        """Keep and print one result."""
        self.found[name] = value
        sys.stdout.write(f"[{time.monotonic() - self.began:4.0f} s] {name}: {json.dumps(value)}\n")
        sys.stdout.flush()

    def section(self, name: str, run: Callable[[], Any], share: float = 1.0) -> None:
        """Run a part; a failure or a lack of time costs this part only, and is noted."""
        if time.monotonic() - self.began > self.limit * share:
            return self.note(name, "skipped, no time left")
        try:
            self.note(name, run())
        except (RuntimeError, ValueError, AssertionError) as error:
            self.note(name, f"failed: {type(error).__name__}: {str(error)[:300]}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def ceilings(shape: Shape, rounds: int) -> dict[str, float]:
    """What the device reaches with nothing of this package."""
    x, w = shape.rows(), torch.randn(shape.d_sae, shape.d_in, device=shape.device)
    big = torch.empty(shape.batch * shape.d_sae, device=shape.device)
    other = torch.empty_like(big)
    half_x, half_w = x.bfloat16(), w.bfloat16()

    def ms(run: Callable[[], object]) -> float:
        return milliseconds(run, shape.device, rounds)

    found = {"copy_gb_s": 8 * len(big) / 1e6 / ms(lambda: other.copy_(big))}
    flop = 2 * shape.batch * shape.d_in * shape.d_sae / 1e9
    for name, left, right in (("bf16", half_x, half_w), ("fp32", x, w), ("tf32", x, w)):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        found[f"{name}_tflop_s"] = flop / ms(lambda left=left, right=right: left @ right.T)
    torch.set_float32_matmul_precision("highest")
    return {name: round(value, 1) for name, value in found.items()}


def milliseconds(run: Callable[[], object], device: str, rounds: int) -> float:
    """Median of wall time, the device idle before and after."""
    times = []
    for _ in range(rounds + 2):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        times.append((time.perf_counter() - began) * 1e3)
    return quantiles(times[2:])["p50"]


def figures_of(name: str, shape: Shape, settings: Sequence[str], rounds: int) -> dict[str, Any]:
    """Milliseconds, launches and syncs by setting of the dead latents, and peak bytes above the parameters."""
    arm = Arm(shape, ARMS[name])
    times, _ = time_arms(shape, {name: arm}, settings, rounds, 3)
    work = {setting: host_work(arm, shape.rows(), shape.dead[setting]) for setting in settings}
    found = {setting: {"ms": times[setting][name], "host": work[setting]} for setting in settings}
    return found | {"peak_bytes": peak_above(arm, shape.rows())}


def tables(found: dict[str, Any], device: str) -> str:
    """The tables of uniform and of Zipf firing."""
    lines = [f"on {device}"]
    for title in ("uniform", "zipf"):
        measured = {
            name: figures
            for name in ARMS
            if isinstance(figures := found.get(f"{title}: {name}"), dict) and figures
        }
        settings = dict.fromkeys(
            key for figures in measured.values() for key in figures if key != "peak_bytes"
        )
        lines.append(f"{title} firing, a new batch per step")
        parts = {
            part: {s: {name: figures[s][part] for name, figures in measured.items()} for s in settings}
            for part in ("ms", "host")
        }
        lines += table_of_arms(parts["ms"], parts["host"])
    path = found.get("data path")
    return "\n".join([*lines, *rows_lines(path if isinstance(path, dict) else {})]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, in order of value."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit", type=float, default=570, help="seconds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        sys.stderr.write(
            "gpu: torch sees no CUDA device. Use a CUDA build of torch, or --device cpu to try the script.\n"
        )
        return 2
    shape = SIZE if gpu else TINY
    rounds = args.rounds if gpu else 1
    run = Run(args.limit)
    about = environment(args.device)
    if not gpu:
        about["device"] += ", tiny: figures mean nothing"
    run.note("environment", about)
    ways = chosen_arms(["all"], args.device)
    run.section("ceilings", lambda: ceilings(shape, rounds))
    fast: Any = "tf32" if gpu else "bf16"
    zipf = replace(shape, zipf=True)
    for options in ({}, {"autocast": True}, {"candidates": fast}):
        backend = "triton" if gpu else "sparse"
        run.section(f"errors {options}", lambda o=options, b=backend: errors_of(zipf, b, **o), 0.5)
    order = [name for name in ORDER if name in ways and (gpu or not ways[name].compiled)]
    for name in order:
        dead = ("idle", "on", "many")
        run.section(f"uniform: {name}", lambda n=name, d=dead: figures_of(n, shape, d, rounds), 0.7)
        if not ways[name].compiled:
            dead = ("idle", "on")
            run.section(f"zipf: {name}", lambda n=name, d=dead: figures_of(n, zipf, d, rounds), 0.75)
    fastest = {
        n: ways[n] for n in ("fused_autocast_sole_writer", "fused_candidates_sole_writer") if n in ways
    }
    per_study = 512 if gpu else 16
    run.section(
        "data path", lambda: data_path(shape, fastest or {"fused": ways["fused"]}, rounds, per_study), 0.8
    )
    for name in order[:3]:
        run.section(f"kernels: {name}", lambda n=name: kernels_of(Arm(shape, ways[n]), shape.rows()))
    args.out.write_text(json.dumps(run.found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(tables(run.found, about["device"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure the fused step on one GPU in at most ten minutes: `python benchmarks/gpu.py --out gpu.json`.

    ceilings        copy bandwidth, bfloat16, TF32 and float32 products at the encoder's size
    correctness     triton against the sparse backend: loss and every gradient
    whole steps     this package and SAELens' trainer, on batches that change, with 0, 2,048 and 8,192 dead latents,
                    with uniform and with Zipf-distributed firing; launches and host syncs of each
    data path       steps on batches from a store against steps on batches in memory (`data_path.py`)
    stages          device time per kernel

Sections that do not fit into the time limit are skipped and named. `--device cpu` runs everything at a tiny size, to
check the script itself; figures of such a run mean nothing.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.kernels import StepSpec, Weights, fused_step
from sae_lens_maira.training import FusedSAETrainer


@dataclass(frozen=True)
class Size:
    """The problem: `tiny` checks the script on a CPU."""

    d_in: int = 4096
    d_sae: int = 16384
    batch: int = 4096
    k: int = 64
    device: str = "cuda"

    @property
    def widths(self) -> tuple[int, ...]:
        """Cumulative level widths."""
        return (self.d_sae // 16, self.d_sae * 3 // 16, self.d_sae // 2, self.d_sae)

    def sae(self, zipf: bool) -> MatryoshkaBatchTopKTrainingSAE:
        """An SAE with unequal decoder norms; biases make latents fire by Zipf's law if asked for."""
        torch.manual_seed(0)
        sae = MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(
                d_in=self.d_in,
                d_sae=self.d_sae,
                k=self.k,
                matryoshka_widths=list(self.widths),
                device=self.device,
            )
        )
        with torch.no_grad():
            sae.W_dec.mul_(0.5 + torch.rand(self.d_sae, 1, device=self.device))
            if zipf:
                rank = 1 + torch.randperm(self.d_sae, device=self.device).float()
                sae.b_enc.copy_(2.5 - 0.75 * rank.log())
        return sae


TINY = Size(32, 128, 64, 4, "cpu")


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


def milliseconds(run: Callable[[], Any], device: str, rounds: int, warm_up: int = 3) -> dict[str, float]:
    """p20, p50 and p80 of wall time, the device idle before and after."""
    times = []
    for turn in range(-warm_up, rounds):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if turn >= 0:
            times.append((time.perf_counter() - start) * 1e3)
    quantiles = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {name: round(value, 3) for name, value in zip(("p20", "p50", "p80"), quantiles, strict=True)}


def ceilings(size: Size, rounds: int) -> dict[str, float]:
    """What the device reaches with nothing of this package."""
    x, w = (
        torch.randn(size.batch, size.d_in, device=size.device),
        torch.randn(size.d_sae, size.d_in, device=size.device),
    )
    big = torch.empty(size.batch * size.d_sae, device=size.device)
    other = torch.empty_like(big)
    flop = 2 * size.batch * size.d_in * size.d_sae / 1e9
    half_x, half_w = x.bfloat16(), w.bfloat16()
    found = {
        "copy_gb_s": 8 * len(big) / 1e6 / milliseconds(lambda: other.copy_(big), size.device, rounds)["p50"]
    }
    for name, product in (
        ("bf16", lambda: half_x @ half_w.T),
        ("fp32", lambda: x @ w.T),
        ("tf32", lambda: x @ w.T),
    ):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        found[f"{name}_tflop_s"] = flop / milliseconds(product, size.device, rounds)["p50"]
    torch.set_float32_matmul_precision("highest")
    return {name: round(value, 1) for name, value in found.items()}


def errors(size: Size, backend: Any, **options: Any) -> dict[str, float]:
    """Relative errors of loss and gradients against the sparse backend in float32, an eighth of the latents dead."""
    sae = size.sae(zipf=True)
    weights = Weights(*(p.detach() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)))
    x = torch.randn(size.batch, size.d_in, device=size.device)
    dead = torch.zeros(size.d_sae, dtype=torch.bool, device=size.device)
    dead[::8] = True
    ours = fused_step(weights, x, StepSpec(k=size.k, widths=size.widths, **options), dead, backend=backend)
    exact = fused_step(weights, x, StepSpec(k=size.k, widths=size.widths), dead, backend="sparse")
    pairs = {"loss": (ours.loss, exact.loss)}
    pairs |= {
        n: (a, b) for n, a, b in zip(ours.gradients._fields, ours.gradients, exact.gradients, strict=True)
    }
    return {n: float((a.double() - b.double()).norm() / b.double().norm()) for n, (a, b) in pairs.items()}


class Arm:
    """One way to train; `step` runs one whole step on the next batch."""

    def __init__(
        self,
        size: Size,
        ours: bool,
        autocast: bool = False,
        tf32: bool = False,
        compiled: bool = False,
        zipf: bool = False,
        n_dead: int = 0,
        **options: Any,
    ) -> None:
        self.size, self.tf32, self.n_dead = size, tf32, n_dead
        cfg = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=size.batch,
            lr=1e-4,
            lr_end=1e-4,
            device=size.device,
            autocast=autocast,
            dead_feature_window=10**6,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer: Any
        if ours:
            self.trainer = FusedSAETrainer(cfg, size.sae(zipf), iter(()), **options)
        else:
            self.trainer = SAETrainer(cfg, size.sae(zipf), iter(()))
            for group in self.trainer.optimizer.param_groups:
                group["fused"] = True
            if compiled:
                vars(self.trainer.sae)["training_forward_pass"] = torch.compile(
                    self.trainer.sae.training_forward_pass
                )
        self.batches = itertools.cycle(
            torch.randn(size.batch, size.d_in, generator=torch.Generator().manual_seed(seed)).to(size.device)
            for seed in range(4)
        )

    def step(self) -> None:
        """Forward, backward, clip, Adam, statistics."""
        silent = self.trainer.n_forward_passes_since_fired
        silent.zero_()
        if self.n_dead:
            silent[:: self.size.d_sae // self.n_dead][: self.n_dead] = 2.0 * 10**6
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        self.trainer._train_step(self.trainer.sae, next(self.batches))
        torch.set_float32_matmul_precision("highest")


def whole_step(make: Callable[[], Arm], rounds: int) -> dict[str, Any]:
    """Time of a step, peak memory, and host syncs as torch reports them."""
    arm = make()
    device = arm.size.device
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = milliseconds(arm.step, device, rounds)
    if device == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            arm.step()
        torch.cuda.set_sync_debug_mode("default")
        found["syncs"] = sum("synchronizing" in str(warning.message) for warning in caught)
    return found


def stages(make: Callable[[], Arm]) -> dict[str, Any]:
    """Device milliseconds and launches per step, by kernel, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    arm = make()
    for _ in range(4):
        arm.step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if arm.size.device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(3):
            arm.step()
        _wait(arm.size.device)
    kernels = [e for e in profiler.key_averages() if e.device_type.name == "CUDA"]
    rows = sorted(((e.self_device_time_total / 3e3, e.count / 3, e.key[:70]) for e in kernels), reverse=True)
    top = [{"ms": round(ms, 3), "launches": round(n, 1), "kernel": key} for ms, n, key in rows[:25]]
    return {"busy_ms": round(sum(r[0] for r in rows), 3), "launches": sum(r[1] for r in rows), "kernels": top}


def data_path(size: Size, rounds: int, options: dict[str, Any]) -> dict[str, float]:
    """What reading, checking and shuffling rows adds to a step."""
    from data_path import compare, write_store

    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", size.d_in, 256, 512 if size.device == "cuda" else 16)
        return compare(size, store, rounds, **options)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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
    size = Size() if gpu else TINY
    rounds = args.rounds if gpu else 1
    run = Run(args.limit)
    run.note("device", torch.cuda.get_device_name() if gpu else "cpu, tiny: figures mean nothing")
    run.note("torch", torch.__version__)
    fast: Any = "tf32" if gpu else "bf16"
    ours: dict[str, Any] = {"ours": True, "backend": "triton" if gpu else "sparse", "sole_writer": gpu}
    arms: dict[str, dict[str, Any]] = {
        "ours, autocast": ours | {"autocast": True},
        "ours, candidates (exact)": ours | {"candidates": fast},
        "ours, float32": ours,
        "ours, autocast, 2048 dead": ours | {"autocast": True, "n_dead": size.d_sae // 8},
        "ours, autocast, 8192 dead": ours | {"autocast": True, "n_dead": size.d_sae // 2},
        "ours, autocast, Zipf": ours | {"autocast": True, "zipf": True},
        "ours, candidates, Zipf": ours | {"candidates": fast, "zipf": True},
        "SAELens, autocast": {"ours": False, "autocast": True},
        "SAELens, autocast, 2048 dead": {"ours": False, "autocast": True, "n_dead": size.d_sae // 8},
        "SAELens, autocast, 8192 dead": {"ours": False, "autocast": True, "n_dead": size.d_sae // 2},
        "SAELens, TF32": {"ours": False, "tf32": True},
        "SAELens, float32": {"ours": False},
        "ours, float32, 2048 dead": ours | {"n_dead": size.d_sae // 8},
    }
    if gpu:
        arms["SAELens, autocast, compiled"] = {"ours": False, "autocast": True, "compiled": True}
        arms["SAELens, float32, compiled"] = {"ours": False, "compiled": True}
        arms["ours, autocast, CUDA graphs"] = ours | {"autocast": True, "cuda_graph": True}
        arms["ours, candidates, CUDA graphs"] = ours | {"candidates": fast, "cuda_graph": True}
    run.section("ceilings", lambda: ceilings(size, rounds))
    backend = "triton" if gpu else "sparse"
    for options in ({}, {"autocast": True}, {"candidates": fast}):
        run.section(f"errors {options}", lambda options=options: errors(size, backend, **options), 0.5)
    for name, options in arms.items():
        run.section(name, lambda options=options: whole_step(lambda: Arm(size, **options), rounds), 0.8)
    run.section("data path", lambda: data_path(size, rounds, ours | {"autocast": True}), 0.85)
    for name in list(arms)[:3]:
        run.section(f"stages: {name}", lambda name=name: stages(lambda: Arm(size, **arms[name])))
    args.out.write_text(json.dumps(run.found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time one whole training step (`bench step`): SAELens' trainer as it comes, SAELens tuned, and ours, in one run.

    step = forward, backward, clip, Adam, schedules and firing statistics; ratio = median SAELens / median ours

Arms start from equal weights and take turns within every round, so that a machine that slows down slows all of them;
figures are quantiles over rounds. Every round has a batch of its own, the same for all arms, so that no threshold is
known beforehand. The bare encoder product is timed in the same rounds: no step can be faster. Gradients are compared
with SAELens' autograd on the same batch. Data are Gaussian; with --zipf a few latents fire on most tokens.
"""

import argparse
import ctypes
import gc
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.io import save_figure
from sae_lens_maira.kernels import Workspace, fused_step
from sae_lens_maira.training.architectures import StepPlan
from sae_lens_maira.training.trainer import FusedSAETrainer

LABELS = {
    "saelens": "SAELens, default",
    "saelens_fused_adam": "SAELens, fused Adam",
    "saelens_tf32": "SAELens, fused Adam, TF32",
    "saelens_autocast": "SAELens, fused Adam, autocast",
    "saelens_autocast_compiled": "SAELens, fused Adam, autocast, compiled",
    "fused": "this package",
    "fused_autocast": "this package, autocast",
    "fused_autocast_sole_writer": "this package, autocast, sole writer",
    "fused_candidates": "this package, low-precision candidates (exact)",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One problem size."""

    d_in: int
    d_sae: int
    batch: int
    k: float
    widths: tuple[int, ...] = ()
    """Cumulative widths of the levels; a sixteenth, three sixteenths, a half and all of d_sae if empty."""
    device: str
    autocast: bool
    zipf: bool = False
    """Whether a few latents fire on most tokens and most hardly ever, as in trained SAEs."""

    @property
    def levels(self) -> list[int]:
        """Cumulative widths of the levels."""
        return list(self.widths) or [self.d_sae * share // 16 for share in (1, 3, 8, 16)]

    def sae(self) -> MatryoshkaBatchTopKTrainingSAE:
        """A new SAE with unequal decoder norms and non-zero biases, the same every time."""
        torch.manual_seed(0)
        cfg = MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=self.d_in, d_sae=self.d_sae, k=self.k, matryoshka_widths=self.levels, device=self.device
        )
        sae = MatryoshkaBatchTopKTrainingSAE(cfg)
        with torch.no_grad():
            sae.W_dec.mul_(0.5 + torch.rand(self.d_sae, 1, device=self.device))
            sae.b_enc.normal_(0, 0.02)
            sae.b_dec.normal_(0, 0.02)
            if self.zipf:
                rank = 1 + torch.randperm(self.d_sae, device=self.device).float()
                sae.b_enc.add_(2.5 - 0.75 * rank.log())
        return sae

    def rows(self, number: int = 0) -> torch.Tensor:
        """Batch `number`, (batch, d_in)."""
        generator = torch.Generator().manual_seed(1 + number)
        return torch.randn(self.batch, self.d_in, generator=generator).to(self.device)


class Arm:
    """One way to train, with its own SAE and the optimisation settings of all arms.

    Args:
        shape: Problem size.
        make: `SAETrainer` or `FusedSAETrainer`.
        tuned: What is changed of SAELens' trainer: "adam" (torch's fused one), "tf32", "compile".
        autocast: Whether products run in bfloat16; as the shape has it if None.
        **settings: Arguments of `FusedSAETrainer`.
    """

    def __init__(
        self, shape: Shape, make: Any, *tuned: str, autocast: bool | None = None, **settings: Any
    ) -> None:
        self.shape, self.tf32 = shape, "tf32" in tuned
        cfg = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=shape.batch,
            lr=1e-4,
            lr_end=1e-4,
            device=shape.device,
            autocast=shape.autocast if autocast is None else autocast,
            dead_feature_window=10**6,
        )
        self.trainer: Any = make(cfg, shape.sae(), iter(()), **settings)
        for group in self.trainer.optimizer.param_groups if "adam" in tuned else ():
            group["fused"] = True
        sae = self.trainer.sae
        if "compile" in tuned:
            vars(sae)["training_forward_pass"] = torch.compile(sae.training_forward_pass)

    def step(self, x: torch.Tensor, n_dead: int) -> None:
        """One whole step; `n_dead` evenly spaced latents count as dead."""
        silent = self.trainer.n_forward_passes_since_fired
        silent.zero_()
        if n_dead:
            silent[:: max(1, self.shape.d_sae // n_dead)][:n_dead] = 2.0 * 10**6
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        self.trainer._train_step(self.trainer.sae, x)
        torch.set_float32_matmul_precision("highest")


def arms_for(shape: Shape) -> dict[str, Arm]:
    """The arms that run on the shape's device; "saelens" and "fused" are always among them."""
    cuda, ours = shape.device == "cuda", FusedSAETrainer
    arms = {"saelens": Arm(shape, SAETrainer), "saelens_fused_adam": Arm(shape, SAETrainer, "adam")}
    if cuda:
        arms["saelens_tf32"] = Arm(shape, SAETrainer, "adam", "tf32", autocast=False)
        arms["saelens_autocast"] = Arm(shape, SAETrainer, "adam", autocast=True)
        arms["saelens_autocast_compiled"] = Arm(shape, SAETrainer, "adam", "compile", autocast=True)
    arms["fused"] = Arm(shape, ours)
    if not shape.autocast:
        arms["fused_candidates"] = Arm(shape, ours, candidates="tf32" if cuda else "bf16")
        if cuda:
            arms["fused_autocast"] = Arm(shape, ours, autocast=True)
            arms["fused_autocast_sole_writer"] = Arm(shape, ours, autocast=True, sole_writer=True)
    return arms


def measure(shape: Shape, rounds: int, warm_up: int, aux: str, cpu_time: bool = False) -> dict[str, Any]:
    """Time every arm.

    Args:
        shape: Problem size.
        rounds: Rounds that count.
        warm_up: Rounds before them.
        aux: Setting of the dead latents, or "both" or "all", as --aux.
        cpu_time: Count the processor time of all threads, which other processes do not lengthen.

    Returns:
        What `bench step --json` prints, without shape, device, versions and scaling.
    """
    arms = arms_for(shape)
    n_dead = {"idle": 0, "on": shape.d_in // 2, "many": shape.d_sae // 2}
    settings = {"both": ["idle", "on"], "all": list(n_dead)}.get(aux, [aux])
    times: dict[str, dict[str, list[float]]] = {setting: {name: [] for name in arms} for setting in settings}
    products: list[float] = []
    encoder, on_cpu, x = arms["fused"].trainer.sae, shape.device == "cpu", shape.rows()
    h = torch.empty((shape.d_sae, len(x)) if on_cpu else (len(x), shape.d_sae), device=shape.device)
    clock = time.process_time if cpu_time else time.perf_counter

    def timed(run: Callable[[], None]) -> float:
        """Milliseconds of one run, with an idle GPU before and after."""
        wait = torch.cuda.synchronize if shape.device == "cuda" else lambda: None
        wait()
        start = clock()
        run()
        wait()
        return (clock() - start) * 1e3

    @torch.no_grad()
    def product() -> None:
        with torch.autocast(shape.device, torch.bfloat16, enabled=shape.autocast):
            if shape.autocast:
                torch.mm(x, encoder.W_enc)
            elif on_cpu:  # latent by latent, as our step has it: the faster layout on a CPU
                torch.addmm(encoder.b_enc[:, None], encoder.W_enc.T, x.T, out=h)
            else:
                torch.addmm(encoder.b_enc, x, encoder.W_enc, out=h)

    order = list(arms)
    for turn in range(-warm_up, rounds):
        for number, setting in enumerate(settings):
            x = shape.rows((turn + warm_up) * len(settings) + number)
            for name in order:
                ms = timed(lambda arm=arms[name], n=n_dead[setting], x=x: arm.step(x, n))
                times[setting][name] += [ms] if turn >= 0 else []
        products += [timed(product)][: max(0, turn + 1)]
        order = order[1:] + order[:1]

    result = {aux: {name: quantiles(ms) for name, ms in by_arm.items()} for aux, by_arm in times.items()}
    saelens, fused = (result[settings[0]][name]["p50"] for name in ("saelens", "fused"))
    gemm = quantiles(products)["p50"]
    return {
        "saelens_ms": saelens,
        "fused_ms": fused,
        "ratio": round(saelens / fused, 2),
        "encoder_gemm_ms": gemm,
        "encoder_share": round(gemm / fused, 3),
        "grad_rel_err": gradient_error(shape, x),
        "peak_bytes": peak_above(arms["fused"], x),
        "saelens_peak_bytes": peak_above(arms["saelens"], x),
        "backend": arms["fused"].trainer.backend,
        "milliseconds": result,
        "rounds": rounds,
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return {f"p{at}": round(float(ordered.quantile(at / 100)), 3) for at in (20, 50, 80)}


def gradient_error(shape: Shape, x: torch.Tensor) -> float:
    """Largest relative error of a parameter's gradient against SAELens' autograd, a quarter of the latents dead."""
    sae: Any = shape.sae()
    dead = torch.zeros(shape.d_sae, dtype=torch.bool, device=shape.device)
    dead[::4] = True
    given = TrainStepInput(x, {}, dead, n_training_steps=0, is_logging_step=False)
    with torch.autocast(shape.device, torch.bfloat16, enabled=shape.autocast):
        sae.training_forward_pass(given).loss.backward()
    plan = StepPlan(sae, shape.autocast)
    ours = fused_step(plan.weights(), x, plan.spec, dead).gradients
    errors = [(ours.W_enc_t.T - sae.W_enc.grad).norm() / sae.W_enc.grad.norm()]
    for name in ("b_enc", "W_dec", "b_dec"):
        expected = getattr(sae, name).grad
        errors.append((getattr(ours, name) - expected).norm() / expected.norm())
    return float(max(errors))


def peak_above(arm: Arm, x: torch.Tensor) -> int | None:
    """Peak bytes of one step above parameters, gradients and moments; None where the system does not count them.

    CUDA's caching allocator counts; on Linux the kernel's largest resident size, reset after the heap was trimmed, so
    that memory freed earlier hides nothing. What a backend keeps between steps counts as the step's own.
    """
    arm.step(x, 0)  # moments exist from the first step on
    if isinstance(arm.trainer, FusedSAETrainer):
        arm.trainer._workspace = Workspace()
    gradients = sum(p.numel() * p.element_size() for p in arm.trainer.sae.parameters())
    gc.collect()
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        arm.step(x, 0)
        return torch.cuda.max_memory_allocated(x.device) - before - gradients
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None

    def resident(field: str) -> int:
        return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024

    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = resident("VmRSS")
    arm.step(x, 0)
    return resident("VmHWM") - before - gradients


def environment(device: str) -> dict[str, Any]:
    """Name of the device, with the number of threads on a CPU, and versions of what is measured."""
    found = {name: metadata.version(name) for name in ("torch", "sae-lens", "sae-lens-maira")}
    found["triton"] = metadata.version("triton") if find_spec("triton") else "not installed"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
        name = model[1] if model else platform.processor() or platform.machine()
        name += f", {torch.get_num_threads()} threads"
    return {"device": name, "versions": {"python": platform.python_version(), **found}}


def table(report: dict[str, Any]) -> str:
    """Milliseconds p20 / p50 / p80 by arm and ratio to SAELens' default, for every auxiliary setting."""
    shape = report["shape"]
    lines = [
        f"d_in {shape['d_in']}, d_sae {shape['d_sae']}, batch {shape['batch']}, k {shape['k']:g}, {shape['dtype']}, "
        f"on {report['device']}, backend {report['backend']}, {report['rounds']} rounds, "
        f"{'Zipf' if shape['zipf'] else 'uniform'} firing, a new batch per step",
        f"{'':48s}{'p20':>10s}{'p50':>10s}{'p80':>10s}{'ratio':>8s}",
    ]
    for setting, arms in report["milliseconds"].items():
        lines.append(f"auxiliary loss {setting}")
        for name, ms in arms.items():
            figures = "".join(f"{ms[q]:10.1f}" for q in ("p20", "p50", "p80"))
            lines.append(f"  {LABELS[name]:46s}{figures}{arms['saelens']['p50'] / ms['p50']:8.2f}")
    lines.append(
        f"encoder product alone {report['encoder_gemm_ms']:.1f} ms, {report['encoder_share']:.0%} of our step; "
        f"gradient error {report['grad_rel_err']:.1e}"
    )
    if report["peak_bytes"] is not None:
        ours, theirs = report["peak_bytes"] / 2**20, report["saelens_peak_bytes"] / 2**20
        lines.append(f"peak above parameters, gradients, moments: {ours:.0f} MiB, SAELens {theirs:.0f} MiB")
    lines += [
        f"  {axis} {point[axis]:6d}: SAELens {point['saelens_ms']:9.1f} ms, ours {point['fused_ms']:8.1f} ms, "
        f"encoder {point['encoder_gemm_ms']:8.1f} ms, ratio {point['ratio']:.2f}"
        for axis, points in report["scaling"].items()
        for point in points
    ]
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw bars of the medians, and the scaling curves if they were measured."""
    from matplotlib.figure import Figure

    scaling = {axis: points for axis, points in report["scaling"].items() if points}
    figure = Figure(figsize=(6 + 4 * len(scaling), 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + len(scaling), squeeze=False)[0]
    settings: dict[str, dict[str, Any]] = report["milliseconds"]
    for place, (setting, arms) in enumerate(settings.items()):
        rows = [index + (place - (len(settings) - 1) / 2) * 0.38 for index in range(len(arms))]
        low, mid, high = ([ms[q] for ms in arms.values()] for q in ("p20", "p50", "p80"))
        panels[0].barh(
            rows, mid, 0.36, xerr=abs(np.array([low, high]) - mid), label=f"auxiliary loss {setting}"
        )
        panels[0].set_yticks(range(len(arms)), [LABELS[name] for name in arms])
    panels[0].invert_yaxis()
    panels[0].axvline(report["encoder_gemm_ms"], color="black", linestyle=":", label="encoder product alone")
    panels[0].set_xlabel("ms per step, p50 with p20 to p80")
    panels[0].legend(fontsize="small")
    for panel, (axis, points) in zip(panels[1:], scaling.items(), strict=True):
        sizes = [point[axis] for point in points]
        for key, label in (("saelens", "SAELens"), ("fused", "this package"), ("encoder_gemm", "encoder")):
            panel.plot(sizes, [point[f"{key}_ms"] for point in points], marker="o", label=label)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms per step")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.legend(fontsize="small")
    figure.suptitle(report["device"], fontsize="small")
    save_figure(figure, path, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="sae-lens-maira bench step", description=about)
    gpu = torch.cuda.is_available()
    for name, small, large in (("d-in", 1024, 4096), ("d-sae", 8192, 16384), ("batch", 1024, 4096)):
        parser.add_argument(f"--{name}", type=int, default=large if gpu else small)
    parser.add_argument("--k", type=float, default=64 if gpu else 32)
    parser.add_argument("--widths", type=int, nargs="+", default=(), help="cumulative; 1/16, 3/16, 1/2, 1")
    parser.add_argument("--dtype", choices=["float32", "autocast"], default="float32")
    dead = "dead latents: none, d_in / 2, d_sae / 2; both: the first two"
    parser.add_argument("--aux", choices=["idle", "on", "many", "both", "all"], default="both", help=dead)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    for name, effect in (
        ("zipf", "a few latents fire on most tokens, as after training"),
        ("cpu-time", "processor time instead of wall time; on a busy CPU"),
        ("scaling", "also half and double d_sae and batch"),
        ("json", "one JSON object on stdout"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=effect)
    parser.add_argument("--png", type=Path, default=Path("step_bench.png"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark: a table on stderr, a figure, and with --json one object on stdout."""
    args = parse(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    names = ("d_in", "d_sae", "batch", "k", "device", "zipf")
    given: dict[str, Any] = {name: vars(args)[name] for name in names}
    shape = Shape(widths=tuple(args.widths), autocast=args.dtype == "autocast", **given)
    report = measure(shape, args.rounds, args.warm_up, args.aux, args.cpu_time) | environment(args.device)
    report["shape"] = {name: vars(args)[name] for name in (*names, "dtype")} | {"widths": shape.levels}
    report["scaling"] = {"d_sae": [], "batch": []}
    for axis, points in report["scaling"].items() if args.scaling else ():
        for size in (vars(args)[axis] * m // 2 for m in (1, 2, 4)):
            widths = shape.widths if axis == "batch" or size == shape.d_sae else ()
            scaled = replace(shape, **{axis: size, "widths": widths})
            result = measure(scaled, max(3, args.rounds // 2), 1, "idle", args.cpu_time)
            figures = {key: result[key] for key in ("saelens_ms", "fused_ms", "encoder_gemm_ms", "ratio")}
            points.append({"d_sae": scaled.d_sae, "batch": scaled.batch, **figures})
    sys.stderr.write(table(report))
    draw(report, args.png)
    if args.json:
        sys.stdout.write(json.dumps(report) + "\n")
    return 0

"""Times one whole training step: SAELens' trainer as it comes, SAELens tuned, and ours, in one run.

    step = forward, backward, clip, Adam, schedules and firing statistics; ratio = median SAELens / median ours

Arms take turns within every round, so that a machine that slows down slows all of them; figures are quantiles over
rounds. Every round has a batch of its own, the same for all arms, so that no threshold is known beforehand. The bare
encoder product is timed in the same rounds: no step can be faster. Gradients are compared with SAELens' autograd on the
same batch. Data are Gaussian; with --zipf a few latents fire on most tokens.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput

from sae_lens_maira.kernels import fused_step
from sae_lens_maira.training.architectures import StepPlan
from sae_lens_maira.training.benchmark_arms import Shape, arms_for
from sae_lens_maira.training.benchmark_report import draw, table
from sae_lens_maira.training.peak_memory import peak_above

QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}


def measure(shape: Shape, rounds: int, warm_up: int, aux: str, cpu_time: bool = False) -> dict[str, Any]:
    """Times every arm; milliseconds by arm, and what the issue's keys need."""
    x = shape.rows()
    arms = arms_for(shape)
    settings = {"idle": 0, "on": shape.d_in // 2, "many": shape.d_sae // 2}
    wanted = {"both": ["idle", "on"], "all": list(settings)}.get(aux, [aux])
    timings: dict[str, dict[str, list[float]]] = {setting: {name: [] for name in arms} for setting in wanted}
    products: list[float] = []
    encoder = arms["fused"].trainer.sae
    on_cpu = shape.device == "cpu"
    size = (shape.d_sae, shape.batch) if on_cpu else (shape.batch, shape.d_sae)
    h = torch.empty(size, device=shape.device)

    def product() -> None:
        with torch.no_grad(), torch.autocast(shape.device, torch.bfloat16, enabled=shape.autocast):
            if shape.autocast:
                torch.mm(x, encoder.W_enc)
            elif on_cpu:  # latent by latent, the faster way there and the one of our step
                torch.addmm(encoder.b_enc[:, None], encoder.W_enc.T, x.T, out=h)
            else:
                torch.addmm(encoder.b_enc, x, encoder.W_enc, out=h)

    order = list(arms)
    for turn in range(-warm_up, rounds):
        for setting in wanted:
            x = shape.rows((turn + warm_up) * len(wanted) + wanted.index(setting))
            for name in order:
                taken = timed(
                    lambda arm=arms[name], n=settings[setting], x=x: arm.step(x, n), shape.device, cpu_time
                )
                if turn >= 0:
                    timings[setting][name].append(taken)
        taken = timed(product, shape.device, cpu_time)
        if turn >= 0:
            products.append(taken)
        order = order[1:] + order[:1]

    result = {
        setting: {name: quantiles(values) for name, values in by_arm.items()}
        for setting, by_arm in timings.items()
    }
    first = result[wanted[0]]
    saelens, fused, gemm = first["saelens"]["p50"], first["fused"]["p50"], quantiles(products)["p50"]
    peaks = {
        name: peak_above(arms[name].trainer, lambda arm=arms[name]: arm.step(x, 0))
        for name in ("saelens", "fused")
    }
    return {
        "saelens_ms": saelens,
        "fused_ms": fused,
        "ratio": round(saelens / fused, 2),
        "encoder_gemm_ms": gemm,
        "encoder_share": round(gemm / fused, 3),
        "grad_rel_err": gradient_error(shape, x),
        "peak_bytes": peaks["fused"],
        "saelens_peak_bytes": peaks["saelens"],
        "backend": arms["fused"].trainer.backend,
        "milliseconds": result,
        "rounds": rounds,
    }


def timed(run: Callable[[], None], device: str, cpu_time: bool = False) -> float:
    """Milliseconds that `run` takes, the device's queue drained before and after.

    Args:
        run: What is timed.
        device: "cpu" or "cuda".
        cpu_time: Count the processor time of all threads, which other processes do not lengthen.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) * 1e3


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return {name: round(float(ordered.quantile(q)), 3) for name, q in QUANTILES.items()}


def gradient_error(shape: Shape, x: torch.Tensor) -> float:
    """Largest relative error of a parameter's gradient against SAELens' autograd, a quarter of the latents dead."""
    sae = shape.sae()
    dead = torch.zeros(shape.d_sae, dtype=torch.bool, device=shape.device)
    dead[::4] = True
    with torch.autocast(shape.device, torch.bfloat16, enabled=shape.autocast):
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
            )
        )
    output.loss.backward()
    plan = StepPlan(sae, shape.autocast)
    ours = fused_step(plan.weights(), x, plan.spec, dead).gradients
    pairs = [
        (ours.W_enc_t.T, sae.W_enc),
        (ours.b_enc, sae.b_enc),
        (ours.W_dec, sae.W_dec),
        (ours.b_dec, sae.b_dec),
    ]
    errors = [float((a - p.grad).norm() / p.grad.norm()) for a, p in pairs if p.grad is not None]
    return max(errors)


def default_widths(d_sae: int) -> tuple[int, ...]:
    """A sixteenth, three sixteenths, a half, all."""
    return (d_sae // 16, d_sae * 3 // 16, d_sae // 2, d_sae)


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    found = {"python": platform.python_version()}
    for package in ("torch", "sae-lens", "sae-lens-maira", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: str) -> str:
    """The device in words, with the number of threads on a CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = named[0] if named else model
    return f"{model}, {torch.get_num_threads()} threads"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sae-lens-maira bench step", description=(__doc__ or "").split("\n", 1)[0]
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--d-in", type=int, default=4096 if gpu else 1024)
    parser.add_argument("--d-sae", type=int, default=16384 if gpu else 8192)
    parser.add_argument("--batch", type=int, default=4096 if gpu else 1024)
    parser.add_argument("--k", type=float, default=64 if gpu else 32)
    parser.add_argument(
        "--widths", type=int, nargs="+", default=None, help="cumulative; default 1/16, 3/16, 1/2, 1"
    )
    parser.add_argument("--dtype", choices=["float32", "autocast"], default="float32")
    parser.add_argument(
        "--aux",
        choices=["idle", "on", "many", "both", "all"],
        default="both",
        help="dead latents: none, d_in / 2, d_sae / 2; both: the first two",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument(
        "--zipf", action="store_true", help="a few latents fire on most tokens, as after training"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time instead of wall time; on a busy CPU"
    )
    parser.add_argument("--scaling", action="store_true", help="also half and double d_sae and batch")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--png", type=Path, default=Path("step_bench.png"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: a table on stderr, a figure, and with --json one object on stdout."""
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    widths = tuple(args.widths) if args.widths else default_widths(args.d_sae)

    def shape_of(d_sae: int, batch: int) -> Shape:
        own = widths if d_sae == args.d_sae else default_widths(d_sae)
        autocast = args.dtype == "autocast"
        return Shape(
            d_in=args.d_in,
            d_sae=d_sae,
            batch=batch,
            k=args.k,
            widths=own,
            device=args.device,
            autocast=autocast,
            zipf=args.zipf,
        )

    report = measure(shape_of(args.d_sae, args.batch), args.rounds, args.warm_up, args.aux, args.cpu_time)
    report["shape"] = {
        "d_in": args.d_in,
        "d_sae": args.d_sae,
        "batch": args.batch,
        "k": args.k,
        "widths": list(widths),
        "dtype": args.dtype,
        "zipf": args.zipf,
    }
    report["device"] = device_name(args.device)
    report["versions"] = versions()
    report["scaling"] = {"d_sae": [], "batch": []}
    if args.scaling:
        for axis, sizes in (
            ("d_sae", [(args.d_sae * m // 2, args.batch) for m in (1, 2, 4)]),
            ("batch", [(args.d_sae, args.batch * m // 2) for m in (1, 2, 4)]),
        ):
            for d_sae, batch in sizes:
                point = measure(shape_of(d_sae, batch), max(3, args.rounds // 2), 1, "idle", args.cpu_time)
                point = {key: point[key] for key in ("saelens_ms", "fused_ms", "encoder_gemm_ms", "ratio")}
                report["scaling"][axis].append({"d_sae": d_sae, "batch": batch, **point})
    sys.stderr.write(table(report))
    draw(report, args.png)
    if args.json:
        sys.stdout.write(json.dumps(report) + "\n")
    return 0

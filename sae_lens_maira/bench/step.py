"""Time one whole training step: SAELens' trainer with its defaults, a faster SAELens, and this package's trainer.

    step = forward, backward, clip, Adam, schedules and firing statistics; ratio = median SAELens / median ours

Arms start from equal weights and take turns within every round, so that a machine that slows down slows all of them;
figures are quantiles over rounds. Every round has a batch of its own, the same for all arms. The bare encoder product
is timed in the same rounds: no step can be faster. Gradients are compared with SAELens' autograd on the same batch.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sae_lens_maira.bench.arms import ARMS, Arm, Shape, Way, chosen_arms
from sae_lens_maira.bench.checks import gradient_error, host_work, peak_above, wait
from sae_lens_maira.bench.report import draw, environment, table
from sae_lens_maira.bench.rows import data_path, mixing_by_roles

SETTINGS = {"both": ("idle", "on"), "all": ("idle", "on", "many")}
"""Settings of the dead latents that one word of --aux stands for."""


def time_arms(
    shape: Shape,
    arms: Mapping[str, Arm],
    settings: Sequence[str],
    rounds: int,
    warm_up: int,
    clock: Callable[[], float] = time.perf_counter,
    extra: Callable[[torch.Tensor], object] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, float] | None]:
    """Quantiles of milliseconds by setting and arm, and of an extra function of the same batches.

    Args:
        shape: Problem size.
        arms: Arms by name; they take turns, in another order each round.
        settings: Keys of `Shape.dead`.
        rounds: Rounds that count.
        warm_up: Rounds before them.
        clock: Seconds, of the wall or of the processor.
        extra: Function of a batch that is timed once per round as well.
    """

    def timed(run: Callable[[], object]) -> float:
        wait(shape.device)
        start = clock()
        run()
        wait(shape.device)
        return (clock() - start) * 1e3

    times: dict[str, dict[str, list[float]]] = {setting: {name: [] for name in arms} for setting in settings}
    others: list[float] = []
    order, x = list(arms), shape.rows()
    for turn in range(-warm_up, rounds):
        for number, setting in enumerate(settings):
            x = shape.rows((turn + warm_up) * len(settings) + number)
            for name in order:
                ms = timed(lambda arm=arms[name], n=shape.dead[setting], x=x: arm.step(x, n))
                times[setting][name] += [ms] if turn >= 0 else []
        if extra is not None:
            others += [timed(lambda x=x: extra(x))][: max(0, turn + 1)]
        order = order[1:] + order[:1]
    found = {setting: {name: quantiles(ms) for name, ms in by.items()} for setting, by in times.items()}
    return found, quantiles(others) if others else None


def measure(
    shape: Shape, ways: Mapping[str, Way], rounds: int, warm_up: int, aux: str, cpu_time: bool = False
) -> dict[str, Any]:
    """Time every arm and count what its steps ask for.

    Args:
        shape: Problem size.
        ways: Arms by name; "saelens" and "fused" among them.
        rounds: Rounds that count.
        warm_up: Rounds before them.
        aux: Setting of the dead latents, or "both" or "all", as --aux.
        cpu_time: Count the processor time of all threads, which other processes do not lengthen.

    Returns:
        What `bench step --json` prints, without shape, device, versions, scaling and data path.
    """
    arms = {name: Arm(shape, way) for name, way in ways.items()}
    settings, x = SETTINGS.get(aux, (aux,)), shape.rows()
    encoder, on_cpu = arms["fused"].trainer.sae, shape.device == "cpu"
    h = torch.empty((shape.d_sae, len(x)) if on_cpu else (len(x), shape.d_sae), device=shape.device)

    @torch.no_grad()
    def product(x: torch.Tensor) -> None:
        if on_cpu:  # latent by latent, as our step has it: the faster layout on a CPU
            torch.addmm(encoder.b_enc[:, None], encoder.W_enc.T, x.T, out=h)
        else:
            torch.addmm(encoder.b_enc, x, encoder.W_enc, out=h)

    clock = time.process_time if cpu_time else time.perf_counter
    result, products = time_arms(shape, arms, settings, rounds, warm_up, clock, product)
    saelens, fused = (result[settings[0]][name]["p50"] for name in ("saelens", "fused"))
    gemm = products["p50"] if products is not None else 0.0
    host = {s: {name: host_work(arm, x, shape.dead[s]) for name, arm in arms.items()} for s in settings}
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
        "host": host,
        "rounds": rounds,
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return {f"p{at}": round(float(ordered.quantile(at / 100)), 3) for at in (20, 50, 80)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="sae-lens-maira bench step", description=about)
    gpu = torch.cuda.is_available()
    for name, small, large, what in (
        ("d-in", 1024, 4096, "width of the activations"),
        ("d-sae", 8192, 16384, "number of latents"),
        ("batch", 1024, 4096, "rows per step"),
    ):
        default = large if gpu else small
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--k", type=float, default=64 if gpu else 32, help="active latents per row")
    levels = "cumulative widths of the Matryoshka levels; 1/16, 3/16, 1/2 and all of d_sae if not given"
    parser.add_argument("--widths", type=int, nargs="+", default=(), help=levels)
    which = f"{', '.join(ARMS)}, or all; saelens and fused always run; if not given, those of the device"
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "all"], default=[], metavar="ARM", help=which)
    dead = "dead latents: none (idle), d_in / 2 (on), d_sae / 2 (many); both is the first two"
    parser.add_argument("--aux", choices=["idle", "on", "many", "both", "all"], default="both", help=dead)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that are timed")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them")
    parser.add_argument("--threads", type=int, default=None, help="number of CPU threads")
    for name, effect in (
        ("zipf", "let a few latents fire on most tokens, as after training"),
        ("cpu-time", "measure processor time instead of wall time, for a busy CPU"),
        ("data-path", "also time steps on batches from a store, and the caller's time per batch"),
        ("mixing", "also count the studies per batch of stores as large as MAIRA-2's"),
        ("scaling", "also time half and double d_sae and batch"),
        ("json", "print JSON instead of text"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=effect)
    parser.add_argument("--png", type=Path, default=Path("step_bench.png"), help="figure to write")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not gpu:
        parser.error("--device is cuda, but torch finds no CUDA device; use cpu")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: a table on stderr, a figure, and with --json one object on stdout."""
    args = parse(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    names = ("d_in", "d_sae", "batch", "k", "device", "zipf")
    given: dict[str, Any] = {name: vars(args)[name] for name in names}
    shape = Shape(widths=tuple(args.widths), **given)
    ways = chosen_arms(args.arms, args.device)
    report = measure(shape, ways, args.rounds, args.warm_up, args.aux, args.cpu_time) | environment(
        args.device
    )
    report["shape"] = given | {"widths": shape.levels}
    report["scaling"] = {"d_sae": [], "batch": []}
    ends = {name: ways[name] for name in ("saelens", "fused")}
    for axis, points in report["scaling"].items() if args.scaling else ():
        for size in (vars(args)[axis] * m // 2 for m in (1, 2, 4)):
            widths = shape.widths if axis == "batch" or size == shape.d_sae else ()
            scaled = replace(shape, **{axis: size, "widths": widths})
            result = measure(scaled, ends, max(3, args.rounds // 2), 1, "idle", args.cpu_time)
            figures = {key: result[key] for key in ("saelens_ms", "fused_ms", "encoder_gemm_ms", "ratio")}
            points.append({"d_sae": scaled.d_sae, "batch": scaled.batch, **figures})
    report["data_path"] = {}
    if args.data_path:
        ours = {name: way for name, way in ways.items() if way.ours and way.devices}
        report["data_path"] |= data_path(shape, ours, args.rounds)
    if args.mixing:
        report["data_path"] |= mixing_by_roles()
    sys.stderr.write(table(report))
    draw(report, args.png)
    if args.json:
        sys.stdout.write(json.dumps(report) + "\n")


__all__ = ["main", "measure", "quantiles", "time_arms"]

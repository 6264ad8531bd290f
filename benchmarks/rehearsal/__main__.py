"""Run all commands at MAIRA-2's widths: `python -m benchmarks.rehearsal`, or `make rehearsal`.

A random checkpoint in the published layout is written, and every command runs on four studies in a separate process
with two cores and 8 GB. The table has time and peak memory of each; the rehearsal fails where a command fails, takes
more than its bound, or has more than 8 GB resident. `--small` runs the same commands at small widths in one process
and counts tensors only. `--full` writes the published size (27.5 GB of float32, six files) and runs a few steps, which
has up to 24 GB resident, pages of the mapped files included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TIMEOUT_S = 3600


def run_in_process(step: Any, file: Path, limit: int) -> dict[str, Any]:
    """Run a step in a separate process with two cores; what it printed is in a file next to its figures."""
    command = [sys.executable, "-m", "benchmarks.rehearsal.measured", str(file), str(limit), *step.words]
    cores = sorted(os.sched_getaffinity(0))[:2]
    with file.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            ["taskset", "-c", ",".join(map(str, cores)), *command],
            stdout=log,
            stderr=log,
            check=False,
            timeout=TIMEOUT_S,
            env=os.environ
            | {"OMP_NUM_THREADS": str(len(cores)), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
        )
    if not file.exists():
        return {"code": done.returncode or 1}
    return json.loads(file.read_text())


def run_here(step: Any) -> dict[str, Any]:
    """Run a step in this process and count tensors."""
    from benchmarks.rehearsal.measured import run, when_loaded
    from benchmarks.rehearsal.tracker import TensorBytes

    tracker = TensorBytes()
    with when_loaded(lambda _: tracker.start()), tracker:
        code = run(list(step.words))
    return {"code": code, "tensors": tracker.peak, "at_peak": tracker.at_peak}


def problems(step: Any, found: dict[str, Any], limit: float) -> list[str]:
    """Problems of a step, as sentences."""
    if found["code"]:
        return [f"{step.name}: exit code {found['code']}"]
    wrong = []
    if found["tensors"] > step.bound:
        grown = f"{found['tensors'] / 1e6:,.1f} MB of tensors, {step.bound / 1e6:,.1f} MB allowed"
        wrong.append(f"{step.name}: {grown}; {found['at_peak']}")
    if found.get("peak", 0) > limit:
        wrong.append(f"{step.name}: {found['peak'] / 1e9:.1f} GB resident, {limit / 1e9:.0f} GB allowed")
    return wrong


def line(name: str, found: dict[str, Any], bound: float) -> str:
    """Format a row of the table."""

    def gb(key: str) -> str:
        return f"{found[key] / 1e9:.2f}" if key in found else "-"

    seconds = f"{found['seconds']:.0f} | {found['cpu_seconds']:.0f}" if "seconds" in found else "- | -"
    tensors = f"{found.get('tensors', 0) / 1e6:,.1f}"
    return f"| {name} | {seconds} | {gb('peak')} | {gb('above')} | {tensors} | {bound / 1e6:,.1f} |"


HEAD = (
    "| step | s | CPU s | peak GB | above weights GB | tensors MB | bound MB |\n|---|---|---|---|---|---|---|"
)


def main() -> int:
    """Run the rehearsal; 0 if every step stayed within its bounds."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rehearsal", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--work", type=Path, help="folder for everything that is written; a temporary one otherwise"
    )
    parser.add_argument(
        "--small", action="store_true", help="small widths, one process, tensors counted only"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="the published size: 27.5 GB of disk, a machine of 24 GB, few steps",
    )
    parser.add_argument(
        "--only", help="comma-separated beginnings of the steps to run in a folder that has the rest"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        work = arguments.work or Path(made)
        work.mkdir(parents=True, exist_ok=True)
        return rehearse(work, arguments.small, arguments.full, arguments.only)


def rehearse(work: Path, small: bool, full: bool, only: str | None) -> int:
    """Write the checkpoint and the data set where they are missing, and run the steps."""
    from dataclasses import replace

    from benchmarks.rehearsal.checkpoint import Size, write_checkpoint
    from benchmarks.rehearsal.steps import FULL_LIMIT, LIMIT, SMALL, steps
    from benchmarks.rehearsal.studies import write_mimic

    size = SMALL if small else Size() if full else replace(Size(), layers=2)
    limit = FULL_LIMIT if full else LIMIT
    if not (work / "model" / "model.safetensors.index.json").exists():
        write_checkpoint(work / "model", size, "float32" if full else "bfloat16")
    if not (work / "mimic").exists():
        write_mimic(work / "mimic", size.image, 250 if small else 2500)
    wrong: list[str] = []
    figures: dict[str, Any] = {}
    sys.stdout.write(HEAD + "\n")
    for number, step in enumerate(steps(work, small, full)):
        if only and not step.name.startswith(tuple(only.split(","))):
            continue
        found = (
            run_here(step)
            if small
            else run_in_process(step, work / f"step{number:02d}.json", 0 if full else limit)
        )
        wrong += problems(step, found, limit)
        sys.stdout.write(line(step.name, found, step.bound) + "\n")
        sys.stdout.flush()
        figures[step.name] = found
        (work / "figures.json").write_text(json.dumps(figures, indent=1))
        if found["code"]:
            break
    for text in wrong:
        sys.stderr.write(f"{text}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

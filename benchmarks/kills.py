"""Kill commands at random times, run them again, and compare the results with those of runs that were not killed.

    python benchmarks/kills.py --out kills --trials 20
    python benchmarks/kills.py --out kills --commands harvest train

Per trial a command starts in a fresh folder, all its processes get SIGKILL after a random share of the time that the
command takes, and the same command runs once more to its end. Counted are trials in which the kill came before the
end, results that are equal to the reference by SHA-256, file by file, and drafts that were left.

This process imports everything once and forks a child per run, so a run takes as long as its work.
"""

import argparse
import hashlib
import json
import os
import random
import secrets
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from sae_lens_maira.cli import COMMANDS, main
from sae_lens_maira.quickstart import QuickstartConfig, run_quickstart
from sae_lens_maira.recipes import counterfactual_prior
from sae_lens_maira.recipes.steering.steering_table import SteeringRun, run_steering

HOOK = "blocks.1.hook_resid_post"
READ = [
    "--hooks",
    HOOK,
    "--studies",
    "30",
    "--rates",
    "{image: 0.2}",
    "--shard-studies",
    "3",
    "--device",
    "cpu",
]
SAE = ["--sae", "{d_sae: 64, k: 4, matryoshka_widths: [16, 64]}"]
STEPS = {"total_training_samples": 12800, "train_batch_size_samples": 128, "lr": 0.001, "n_checkpoints": 6}
STEPS |= {"checkpoint_path": "checkpoints"}
STEER = ["--finding", "cardiomegaly", "--studies", "40", "--steered", "2", "--max-new-tokens", "6"]
QUICK = {
    "studies": 40,
    "steps": 10,
    "text_steps": 10,
    "text_seeds": 1,
    "seed": 3,
    "d_sae": 64,
    "steer_studies": 4,
}
TABLE = {"parts": ("insert",), "findings": ("cardiomegaly",), "studies": 140, "d_sae": 64, "steps": 20}
TABLE |= {"gradients": 2, "choose": 5, "report": 3, "max_new_tokens": 12, "progress": False}


def jobs(inputs: Path) -> dict[str, Callable[[], int]]:
    """Name -> function that runs the job in the present folder and returns its exit code; results go to `out`."""
    store, sae, records = str(inputs / "store"), str(inputs / "sae"), str(inputs / "records")
    seen = ["--sae", sae, "--studies", "30", "--study-seed", "0"]
    words = {
        "harvest": ["harvest", *READ, "--store", "out"],
        "train": ["train", *READ, "--store", store, "--out", "out", *SAE, "--trainer", json.dumps(STEPS)],
        "latents": ["latents", *seen, "--store", store, "--out", "out", "--top", "4"],
        "interpret run": ["interpret", "run", "--records", "out"],
        "dashboards html": ["dashboards", "html", "--records", records, "--out", "out"],
        "dashboards neuronpedia": [
            *("dashboards", "neuronpedia", "--records", records, "--out", "out", "--set-name", "res-1k")
        ],
        "steer": ["steer", "--sae", "phantom-image", "--out", "out", *STEER],
        "evaluate": ["evaluate", *seen[:2], "--studies", "2"],
        "attribute": [
            "attribute",
            "--studies",
            "1",
            "--sentences",
            "[0]",
            "--candidates",
            "16",
            "--out",
            "out",
        ],
    }

    def command(arguments: list[str]) -> Callable[[], int]:
        return lambda: main(arguments)

    def recipe(run: Callable[[], object]) -> Callable[[], int]:
        return lambda: 0 if run() else 1

    return {name: command(given) for name, given in words.items()} | {
        "quickstart": recipe(
            lambda: run_quickstart(QuickstartConfig(out=Path("out"), progress=False, **QUICK))
        ),
        "recipe counterfactual_prior": recipe(
            lambda: counterfactual_prior.run(
                counterfactual_prior.Settings(out=Path("out"), studies=12, latents=4)
            )
        ),
        "recipe steering_table": recipe(lambda: run_steering(SteeringRun(out=Path("out"), **TABLE))),
    }


def run(job: Callable[[], int], folder: Path, seconds: float | None = None) -> int:
    """Run a job in a child process, in a folder; SIGKILL all its processes after `seconds`.

    Returns:
        The exit code, negative for a signal.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(
                os.open(folder.parent / f"{folder.name}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC),
                number,
            )
        code = 1
        try:
            code = job()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result_of(folder: Path) -> dict[str, str]:
    """SHA-256 of what a job wrote: of every file, and of its standard output where it writes no file."""
    out = folder / "out"
    files = sorted(path for path in out.rglob("*") if path.is_file())
    files = files or [folder.parent / f"{folder.name}.stdout"]
    names = [path.relative_to(out).as_posix() if path.is_relative_to(out) else "stdout" for path in files]
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in zip(names, files, strict=True)}


def prepare(folder: Path, name: str, inputs: Path) -> Path:
    """A fresh folder for one run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name == "interpret run":  # it writes into the record set
        shutil.copytree(inputs / "records", folder / "out")
    return folder


def trials(
    name: str, job: Callable[[], int], inputs: Path, out: Path, count: int, seed: int
) -> dict[str, object]:
    """Kill a job `count` times, each in a fresh folder, and finish it."""
    place = out / name.replace(" ", "_")
    reference = prepare(place / "reference", name, inputs)
    began = time.monotonic()
    if run(job, reference):
        raise SystemExit(f"{name} failed without a kill; see {place / 'reference.stderr'}")
    seconds, expected = time.monotonic() - began, result_of(reference)
    draw = random.Random(f"{seed} {name}")
    killed = equal = clean = 0
    different: list[str] = []
    for number in range(count):
        wait = draw.uniform(0.05, 1) * seconds
        folder = prepare(place / f"trial-{number}", name, inputs)
        # Runs differ in length on a machine with other work: a kill that came after the end comes earlier next time.
        while run(job, folder, wait) != -signal.SIGKILL and wait > 0.05 * seconds:
            wait *= 0.6
            folder = prepare(place / f"trial-{number}", name, inputs)
        killed += wait > 0.05 * seconds
        code = run(job, folder)
        found = result_of(folder) if code == 0 else {}
        left = [
            p.name for p in folder.rglob("*") if p.name.endswith((".partial", ".stale", ".saving", ".lock"))
        ]
        equal += found == expected
        clean += not left
        if found == expected and not left:
            shutil.rmtree(folder)
            continue
        changed = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        different.append(f"trial {number}: exit code {code}, differing {changed[:5]}, left {left[:3]}")
    return {
        "command": name, "seconds": round(seconds, 2), "trials": count, "killed": killed, "equal": equal,
        "nothing left": clean, "different": different,
    }  # fmt: skip


def benchmark() -> None:
    """Run all trials and print one JSON line per command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--commands", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no more of torch's threads than its parent had
    for name in COMMANDS:
        COMMANDS[name]  # imports its module
    # Pseudonyms are random; the same ones make results comparable.
    secrets.token_hex = lambda nbytes=None: "0" * 32
    out = options.out.absolute()
    inputs = out / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir(parents=True)
    made = jobs(inputs)
    for name in ("harvest", "train", "latents"):
        folder = prepare(inputs / f"make_{name}", name, inputs)
        if run(made[name], folder):
            raise SystemExit(f"{name} failed; see {folder}.stderr")
        (folder / "out").rename(inputs / {"harvest": "store", "train": "sae", "latents": "records"}[name])
    for name in options.commands or made:
        sys.stdout.write(
            json.dumps(trials(name, made[name], inputs, out, options.trials, options.seed)) + "\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    benchmark()

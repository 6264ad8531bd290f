"""The steps of the rehearsal: every command from a data set to a steered report, and the bytes that each may take.

Bounds are MB of living tensors above the model's weights; without a model, above the start. They hold for the studies
of `studies.write_mimic` and for one kind of checkpoint: "full" for MAIRA-2's widths, "small" for `SMALL`.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rehearsal.checkpoint import Size

LIMIT, FULL_LIMIT = 8_000_000_000, 24_000_000_000
"""Bytes that each command may take, with two layers at full width and at the published size."""
SMALL = Size(layers=2, width=256, mlp=688, heads=4, vision_layers=2, vision_width=64, image=56)

STEPS = (
    # name, MB at full widths, MB at small widths, command
    ("load", 1, 0.1, "call load {model}"),
    ("two ranks load to a device", 1, 0.1, "call ranks {model}"),
    ("studies import", 1, 0.1, "studies import --source mimic --images {mimic} --out {table}"),
    ("studies validate", 1, 0.1, "studies validate {data}"),
    ("run_with_cache, three images", 500, 2.5, "call read {model} {table} {mimic} {hook} 1"),
    ("harvest, two studies per forward", 1_100, 5, "harvest {recipe} {data} --split train --batch-size 2"),
    ("train", 3_000, 9, "train {recipe} {data} --split train {sizes} --out {sae}"),
    (
        "evaluate, two studies",
        1_100,
        33,
        "evaluate {read} --split train --studies 2 --batch-size 2",
    ),
    ("latents --store", 2_500, 140, "latents {read} --split train --store {store} --out {records}"),
    ("interpret run", 1, 0.1, "interpret run --records {records} --n-train 5 --n-test 5"),
    ("dashboards html", 1, 0.1, "dashboards html --records {records} --out {work}/page {allow}"),
    (
        "dashboards neuronpedia",
        1,
        0.1,
        "dashboards neuronpedia --records {records} --out {work}/neuronpedia --set-name res-16k {allow}",
    ),
    (
        "attribute, one sentence",
        1_500,
        73,
        "attribute {read} --split test --studies 1 --report teacher --sentences '[0]' --method gradient "
        "--candidates 8 --n-check 4 --regenerate false {allow} --out {work}/attribution",
    ),
    (
        "steer, five tokens",
        2_700,
        175,
        "steer {read} --split test --finding pleural_effusion --steered 4 --n-latents 2 --strengths '[1.0]' "
        "--max-new-tokens 5 {allow} --out {work}/steered",
    ),
)
FULL_STEPS = (
    # At the published size: name, MB, command. Weights are 13.8 GB in bfloat16.
    ("load", 1, "call load {model}"),
    ("studies import", 1, "studies import --source mimic --images {mimic} --out {table}"),
    ("run_with_cache, three images, to layer 15", 600, "call read {model} {table} {mimic} {hook} 16"),
    (
        "harvest, layer 15, four studies",
        1_100,
        "harvest {recipe} {data} --split train --batch-size 2",
    ),
    ("steer, five tokens", 2_000, "call steer {model} {table} {mimic} {hook} 5"),
)
SCHEDULE = {
    "total_training_samples": "512",
    "train_batch_size_samples": "128",
    "lr_warm_up_steps": "1",
    "lr_decay_steps": "1",
    "n_batches_for_norm_estimate": "2",
    "checkpoint_path": "null",
}


@dataclass(frozen=True)
class Step:
    """One command or call.

    Attributes:
        name: Name in the table.
        words: Words of the command line, or "call" and a function of `calls` with its arguments.
        bound: Bytes of tensors that it may take.
    """

    name: str
    words: tuple[str, ...]
    bound: float


def steps(work: Path, small: bool, full: bool = False) -> list[Step]:
    """All steps in order; each may read what earlier ones wrote.

    Args:
        work: Folder with `model`, `mimic`, and everything that is written.
        small: Whether the checkpoint is `SMALL`; steps that measure processes are then left out.
        full: Whether it has the published size; few steps are run then.
    """
    names = ("model", "mimic", "store", "sae", "records")
    places = {"work": shlex.quote(str(work)), "hook": f"blocks.{15 if full else 0}.hook_resid_post"}
    places |= {name: shlex.quote(str(work / name)) for name in names}
    places["table"] = shlex.quote(str(work / "mimic.parquet"))
    sizes = {"sae.d_sae": "512", "sae.k": "8"} if small else {}
    sizes |= {f"trainer.{name}": value for name, value in SCHEDULE.items()}
    phrases = {
        "data": "--table {table} --root {mimic}",
        "read": "--sae {sae} --model {model} --table {table} --root {mimic}",
        "recipe": "--config recipes/maira2_paper.yaml --model {model} --hooks '[{hook}]' --store {store}",
        "sizes": " ".join(f"--{name} {value}" for name, value in sizes.items()),
        "allow": "--allow-credentialed true",
    }
    places |= {name: phrase.format(**places) for name, phrase in phrases.items()}
    if full:
        return [
            Step(name, tuple(shlex.split(command.format(**places))), 1e6 * most)
            for name, most, command in FULL_STEPS
        ]
    return [
        Step(name, tuple(shlex.split(command.format(**places))), 1e6 * (at_small if small else at_full))
        for name, at_full, at_small, command in STEPS
        if not small or "ranks" not in name
    ]

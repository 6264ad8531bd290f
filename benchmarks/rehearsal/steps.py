"""The steps of the rehearsal: every command from a data set to a steered report, and what each may take.

Bounds are bytes of living tensors above the model's weights; without a model, above the start. They hold for the
studies of `studies.write_mimic` and for one kind of checkpoint: "full" for MAIRA-2's widths, "small" for `SMALL`.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.rehearsal.checkpoint import Size

SMALL = Size(layers=2, width=256, mlp=688, heads=4, vision_layers=2, vision_width=64, image=56)
HOOK = "blocks.0.hook_resid_post"
FINDING = "pleural_effusion"


@dataclass(frozen=True)
class Step:
    """One command or call.

    Attributes:
        name: Name in the table.
        words: Words of the command line, or "call" and a function of `calls` with its arguments.
        full: Bound at MAIRA-2's widths, bytes.
        small: Bound at the widths of `SMALL`, bytes.
        calls: Whether the step is left out of the small form, because it measures processes.
    """

    name: str
    words: tuple[str, ...]
    full: float
    small: float
    processes: bool = False


def steps(work: Path, small: bool) -> list[Step]:
    """All steps in order; each may read what earlier ones wrote.

    Args:
        work: Folder with `model`, `mimic`, and everything that is written.
        small: Whether the checkpoint is `SMALL`.
    """
    model, mimic, table = str(work / "model"), str(work / "mimic"), str(work / "mimic.parquet")
    store, sae, records = str(work / "store"), str(work / "sae"), str(work / "records")
    data = ("--table", table, "--root", mimic)
    recipe = (
        "--config",
        "recipes/maira2_paper.yaml",
        "--model",
        model,
        "--hooks",
        f"[{HOOK}]",
        "--store",
        store,
    )
    train = ("--split", "train")
    width = {"d_sae": 512, "k": 8} if small else {"d_sae": 16384, "k": 64}
    size = [word for name, value in width.items() for word in (f"--sae.{name}", str(value))]
    schedule = {
        "total_training_samples": 512,
        "train_batch_size_samples": 128,
        "lr_warm_up_steps": 1,
        "lr_decay_steps": 1,
        "n_batches_for_norm_estimate": 2,
        "checkpoint_path": "null",
    }
    options = [word for name, value in schedule.items() for word in (f"--trainer.{name}", str(value))]
    page = ("--allow-credentialed", "true")
    short = ("--max-new-tokens", "5")
    gb, mb = 1e9, 1e6
    return [
        Step("load", ("call", "load", model), 0.05 * gb, 1 * mb),
        Step("two ranks load to a device", ("call", "ranks", model), 0.05 * gb, 1 * mb, processes=True),
        Step(
            "studies import",
            ("studies", "import", "--source", "mimic", "--images", mimic, "--out", table),
            0.05 * gb,
            1 * mb,
        ),
        Step(
            "studies validate", ("studies", "validate", "--table", table, "--root", mimic), 0.05 * gb, 1 * mb
        ),
        Step(
            "run_with_cache, three images", ("call", "read", model, table, mimic, HOOK, "1"), 0.5 * gb, 2 * mb
        ),
        Step("harvest", ("harvest", *recipe, *data, *train, "--batch-size", "2"), 1.5 * gb, 5 * mb),
        Step("train", ("train", *recipe, *data, *train, *size, *options, "--out", sae), 4 * gb, 10 * mb),
        Step(
            "evaluate, two studies",
            (
                "evaluate",
                "--sae",
                sae,
                "--model",
                model,
                *data,
                *train,
                "--studies",
                "2",
                "--batch-size",
                "2",
            ),
            2 * gb,
            10 * mb,
        ),
        Step(
            "latents --store",
            ("latents", "--sae", sae, "--model", model, *data, *train, "--store", store, "--out", records),
            2 * gb,
            20 * mb,
        ),
        Step(
            "interpret run",
            ("interpret", "run", "--records", records, "--n-train", "5", "--n-test", "5"),
            gb,
            10 * mb,
        ),
        Step(
            "dashboards html",
            ("dashboards", "html", "--records", records, "--out", str(work / "page"), *page),
            gb,
            5 * mb,
        ),
        Step(
            "dashboards neuronpedia",
            (
                "dashboards",
                "neuronpedia",
                "--records",
                records,
                "--out",
                str(work / "neuronpedia"),
                "--set-name",
                "res-16k",
                *page,
            ),
            gb,
            5 * mb,
        ),
        Step(
            "attribute, one sentence",
            (
                "attribute",
                "--sae",
                sae,
                "--model",
                model,
                *data,
                "--split",
                "test",
                "--studies",
                "1",
                "--report",
                "teacher",
                "--sentences",
                "[0]",
                "--candidates",
                "8",
                "--n-check",
                "4",
                "--regenerate",
                "false",
                *page,
                "--out",
                str(work / "attribution"),
            ),
            4 * gb,
            20 * mb,
        ),
        Step(
            "steer, five tokens",
            (
                "steer",
                "--sae",
                sae,
                "--model",
                model,
                *data,
                "--split",
                "test",
                "--finding",
                FINDING,
                "--steered",
                "4",
                "--n-latents",
                "2",
                "--strengths",
                "[1.0]",
                *short,
                *page,
                "--out",
                str(work / "steered"),
            ),
            6 * gb,
            60 * mb,
        ),
    ]

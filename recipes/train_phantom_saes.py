"""Train the two small SAEs of the phantom that ship in the package, and write their records and names.

    out/image    residual stream after block 3, at image patches        "phantom-image"
    out/text     residual stream after block 6, at report tokens        "phantom-text"

Each folder can be loaded with plain SAELens. Its subfolder `records` contains latent records and offline explanations,
made from studies that the SAE was not trained on. The SAEs are for tests; their results have no medical meaning.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.interface import named_model, phantom_studies
from sae_lens_maira.interp.run import interpret_offline
from sae_lens_maira.latents.collect import CollectConfig, collect_records
from sae_lens_maira.latents.source import ModelSource
from sae_lens_maira.phantom import FINDING_KEYS
from sae_lens_maira.quickstart.sae import Normalization, TrainingPlan, train_sae


@dataclass(frozen=True, kw_only=True)
class PhantomSAE:
    """Settings of one SAE.

    Attributes:
        layer: Decoder block whose output it reads.
        roles: Token roles it reads.
        d_sae: Number of latents.
        k: Mean number of active latents per row.
        steps: Training steps of 1,024 rows.
        lr: Learning rate.
        normalize: `normalize_activations` of SAELens, folded into the weights.
    """

    layer: int
    roles: str
    d_sae: int
    k: float
    steps: int
    lr: float
    normalize: Normalization = "expected_average_only_in"


def train(name: str, settings: PhantomSAE, studies: int, record_studies: int, seed: int, out: Path) -> Path:
    """Train one SAE and write its folder.

    Args:
        name: "image" or "text".
        settings: Settings of the SAE.
        studies: Phantom studies to train on, drawn with seed 20,000 + `seed`.
        record_studies: Studies of the records, drawn with seed 30,000 + `seed`.
        seed: Random seed of studies, initial weights and shuffle.
        out: Folder that receives `name`.
    """
    maira, hook_name = named_model("phantom"), f"blocks.{settings.layer}.hook_resid_post"
    learn = phantom_studies(studies, 20_000 + seed)
    rows = read_rows(maira, learn, hook_name, RowSettings(roles=settings.roles))
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    plan = TrainingPlan(
        folder,
        settings.d_sae,
        settings.k,
        settings.steps,
        seed,
        lr=settings.lr,
        dead_after=settings.steps // 6,
        normalize=settings.normalize,
    )
    trained = train_sae(rows, plan)
    shown = phantom_studies(record_studies, 30_000 + seed)
    records = collect_records(
        ModelSource(maira, shown, hook_name, settings.roles, 32),
        shown,
        trained.inference,
        maira,
        folder / "records",
        CollectConfig(
            sae=f"phantom-{name}",
            top=8,
            intervals=3,
            per_interval=3,
            zero=8,
            keep_images=False,
            seed=seed,
            salt="phantom",
        ),
        findings=FINDING_KEYS,
    )
    interpret_offline(records)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Read the settings, train both SAEs, print their folders."""
    parser = ArgumentParser(description=__doc__, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_argument("--out", type=Path, default=Path("runs/phantom_saes"), help="folder of both SAEs")
    parser.add_argument("--studies", type=int, default=600, help="studies to train on")
    parser.add_argument("--record-studies", type=int, default=240, help="studies of the records")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0 = torch's choice)")
    for name in ("image", "text"):
        parser.add_class_arguments(PhantomSAE, name)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    made = parser.instantiate(options)
    for name in ("image", "text"):
        folder = train(name, made[name], options.studies, options.record_studies, options.seed, options.out)
        sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

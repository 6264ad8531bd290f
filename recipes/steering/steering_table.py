"""Steer every finding, one after the other, and write one table; a killed run continues.

    studies -> SAEs of patches and of text -> statistics -> a folder per finding and part -> one table

Latents and strengths are chosen on one half of the patients; effects are measured on the other half.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from sae_lens_maira.activations import ActivationRows, RowSettings, read_rows
from sae_lens_maira.checksums import write_parquet
from sae_lens_maira.cli.parser import run_recipe
from sae_lens_maira.errors import ConfigError, InterventionError
from sae_lens_maira.io import atomic_file
from sae_lens_maira.latents import study_firing
from sae_lens_maira.quickstart.sae import TrainingPlan, train_sae
from sae_lens_maira.recipes._shared import require_run
from sae_lens_maira.recipes.steering.candidates import choose_map
from sae_lens_maira.recipes.steering.source import Source
from sae_lens_maira.recipes.steering.table_page import write_tables
from sae_lens_maira.sae import MatryoshkaSAE, load_matryoshka
from sae_lens_maira.stats import f1_of_firing, p99
from sae_lens_maira.steering.cohort import Cohort
from sae_lens_maira.steering.evaluate import SteeringTables, evaluate_steering
from sae_lens_maira.steering.methods import CAUSAL, EVERYWHERE, EXEMPLAR, POOLED, MethodFactory
from sae_lens_maira.steering.statistics import SteeringStatistics, collect_statistics, encoder_of, image_rows

PARTS = ("insert", "remove", "move")
MOVED = "moved"


@dataclass(frozen=True)
class SteeringRun(Source):
    """Settings of a run over findings.

    Attributes:
        out: Folder of tables, figures, SAEs and statistics.
        findings: Keys of findings; empty for all.
        parts: One or more of insert, remove and move; move is for findings with a side.
        methods: Names of `steering_methods` to run, with their controls; empty for all.
        studies: Number of phantom studies; the phantom was not trained on them.
        layer: Decoder layer whose output is steered.
        d_sae: Latents of either SAE.
        k: Mean active latents per token.
        steps: Training steps of 1,024 rows.
        latents: Number of latents per method.
        gradients: Number of studies over which the gradient that ranks latents by output effect is averaged.
        choose: Number of studies on which a strength is chosen.
        report: Number of other studies on which its effect is measured.
        kl: Also measure KL(unsteered || steered) along the unsteered reports.
        seed: Random seed of studies, halves, SAEs and controls.
        progress: Show progress bars.
    """

    out: Path = Path("runs/steering_table")
    findings: tuple[str, ...] = ()
    parts: tuple[str, ...] = PARTS
    methods: tuple[str, ...] = ()
    studies: int = 1200
    layer: int = 0
    d_sae: int = 1024
    k: int = 16
    steps: int = 3000
    latents: int = 32
    gradients: int = 8
    choose: int = 16
    report: int = 40
    kl: bool = True
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        wrong = sorted(set(self.parts) - set(PARTS))
        if wrong:
            raise ConfigError(f"parts names {wrong}; known are {', '.join(PARTS)}.")
        if self.sae is not None and EVERYWHERE in self.methods:
            raise ConfigError(f"{EVERYWHERE!r} needs a text SAE, which is trained only without --sae.")


def run_steering(settings: SteeringRun) -> Path:
    """Run the missing parts and write `table.md`, `table.parquet` and figures; return the folder.

    Raises:
        ConfigError: A finding or part is unknown, or the folder has a run with other settings.
    """
    begun, free = _has_results(settings.out), ("findings", "parts")
    if (
        begun
    ):  # refused before anything is read; a new folder is bound once its settings are known to be right
        require_run(settings, True, free)
    # About one study in five has a finding; this many prompts suffice for the rarest one.
    pool = (7 * settings.choose, 6 * settings.report)
    cohort = settings.cohort(settings.studies, settings.layer, settings.seed, pool)
    findings = settings.findings or cohort.reader.names
    wrong = sorted(set(findings) - set(cohort.reader.names))
    if wrong:
        raise ConfigError(f"findings names {wrong}; known are {', '.join(cohort.reader.names)}.")
    if not begun:
        require_run(settings, False, free)
    wanted = [
        (part, finding)
        for part in settings.parts
        for finding in findings
        if part != "move" or other_side(finding) in cohort.reader.names
    ]
    missing = [(p, f) for p, f in wanted if not (settings.out / f / p / "summary.parquet").exists()]
    if missing:
        factory = prepare(settings, cohort)
        for part, finding in tqdm(missing, desc="findings", unit="finding", disable=not settings.progress):
            if (settings.out / finding / part / "summary.parquet").exists():
                continue  # another process of the same run has finished it
            steer_part(factory, cohort, part, finding, settings).save(settings.out / finding / part)
            write_tables(settings.out)
    write_tables(settings.out)
    return settings.out


def _has_results(out: Path) -> bool:
    patterns = ("settings.json", "sae_*", "statistics_*.safetensors", "*/*/summary.parquet")
    return any(next(out.glob(pattern), None) for pattern in patterns)


def prepare(settings: SteeringRun, cohort: Cohort) -> MethodFactory:
    """Make SAEs and statistics, or read them from the folder."""
    out, maira, hook_name = settings.out, cohort.maira, cohort.hook_name
    if settings.sae is not None:
        file, sae = out / "statistics_image.safetensors", settings.image_sae()
        if not file.exists():
            chosen = np.flatnonzero(cohort.halves.choose).tolist()
            collect_statistics(
                image_rows(maira, cohort.studies, chosen, hook_name, settings.progress),
                encoder_of(sae),
                cohort.studies,
                cohort.known,
                cohort.reader,
                settings.findings or None,
                maira,
                settings.gradients,
            ).save(file)
        return MethodFactory(sae, SteeringStatistics.load(file), settings.latents, seed=settings.seed)
    # The text SAE is used by one method only.
    texts = not settings.methods or EVERYWHERE in settings.methods
    places = ("image", "text") if texts else ("image",)
    folders = {place: out / f"sae_{place}" for place in places}
    files = {place: out / f"statistics_{place}.safetensors" for place in folders}
    if not all(file.exists() for file in files.values()):
        taught = np.flatnonzero(cohort.halves.choose)
        rows = read_rows(
            maira,
            [cohort.studies[int(i)] for i in taught],
            hook_name,
            RowSettings(roles="content", batch_size=16, seed=settings.seed),
            progress=settings.progress,
        )
        rows = replace(rows, study=taught[rows.study])
        mine = {"image": rows.is_image, "text": ~rows.is_image}
        for place in places:
            if not (folders[place] / "cfg.json").exists():
                plan = TrainingPlan(folders[place], settings.d_sae, settings.k, settings.steps, settings.seed)
                train_sae(rows.where(mine[place]), plan)
        sae = load_matryoshka(folders["image"])
        collect_statistics(
            [rows.where(mine["image"])],
            encoder_of(sae),
            cohort.studies,
            cohort.known,
            cohort.reader,
            None,
            maira,
            settings.gradients,
        ).save(files["image"])
        if texts:
            save_text_units(rows.where(mine["text"]), load_matryoshka(folders["text"]), cohort, files["text"])
    sae, statistics = load_matryoshka(folders["image"]), SteeringStatistics.load(files["image"])
    text = (load_matryoshka(folders["text"]), *load_text_units(files["text"])) if texts else None
    return MethodFactory(sae, statistics, settings.latents, text, settings.seed)


def steer_part(
    factory: MethodFactory, cohort: Cohort, part: str, finding: str, settings: SteeringRun
) -> SteeringTables:
    """Run one part of one finding.

    Raises:
        InterventionError: There are too few studies, or the part is `move` and the finding has no side.
    """
    labels, read, remove, target = cohort.reader.names, cohort.reader.stated, False, finding
    if part == "insert":
        methods, present, absent = factory.insertion(finding), [], [finding]
    elif part == "remove":
        methods, present, absent, remove = factory.removal(finding), [finding], [], True
    else:
        other = other_side(finding)
        if other is None:
            raise InterventionError(f"{finding!r} has no side, so it cannot be moved to the other one.")
        methods, present, absent = factory.moving(finding, other), [finding], [other]
        target = MOVED
        labels = (*(key for key in cohort.reader.names if key not in (finding, other)), MOVED)

        def moved(text: str) -> frozenset[str] | None:
            stated = cohort.reader.stated(text)
            return stated | {MOVED} if stated and other in stated and finding not in stated else stated

        read = moved

    few = max(8, settings.choose * 3 // 4) if remove else settings.choose
    choose = cohort.pick("choose", present, absent, few)
    kinds = {CAUSAL: None, EXEMPLAR: EXEMPLAR, POOLED: POOLED}
    if part == "insert" and (not settings.methods or set(kinds) & set(settings.methods)):
        choice = choose_map(factory, cohort, finding, choose)
        folder = settings.out / finding / part
        folder.mkdir(parents=True, exist_ok=True)
        write_parquet(choice.table(), folder / "trials.parquet")
        best = {name: choice.best(kind) for name, kind in kinds.items()}
        methods = factory.tried({k: (t.candidate.map, t.strength) for k, t in best.items()}) + methods
    if settings.methods:
        # A control is only run together with its method.
        asked = settings.methods
        methods = [m for m in methods if m.name in asked and (m.control_of or m.name) in asked]
    return evaluate_steering(
        cohort.maira,
        factory.sae,
        cohort.hook_name,
        methods,
        choose,
        cohort.pick("report", present, absent, settings.report),
        target,
        read,
        labels,
        remove=remove,
        p99=factory.statistics.p99,
        max_new_tokens=cohort.max_new_tokens,
        seed=settings.seed,
        progress=settings.progress,
        prompts=cohort.prompts,
        measure_kl=settings.kl,
    )


def other_side(finding: str) -> str | None:
    """Key of the same finding on the other side; None if the key has no side."""
    for side, other in (("_left", "_right"), ("_right", "_left")):
        if finding.endswith(side):
            return finding[: -len(side)] + other
    return None


def save_text_units(rows: ActivationRows, sae: MatryoshkaSAE, cohort: Cohort, file: Path) -> None:
    """Save units and agreement of the text SAE, measured on the selection half."""
    encode, taught = encoder_of(sae), cohort.halves.choose
    mine = rows.where(taught[rows.study])
    fires, _ = study_firing(encode, mine, len(cohort.studies))
    agreement = torch.from_numpy(f1_of_firing(fires[taught], cohort.known[taught]))
    units = p99(encode(mine.values[:: max(1, len(mine) // 20_000)]))
    with atomic_file(file) as draft:
        save_file({"p99": units, "agreement": agreement}, draft)


def load_text_units(file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Load (d_sae,) units and (d_sae, F) agreement."""
    tensors = load_file(file)
    return tensors["p99"], tensors["agreement"]


if __name__ == "__main__":
    sys.exit(run_recipe(SteeringRun, run_steering, __doc__))

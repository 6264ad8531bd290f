"""Steering all findings of the phantom, one after the other, into a folder that a killed run goes on with.

    studies -> SAEs of patches and of text -> what is learned -> a folder per finding and part -> one table

Latents and strengths are chosen on the patients of one half, effects are counted on those of the other. It composes
rooms and computes nothing of its own.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from sae_lens_maira.activations import ActivationRows, harvest_rows
from sae_lens_maira.cli.steering_chosen import choose_map
from sae_lens_maira.cli.steering_learned import Learned, encoder_of, learn
from sae_lens_maira.cli.steering_methods import CAUSAL, EVERYWHERE, EXEMPLAR, POOLED, Bench
from sae_lens_maira.cli.steering_report import write_tables
from sae_lens_maira.cli.steering_subjects import MAX_NEW_TOKENS, Subjects
from sae_lens_maira.errors import ConfigError, InterventionError
from sae_lens_maira.latents import study_firing
from sae_lens_maira.phantom import FINDING_KEYS, load_phantom, read_report
from sae_lens_maira.quickstart.run import KEPT
from sae_lens_maira.quickstart.sae import train_sae
from sae_lens_maira.sae import MatryoshkaSAE, load_matryoshka
from sae_lens_maira.stats import f1_of_firing, p99
from sae_lens_maira.steering.evaluate import SteeringTables, evaluate_steering

PARTS = ("insert", "remove", "move")
MOVED = "moved"


@dataclass(frozen=True)
class SteeringRun:
    """Settings of a run over findings.

    Attributes:
        out: folder of tables, figures, SAEs and what was learned.
        findings: keys; none means all.
        parts: of insert, remove and move; move is for findings with a side.
        methods: names of `steering_methods`, to run only these, controls only with their method; none means all.
        studies: phantom studies, none of which the phantom was trained on.
        layer: decoder layer whose output is steered.
        d_sae: latents of either SAE.
        k: mean active latents a token.
        steps: training steps of 1,024 rows.
        latents: budget of a latent method.
        gradients: studies over which the gradient that ranks latents by output effect is averaged.
        choose: studies on which a strength is chosen.
        report: studies on which it is reported.
        kl: also measure KL(unsteered || steered) along the unsteered reports.
        seed: of studies, halves, SAEs and controls.
        progress: show bars.
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
        for name, given, known in (("findings", self.findings, FINDING_KEYS), ("parts", self.parts, PARTS)):
            wrong = sorted(set(given) - set(known))
            if wrong:
                raise ConfigError(f"{name} names {wrong}; known are {', '.join(known)}.")


def run_steering(settings: SteeringRun) -> Path:
    """Run what is not there yet and write `table.md`, `table.parquet` and figures; returns the folder.

    Raises:
        ConfigError: an unknown finding or part.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    findings = settings.findings or FINDING_KEYS
    wanted = [
        (part, finding)
        for part in settings.parts
        for finding in findings
        if part != "move" or other_side(finding) is not None
    ]
    missing = [(p, f) for p, f in wanted if not (settings.out / f / p / "summary.parquet").exists()]
    if missing:
        bench, subjects = prepare(settings)
        for part, finding in tqdm(missing, desc="findings", unit="finding", disable=not settings.progress):
            if (settings.out / finding / part / "summary.parquet").exists():
                continue  # another process of the same run has made it
            steer_part(bench, subjects, part, finding, settings).save(settings.out / finding / part)
            write_tables(settings.out)
    write_tables(settings.out)
    return settings.out


def prepare(settings: SteeringRun) -> tuple[Bench, Subjects]:
    """Studies, SAEs and what is learned; SAEs and maps that lie in the folder are read back."""
    out, maira = settings.out, load_phantom()
    hook_name = f"blocks.{settings.layer}.hook_resid_post"
    # About one study in five has a finding; more prompts than are needed for the rarest would only cost time.
    pool = (7 * settings.choose, 6 * settings.report)
    subjects = Subjects(maira, settings.studies, hook_name, settings.seed, pool)
    # The text SAE serves one method only.
    texts = not settings.methods or EVERYWHERE in settings.methods
    places = ("image", "text") if texts else ("image",)
    folders = {place: out / f"sae_{place}" for place in places}
    files = {place: out / f"learned_{place}.safetensors" for place in folders}
    if not all(file.exists() for file in files.values()):
        taught = np.flatnonzero(subjects.halves.choose)
        rows = harvest_rows(
            maira,
            [subjects.studies[int(i)] for i in taught],
            hook_name,
            roles=KEPT,
            seed=settings.seed,
            progress=settings.progress,
        )
        rows = replace(rows, study=taught[rows.study])
        mine = {"image": rows.is_image, "text": ~rows.is_image}
        for place in places:
            if not (folders[place] / "cfg.json").exists():
                train_sae(
                    rows.where(mine[place]),
                    settings.d_sae,
                    settings.k,
                    settings.steps,
                    settings.seed,
                    folders[place],
                )
        sae = load_matryoshka(folders["image"])
        learn(
            rows.where(mine["image"]),
            encoder_of(sae),
            subjects.studies,
            subjects.truth,
            subjects.halves.choose,
            maira,
            settings.gradients,
        ).save(files["image"])
        if texts:
            save_text_units(
                rows.where(mine["text"]), load_matryoshka(folders["text"]), subjects, files["text"]
            )
    sae, learned = load_matryoshka(folders["image"]), Learned.load(files["image"])
    text = (load_matryoshka(folders["text"]), *load_text_units(files["text"])) if texts else None
    return Bench(sae, learned, settings.latents, text, settings.seed), subjects


def steer_part(
    bench: Bench, subjects: Subjects, part: str, finding: str, settings: SteeringRun
) -> SteeringTables:
    """One part of one finding.

    Raises:
        InterventionError: too few studies, or `move` for a finding without a side.
    """
    labels, read, remove, target = FINDING_KEYS, lambda text: read_report(text).present, False, finding
    if part == "insert":
        methods, present, absent = bench.insertion(finding), [], [finding]
    elif part == "remove":
        methods, present, absent, remove = bench.removal(finding), [finding], [], True
    else:
        other = other_side(finding)
        if other is None:
            raise InterventionError(f"{finding!r} has no side, so it cannot be moved to the other one.")
        methods, present, absent = bench.moving(finding, other), [finding], [other]
        target = MOVED
        labels = (*(key for key in FINDING_KEYS if key not in (finding, other)), MOVED)

        def read(text: str) -> frozenset[str]:
            said = read_report(text).present
            return said | {MOVED} if other in said and finding not in said else said

    few = max(8, settings.choose * 3 // 4) if remove else settings.choose
    choose = subjects.pick("choose", present, absent, few)
    kinds = {CAUSAL: None, EXEMPLAR: EXEMPLAR, POOLED: POOLED}
    if part == "insert" and (not settings.methods or set(kinds) & set(settings.methods)):
        choice = choose_map(bench, subjects, finding, choose)
        folder = settings.out / finding / part
        folder.mkdir(parents=True, exist_ok=True)
        choice.table().to_parquet(folder / "trials.parquet")
        best = {name: choice.best(kind) for name, kind in kinds.items()}
        methods = bench.tried({k: (t.candidate.map, t.strength) for k, t in best.items()}) + methods
    if settings.methods:
        # A control says nothing without its method.
        asked = settings.methods
        methods = [m for m in methods if m.name in asked and (m.control_of or m.name) in asked]
    return evaluate_steering(
        subjects.maira,
        bench.sae,
        subjects.hook_name,
        methods,
        choose,
        subjects.pick("report", present, absent, settings.report),
        target,
        read,
        labels,
        remove=remove,
        p99=bench.learned.p99,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=settings.seed,
        progress=settings.progress,
        prompts=subjects.prompts,
        measure_kl=settings.kl,
    )


def other_side(finding: str) -> str | None:
    """The same finding on the other side; None where the key carries no side."""
    for side, other in (("_left", "_right"), ("_right", "_left")):
        if finding.endswith(side):
            return finding[: -len(side)] + other
    return None


def save_text_units(rows: ActivationRows, sae: MatryoshkaSAE, subjects: Subjects, file: Path) -> None:
    """Units and agreement of the text SAE, learned on the choosing half."""
    encode, taught = encoder_of(sae), subjects.halves.choose
    mine = rows.where(taught[rows.study])
    fires, _ = study_firing(encode, mine, len(subjects.studies))
    agreement = torch.from_numpy(f1_of_firing(fires[taught], subjects.truth[taught]))
    units = p99(encode(mine.values[:: max(1, len(mine) // 20_000)]))
    save_file({"p99": units, "agreement": agreement}, file)


def load_text_units(file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_sae,) units and (d_sae, F) agreement."""
    tensors = load_file(file)
    return tensors["p99"], tensors["agreement"]

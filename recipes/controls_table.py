"""Which measures separate a trained SAE from its controls? One table over the SAEs of a quickstart run.

Trained, frozen decoder, frozen encoder, untrained and raw dimensions are scored alike: explained variance, loss
recovered, F1 of firing, detection score of the best latents' explanations (offline: explained by contrast, judged by
the known findings), pointing, energy and IoU of the best image latents, and the steering effect of maps of equal norm.
Latents, SAEs and strengths are chosen on one half of the patients and reported on the other. Differences to the trained
SAE are paired over studies.

    sae-lens-maira quickstart --out quickstart_out
    python recipes/controls_table.py --config recipes/controls_table.yaml
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.evaluation import POSITIONS, report_runs
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.interp.run import interpret_offline
from sae_lens_maira.io import atomic_write, csv_of
from sae_lens_maira.latents import (
    Agreement,
    Halves,
    best_dictionary,
    best_units,
    paired_difference,
    split_by_patient,
    study_firing,
)
from sae_lens_maira.latents.collect import CollectConfig, collect_records
from sae_lens_maira.latents.space import by_study, covered, spatial_scores
from sae_lens_maira.maira2 import Maira2, TokenRole
from sae_lens_maira.phantom import FINDING_KEYS, load_phantom, truth_labels
from sae_lens_maira.quickstart import QuickstartConfig
from sae_lens_maira.quickstart.page import STUDIES, RowsInMemory
from sae_lens_maira.quickstart.run import hook_names, stored_rows, studies_of, text_folder
from sae_lens_maira.quickstart.sae import TrainedSAE
from sae_lens_maira.quickstart.steer import steer_finding
from sae_lens_maira.recipes._controls_page import KINDS, compare, gain_cells, markdown, per_finding
from sae_lens_maira.sae import load_matryoshka, make_control
from sae_lens_maira.sae.splice import evaluate_runs
from sae_lens_maira.steering.maps import frontal_rows
from sae_lens_maira.studies import Study


@dataclass(frozen=True)
class Settings:
    """Settings of the table.

    Attributes:
        quickstart: Folder of a finished quickstart run.
        out: Folder of the tables; created if missing.
        studies: Studies of that run.
        seed: Random seed of that run.
        text_seeds: Text SAEs of that run.
        splice_studies: Studies for loss recovered.
        steer_studies: Studies without the finding to steer.
        finding: Finding to steer.
    """

    quickstart: Path = Path("quickstart_out")
    out: Path = Path("runs/controls_table")
    studies: int = 1200
    seed: int = 0
    text_seeds: int = 3
    splice_studies: int = 40
    steer_studies: int = 30
    finding: str = "cardiomegaly"


@dataclass(frozen=True)
class Scored:
    """One SAE or control for one modality of positions: the seed that is best on the selection half."""

    sae: TrainedSAE
    agreement: Agreement


def run(settings: Settings) -> Path:
    """Score all SAEs and write `controls.csv`, `space.csv` and `controls.md`.

    Args:
        settings: The settings.

    Returns:
        Path of `controls.md`.

    Raises:
        ConfigError: An SAE is missing in the quickstart folder.
    """
    config = QuickstartConfig(
        out=settings.quickstart,
        studies=settings.studies,
        seed=settings.seed,
        text_seeds=settings.text_seeds,
        finding=settings.finding,
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    maira, studies = load_phantom(), studies_of(config)
    halves = split_by_patient([study.patient_id for study in studies], config.seed)
    truth = np.stack([truth_labels(study) for study in studies])
    rows = {place: stored_rows(maira, studies, hook, config) for place, hook in hook_names(config).items()}
    rows["image"] = rows["image"].where(rows["image"].is_image)
    rows["text"] = rows["text"].where(rows["text"].role == TokenRole.REPORT)
    reporting = [studies[i] for i in np.flatnonzero(halves.report)]
    table: list[dict[str, Any]] = []
    space: list[pd.DataFrame] = []
    for place in ("text", "image"):
        scored = score_all(config, place, rows[place], truth, halves)
        held_out = rows[place].where(halves.report[rows[place].study])
        maps = (
            {k: latent_maps(s, rows[place], studies, halves) for k, s in scored.items()}
            if place == "image"
            else {}
        )
        for kind, one in tqdm(scored.items(), desc=place, unit="SAE"):
            line: dict[str, Any] = {"place": place, "kind": kind, "n": one.agreement.n}
            line["explained variance"] = one.sae.explained_variance(held_out.values)
            line["loss recovered"] = recovered(maira, one.sae, reporting[: settings.splice_studies], place)
            gain = paired_difference(scored["trained"].agreement, one.agreement)
            line |= gain_cells("F1 of firing", float(one.agreement.f1.mean()), gain.mean, gain.low, gain.high)
            if place == "image":
                line |= compare(maps["trained"], maps[kind])
            line |= detection(
                maira, one, kind, rows[place], studies, halves, settings.out / f"records_{place}_{kind}"
            )
            table.append(line)
        if place == "image":
            lines = [line for line in table if line["place"] == place]
            for line, row in zip(
                lines, steering(maira, studies, rows[place], truth, halves, scored, settings), strict=True
            ):
                line |= row
        space += [per_finding(kind, one) for kind, one in maps.items()]
    frame = pd.DataFrame(table)
    atomic_write(settings.out / "controls.csv", csv_of(frame))
    atomic_write(settings.out / "space.csv", csv_of(pd.concat(space)))
    target = settings.out / "controls.md"
    atomic_write(target, markdown(frame, pd.concat(space)))
    return target


def steering(
    maira: Maira2,
    studies: Sequence[Study],
    rows: ActivationRows,
    truth: np.ndarray,
    halves: Halves,
    scored: dict[str, Scored],
    settings: Settings,
) -> list[dict[str, float]]:
    """Measure the steering effect of every SAE's map, at equal norm and with the strength chosen for each SAE."""
    controls = {kind: one.sae.inference for kind, one in scored.items() if kind != "trained"}
    found = steer_finding(
        maira, studies, rows, truth, halves, scored["trained"].sae, settings.finding, settings.steer_studies,
        settings.seed, progress=False, controls=controls,
    ).rows  # fmt: skip
    plain, trained, _, random, *others = found
    return [
        {
            "steering": row.on_target,
            "steering low": row.low,
            "steering high": row.high,
            "steering off-target": row.off_target,
            "steering strength": row.strength,
            "unsteered": plain.on_target,
            "random direction": random.on_target,
            "steered n": row.n,
        }
        for row in (trained, *others)
    ]


def detection(
    maira: Maira2,
    one: Scored,
    kind: str,
    rows: ActivationRows,
    studies: Sequence[Study],
    halves: Halves,
    folder: Path,
) -> dict[str, float]:
    """Mean balanced accuracy of the explanations of the best latents, and of the control explanations."""
    chosen = np.flatnonzero(halves.report)[:STUDIES]
    config = CollectConfig(
        model="phantom",
        sae=kind,
        latents=tuple(sorted({int(unit) for unit in one.agreement.unit})),
        top=40,
        per_interval=12,
        zero=60,
        keep_images=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    own = [studies[i] for i in chosen]
    records = collect_records(
        RowsInMemory(rows, chosen), own, one.sae.inference, maira, folder, config, findings=FINDING_KEYS
    )
    explained = interpret_offline(records, write=False)
    scores, shuffled = (
        [
            s.balanced_accuracy
            for i in explained
            for s in by(i)
            if s.judge == "truth" and s.balanced_accuracy is not None
        ]
        for by in (lambda i: i.scores, lambda i: i.control)
    )
    if not scores:
        return {"detection": float("nan"), "detection shuffled": float("nan"), "detection latents": 0}
    return {
        "detection": float(np.mean(scores)),
        "detection shuffled": float(np.mean(shuffled)),
        "detection latents": len(scores),
    }


def score_all(
    config: QuickstartConfig, place: str, rows: ActivationRows, truth: np.ndarray, halves: Halves
) -> dict[str, Scored]:
    """Score every kind of SAE for one modality of positions, with the seed of highest F1 on the selection half."""

    def best(name: str, saes: Sequence[TrainedSAE]) -> tuple[Scored, float]:
        fired = [study_firing(sae.encode, rows, len(truth)) for sae in saes]
        scores = [best_units(name, fires, truth, FINDING_KEYS, halves) for fires, _ in fired]
        taken = best_dictionary(scores)
        return Scored(saes[taken], scores[taken]), fired[taken][1]

    learned = rows.where(halves.choose[rows.study]).values
    first = config.seed * (
        config.text_seeds if place == "text" else 1
    )  # the numbering of controls in the quickstart
    found: dict[str, Scored] = {}
    l0 = 0.0
    for kind in KINDS:
        if kind in ("untrained", "raw"):
            whitened = kind == "untrained" and place == "text"
            n = config.text_seeds if kind == "untrained" and place == "text" else 1
            own = "untrained_whitened" if whitened else kind
            controls = [
                make_control(own, found["trained"].sae.inference, learned, first + i, l0=l0) for i in range(n)
            ]
            saes = [
                TrainedSAE(c, c.level_widths, rows.hook_name, i, whitened) for i, c in enumerate(controls)
            ]
        else:
            saes = [_opened(folder, rows.hook_name) for folder in folders(config, place, kind)]
        found[kind], sparsity = best(kind, saes)
        l0 = sparsity if kind == "trained" else l0
    return found


def folders(config: QuickstartConfig, place: str, kind: str) -> list[Path]:
    """Folders of the SAEs of one kind in a quickstart run."""
    control: Any = None if kind == "trained" else kind
    if place == "image":
        return [config.out / ("sae_image" if control is None else f"sae_image_{control}")]
    first = config.seed * config.text_seeds
    return [text_folder(config, seed, control) for seed in range(first, first + config.text_seeds)]


def _opened(folder: Path, hook_name: str) -> TrainedSAE:
    if not (folder / "cfg.json").is_file():
        raise ConfigError(
            f"{folder} contains no SAE. Run `sae-lens-maira quickstart --out FOLDER` first, and give that folder with "
            "the same --studies and --seed."
        )
    sae = load_matryoshka(folder)
    return TrainedSAE(sae, sae.level_widths, hook_name, 0, False)


def recovered(maira: Maira2, sae: TrainedSAE, studies: Sequence[Study], place: str) -> float:
    """Loss recovered over report tokens if reconstructions replace the positions of one modality."""
    roles = [TokenRole.REPORT] if place == "text" else POSITIONS["image"]
    found = evaluate_runs(
        report_runs(HookedMaira2(maira), studies, sae.hook_name),
        sae.inference,
        positions={place: [int(role) for role in roles]},
        levels=[-1],
    )
    return found.records[0].loss_recovered


def latent_maps(
    one: Scored, rows: ActivationRows, studies: Sequence[Study], halves: Halves
) -> dict[str, np.ndarray]:
    """Compute per finding the (n, 6) spatial scores of its best latent and of the control map, in the reporting half.

    Columns are pointing, energy, IoU, and the same with the latent's map from another study; the last column is the
    number of the study.
    """
    frontal, grid = frontal_rows(rows)
    patch = frontal.patch_row.astype(np.int64) * grid[1] + frontal.patch_col
    units = one.agreement.unit
    acts = np.concatenate([one.sae.encode(p)[:, units].numpy() for p in frontal.values.split(8192)])
    found: dict[str, np.ndarray] = {}
    for column, finding in enumerate(FINDING_KEYS):
        boxes = {
            i: [f.box for f in study.truth or () if f.present and f.key == finding and f.box is not None]
            for i, study in enumerate(studies)
        }
        chosen = np.array([i for i, own in boxes.items() if own], dtype=np.int64)
        mine = halves.choose[chosen]
        if not mine.any() or (~mine).sum() < 2:
            continue  # a finding without boxes, or too few studies with a box
        maps = by_study(acts[:, column], frontal.study, patch, len(studies), grid[0] * grid[1])[chosen]
        cover = np.stack([covered(boxes[i], grid) for i in chosen])
        scores = spatial_scores(maps, cover, mine)
        reported = chosen[~mine]
        found[finding] = np.column_stack([scores.values, scores.elsewhere, reported])
    return found


if __name__ == "__main__":
    from sae_lens_maira.cli.parser import run_recipe

    sys.exit(run_recipe(Settings, run, __doc__))

"""Check attribution on the phantom: does it point at the finding, and does ablation of its entries remove the sentence?

Per layer and seed an SAE of image patches is trained. For statements of held-out studies whose finding has a true box,
the strongest patch of each map is compared with the box, and the entries of each attribution and of its controls are
ablated. Arms are the trained SAE and control SAEs; maps that need no SAE are in the rows of the trained SAE. Every arm
has its own file, so that a killed run continues.

    python recipes/attribution.py --config recipes/attribution.yaml
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from sae_lens_maira.attribution import attribute
from sae_lens_maira.attribution.attribute import ReportAttribution
from sae_lens_maira.attribution.baselines import attention_rollout, gradient_maps
from sae_lens_maira.attribution.inputs import encode_with_report
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.attribution.sentences import report_sentences
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.io import atomic_write
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import generate_studies, load_phantom, read_report
from sae_lens_maira.recipes._shared import box_patches, continue_rows, mean_line, sae_of, sae_settings
from sae_lens_maira.stats import bootstrap
from sae_lens_maira.studies import Finding, Study

SAVED_EVERY = 20


@dataclass(frozen=True)
class Settings:
    """Settings of the check.

    Attributes:
        out: Folder of the tables; created if missing.
        saes: Folder of SAEs, one per arm, layer and seed; missing ones are trained or made.
        arms: "trained" and controls.
        layers: Decoder blocks whose output is read.
        seeds: Seeds of studies and SAEs.
        statements: Number of statements per layer, seed and arm.
        train_studies: Studies that an SAE is trained on.
        d_sae: Latents.
        k: Mean active latents per patch.
        steps: Training steps of 1,024 rows.
        candidates: Number of entries that are integrated over.
        n_check: Number of entries that are removed.
    """

    out: Path = Path("runs/attribution")
    saes: Path = Path("runs/attribution/saes")
    arms: tuple[str, ...] = ("trained", "frozen_decoder", "untrained")
    layers: tuple[int, ...] = (0, 3)
    seeds: tuple[int, ...] = (0, 1, 2)
    statements: int = 160
    train_studies: int = 500
    d_sae: int = 1024
    k: int = 16
    steps: int = 1500
    candidates: int = 256
    n_check: int = 32


def run(settings: Settings) -> Path:
    """Run the check and write its tables.

    Args:
        settings: The settings.

    Returns:
        The folder.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    maira = load_phantom()
    maira.model.set_attn_implementation("eager")
    hooked = HookedMaira2(maira)
    for layer in settings.layers:
        for seed in settings.seeds:
            for arm in settings.arms:
                _arm(hooked, maira, settings, layer, seed, arm)
                write_tables(settings.out)
    return settings.out


def _arm(hooked: HookedMaira2, maira: Maira2, settings: Settings, layer: int, seed: int, arm: str) -> None:
    """Measure the statements of one arm that are not in its file yet."""

    def rows(done: int) -> Iterator[dict[str, Any]]:
        sae = sae_of(maira, settings, arm, layer, seed)
        for study, finding, number in islice(given_statements(hooked, seed, settings.statements), done, None):
            where = {"layer": layer, "seed": seed, "arm": arm}
            yield where | measured(hooked, sae, study, finding, number, settings, arm)

    file = settings.out / f"given-{layer}-{seed}-{arm}.csv"
    depends = sae_settings(settings, arm) | {"candidates": settings.candidates, "n_check": settings.n_check}
    label = f"layer {layer} seed {seed} {arm}"
    continue_rows(file, depends, settings.statements, rows, label, SAVED_EVERY)


def given_statements(hooked: HookedMaira2, seed: int, limit: int) -> Iterator[tuple[Study, Finding, int]]:
    """Yield statements of the studies' reports whose finding has a true box: study, finding, number of the sentence."""
    found = 0
    for study in generate_studies(900, 95_000 + 7_000 * seed):
        if study.prior_frontal is not None or not study.report:
            continue
        encoding = encode_with_report(hooked, study, "teacher")
        sentences = [s.text for s in report_sentences(encoding, hooked.tokenizer)]
        for finding in study.truth or ():
            hits = [i for i, text in enumerate(sentences) if finding.key in read_report(text).present]
            if finding.present and finding.box is not None and len(hits) == 1:
                yield study, finding, hits[0]
                found += 1
                if found == limit:
                    return


def measured(
    hooked: HookedMaira2, sae: Any, study: Study, finding: Finding, number: int, settings: Settings, arm: str
) -> dict[str, Any]:
    """Measure one statement: whether each map points at the box, and the effect of ablation."""
    answer = attribute(
        hooked, study, sae, number, report="teacher", roles="image_only",
        candidates=settings.candidates, n_check=settings.n_check,
    )  # fmt: skip
    item = answer.sentences[0]
    grid = answer.map(0)
    inside = box_patches(finding, grid.shape)
    maps = {"attribution": grid, "best latent": best_latent_map(answer, sae)}
    if arm == "trained":
        frontal = (answer.encoding.view[0] == 0).nonzero()[:, 0].cpu()
        held = ResidualRun(hooked, answer.encoding, answer.hook_name)
        found = gradient_maps(held, item.sentence.positions)
        found["attention rollout"] = attention_rollout(hooked, answer.encoding, item.sentence.positions)
        maps |= {name: values[frontal].reshape(grid.shape).numpy() for name, values in found.items()}
        maps["random"] = np.random.default_rng(len(item.sentence.text)).random(grid.shape)
    check = item.check
    assert check is not None
    row: dict[str, Any] = {
        "study": study.study_id,
        "finding": finding.key,
        "area": float(inside.mean()),
        "drop": check.drop,
        "predicted": check.predicted,
        "random": check.drop_random,
        "largest": check.drop_largest,
        "gradient step": check.drop_gradient,
        "passed": check.passed,
        "completeness error": check.completeness_error,
        "steps": item.steps,
    }
    for name, values in maps.items():
        row[f"point {name}"] = float(values.max() > 0 and inside.flat[values.argmax()])
        total = float(values.clip(min=0).sum())
        row[f"energy {name}"] = float(values.clip(min=0)[inside].sum()) / total if total else 0.0
    return row


def best_latent_map(answer: ReportAttribution, sae: Any) -> np.ndarray:
    """Activations, over the frontal patches, of the latent with the largest share."""
    item = answer.sentences[0]
    best = int(item.latents()["latent"].iloc[0])
    grid = np.zeros_like(answer.map(0))
    for p, j, a in zip(item.position, item.latent, item.activation, strict=True):
        if j == best and int(answer.encoding.view[0, int(p)]) == 0:
            row, col = (int(getattr(answer.encoding, name)[0, int(p)]) for name in ("patch_row", "patch_col"))
            grid[row, col] = a
    return grid


def write_tables(folder: Path) -> None:
    """Write one summary of every row measured so far, with bootstrap intervals over statements."""
    given = pd.concat([pd.read_csv(file) for file in sorted(folder.glob("given-*.csv"))])
    lines = [
        "# Attribution on the phantom",
        "",
        "| layer | arm | measure | value | 95 % interval | n |",
        "|---|---|---|---|---|---|",
    ]
    for keys, rows in given.groupby(["layer", "arm"], sort=False):
        layer, arm = cast("tuple[int, str]", keys)
        where = f"{layer} | {arm}"
        lines.append(_efficiency(where, rows))
        for seed, part in rows.groupby("seed"):
            lines.append(_efficiency(where, part, f", seed {seed}"))
        correlation = float(np.corrcoef(rows["predicted"], rows["drop"])[0, 1])
        lines.append(
            f"| {where} | correlation of predicted and real drop | {correlation:.3f} | | {len(rows)} |"
        )
        many = (rows["drop"] >= 10 * rows["random"].clip(lower=0)).to_numpy(float)
        lines.append(mean_line(f"{where} | drop at least 10 times that of random entries", many))
        for name in rows.select_dtypes(["number", "bool"]):
            if name not in ("seed", "layer") and rows[name].notna().any():
                lines.append(mean_line(f"{where} | {name}", rows[name].dropna().to_numpy(float)))
        for finding, part in rows.groupby("finding"):
            lines.append(
                mean_line(
                    f"{where} | point attribution, {finding}", part["point attribution"].to_numpy(float)
                )
            )
    for layer, rows in given.groupby("layer"):
        for control in sorted(set(rows["arm"]) - {"trained"}):
            line = _paired(rows.query("arm == 'trained'"), rows.query("arm == @control"))
            lines.append(f"| {layer} | trained minus {control} | causal efficiency, paired | {line} |")
    atomic_write(folder / "attribution.md", "\n".join(lines) + "\n")


def _efficiency(where: str, rows: pd.DataFrame, more: str = "") -> str:
    """Format causal efficiency, the ratio of sums over statements."""
    drop, step = rows["drop"].to_numpy(), rows["gradient step"].to_numpy()
    found = bootstrap(lambda w: (w @ drop) / (w @ step), len(rows))
    value = f"{drop.sum() / step.sum():.3f} | {found.low:.3f} to {found.high:.3f}"
    return f"| {where} | causal efficiency{more} | {value} | {len(rows)} |"


def _paired(one: pd.DataFrame, other: pd.DataFrame) -> str:
    """Format the difference of two arms' causal efficiency on the statements that both have."""
    both = one.merge(other, on=["seed", "study", "finding"], suffixes=(" a", " b"))
    columns = [both[f"{name} {arm}"].to_numpy() for name in ("drop", "gradient step") for arm in "ab"]
    drop_a, drop_b, step_a, step_b = columns
    found = bootstrap(lambda w: (w @ drop_a) / (w @ step_a) - (w @ drop_b) / (w @ step_b), len(both))
    value = drop_a.sum() / step_a.sum() - drop_b.sum() / step_b.sum()
    return f"{value:.3f} | {found.low:.3f} to {found.high:.3f} | {len(both)}"


if __name__ == "__main__":
    from sae_lens_maira.cli.parser import run_recipe

    sys.exit(run_recipe(Settings, run, __doc__))

"""Check attribution on the phantom: does it point at the finding, and does removing what it names remove the sentence?

For every seed an SAE of image patches is trained, and for statements of held-out studies whose finding has a true box
each map's strongest patch is compared with the box, and each attribution is ablated next to its controls. Arms are the
trained SAE and control SAEs; maps that need no SAE are reported once per seed.

    python recipes/attribution.py --config recipes/attribution.yaml
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from sae_lens_maira.attribution import attribute
from sae_lens_maira.attribution.attribute import ReportAttribution, encode_with_report
from sae_lens_maira.attribution.regenerate import generate_with_delta, prompt_delta
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.attribution.sentences import report_sentences
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.io import atomic_write
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import generate_studies, load_phantom, read_report
from sae_lens_maira.stats import bootstrap_mean
from sae_lens_maira.studies import Finding, Study


@dataclass(frozen=True)
class Settings:
    """Settings of the check.

    Attributes:
        out: Folder of the tables; made if missing.
        saes: Folder of SAEs, one per arm and seed as ARM_SEED; missing ones are trained or made.
        arms: "trained" and controls.
        layer: Decoder block whose output is read.
        seeds: Seeds of studies and SAEs.
        statements: Statements per seed and arm, given reports.
        generated: Statements per seed in the model's own reports, trained SAE only.
        train_studies: Studies that the SAE is trained on.
        d_sae: Latents.
        k: Mean active latents per patch.
        steps: Training steps of 1,024 rows.
        candidates: Entries that are integrated over.
        n_check: Entries that are removed.
        n_removed: Entries that are removed from the prompt when a report is generated again.
    """

    out: Path = Path("runs/attribution")
    saes: Path = Path("runs/attribution/saes")
    arms: tuple[str, ...] = ("trained", "frozen_decoder", "untrained")
    layer: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    statements: int = 160
    generated: int = 60
    train_studies: int = 500
    d_sae: int = 1024
    k: int = 16
    steps: int = 1500
    candidates: int = 256
    n_check: int = 32
    n_removed: int = 64


def run(settings: Settings) -> Path:
    """Run the check and write its tables.

    Args:
        settings: The settings.

    Returns:
        The folder.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    maira = load_phantom()
    hooked = HookedMaira2(maira)
    rows, generated = [], []
    for seed in settings.seeds:
        for arm in settings.arms:
            sae = sae_of(maira, settings, arm, seed)
            statements = tqdm(
                given_statements(hooked, seed, settings), total=settings.statements, desc=f"{arm} {seed}"
            )
            for study, finding, number in statements:
                rows.append(
                    {"seed": seed, "arm": arm} | measured(hooked, sae, study, finding, number, settings, arm)
                )
            if arm == "trained":
                generated += [{"seed": seed} | row for row in regenerated(hooked, sae, seed, settings)]
            write_tables(settings.out, pd.DataFrame(rows), pd.DataFrame(generated))
    return settings.out


def sae_of(maira: Maira2, settings: Settings, arm: str, seed: int) -> Any:
    """The SAE of an arm: read from its folder, or trained into it."""
    from sae_lens_maira.activations import RowSettings, read_rows
    from sae_lens_maira.quickstart.sae import train_sae
    from sae_lens_maira.sae import load_matryoshka, make_control

    folder = settings.saes / f"{arm}_{seed}"
    if (folder / "cfg.json").is_file():
        return load_matryoshka(folder)
    studies = generate_studies(settings.train_studies if arm != "untrained" else 100, 91_000 + 7_000 * seed)
    rows = read_rows(
        maira,
        studies,
        f"blocks.{settings.layer}.hook_resid_post",
        RowSettings(roles="image_only", batch_size=16),
    )
    if arm == "untrained":
        return make_control("untrained", sae_of(maira, settings, "trained", seed), rows.values, seed=seed)
    control: Any = None if arm == "trained" else arm
    return train_sae(
        rows, settings.d_sae, settings.k, settings.steps, seed, folder, control=control
    ).inference


def given_statements(
    hooked: HookedMaira2, seed: int, settings: Settings
) -> Iterator[tuple[Study, Finding, int]]:
    """Statements of the studies' own reports whose finding has a true box: study, finding, number of the sentence."""
    found = 0
    for study in generate_studies(600, 95_000 + 7_000 * seed):
        if study.prior_frontal is not None or not study.report:
            continue
        encoding = encode_with_report(hooked, study, "teacher")
        sentences = [s.text for s in report_sentences(encoding, hooked.tokenizer)]
        for finding in study.truth or ():
            hits = [i for i, text in enumerate(sentences) if finding.key in read_report(text).present]
            if finding.present and finding.box is not None and len(hits) == 1:
                yield study, finding, hits[0]
                found += 1
                if found == settings.statements:
                    return


def measured(
    hooked: HookedMaira2, sae: Any, study: Study, finding: Finding, number: int, settings: Settings, arm: str
) -> dict[str, Any]:
    """One statement: where each map points, and what ablation takes."""
    answer = attribute(
        hooked, study, sae, number, report="teacher", roles="image_only",
        candidates=settings.candidates, n_check=settings.n_check,
    )  # fmt: skip
    item = answer.sentences[0]
    grid = answer.map(0)
    inside = box_patches(finding, grid.shape)
    maps = {"attribution": grid, "best latent": best_latent_map(answer, sae)}
    if arm == "trained":
        maps |= gradient_maps(hooked, answer, item.sentence.positions)
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


def box_patches(finding: Finding, shape: tuple[int, int]) -> np.ndarray:
    """(rows, columns) patches whose centre lies within half a patch of the finding's box."""
    rows, cols = shape
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(cols) + 0.5) / cols
    x0, y0, x1, y1 = finding.box or (0, 0, 0, 0)
    half = 0.5 / cols
    return ((y >= y0 - half) & (y <= y1 + half))[:, None] & ((x >= x0 - half) & (x <= x1 + half))[None]


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


def gradient_maps(
    hooked: HookedMaira2, answer: ReportAttribution, positions: tuple[int, ...]
) -> dict[str, Any]:
    """Maps that need no SAE: norm of the gradient, and gradient times input."""
    held = ResidualRun(hooked, answer.encoding, answer.hook_name)
    gradient = held.gradients(held.hidden, [positions])[1][0]
    frontal = (answer.encoding.view[0] == 0).nonzero()[:, 0]
    shape = answer.map(0).shape
    g, h = gradient[frontal], held.hidden[frontal].float()
    return {
        "gradient norm": g.norm(dim=1).reshape(shape).numpy(),
        "gradient x input": (g * h).sum(1).clamp(min=0).reshape(shape).numpy(),
    }


def regenerated(hooked: HookedMaira2, sae: Any, seed: int, settings: Settings) -> list[dict[str, Any]]:
    """Remove the attributed entries from prompts and write the reports again, next to random entries."""
    from sae_lens_maira.attribution.entries import active_entries

    rows: list[dict[str, Any]] = []
    processor: Any = hooked.processor
    for study in generate_studies(600, 95_000 + 7_000 * seed):
        if study.prior_frontal is not None:
            continue
        prompt = processor.encode([study])
        (before,) = hooked.generate(prompt, return_type="reports")
        present = read_report(before.text).present
        boxes = {f.key: f for f in study.truth or () if f.present and f.box is not None}
        if not present & set(boxes):
            continue
        answer = attribute(
            hooked,
            study,
            sae,
            report=before.text,
            roles="image_only",
            candidates=settings.candidates,
            check=False,
        )
        for number, item in enumerate(answer.sentences):
            keys = read_report(item.sentence.text).present & set(boxes)
            if len(keys) != 1:
                continue
            (key,) = keys
            length = prompt.input_ids.shape[1]
            removed = prompt_delta(sae, item, settings.n_removed, length)
            held = ResidualRun(hooked, prompt, answer.hook_name)
            patches = (prompt.view[0] >= 0).nonzero()[:, 0]
            entries, _ = active_entries(sae, held.hidden, patches)
            chosen = torch.randperm(len(entries), generator=torch.Generator().manual_seed(len(rows)))
            other = -entries.delta(chosen[: settings.n_removed])
            other = other * (removed.norm() / other.norm())
            row: dict[str, Any] = {"study": study.study_id, "finding": key}
            row["point"] = bool(
                box_patches(boxes[key], answer.map(number).shape).flat[answer.map(number).argmax()]
            )
            for name, delta in (("attributed", removed), ("random", other)):
                after = read_report(generate_with_delta(hooked, prompt, answer.hook_name, delta).text).present
                row[f"gone {name}"] = key not in after
                row[f"others changed {name}"] = len((after ^ present) - {key}) / 14
            rows.append(row)
            if len(rows) == settings.generated:
                return rows
    return rows


def write_tables(folder: Path, given: pd.DataFrame, generated: pd.DataFrame) -> None:
    """Write every row, and one summary with means and bootstrap intervals over statements."""
    atomic_write(folder / "given.csv", given.to_csv(index=False))
    atomic_write(folder / "generated.csv", generated.to_csv(index=False))
    lines = [
        "# Attribution on the phantom",
        "",
        "| arm | measure | mean | 95 % interval | n |",
        "|---|---|---|---|---|",
    ]
    for arm, rows in given.groupby("arm", sort=False):
        efficiency = rows["drop"].sum() / rows["gradient step"].sum()
        correlation = float(np.corrcoef(rows["predicted"], rows["drop"])[0, 1])
        many = float((rows["drop"] >= 10 * rows["random"].clip(lower=0)).mean())
        lines.append(f"| {arm} | causal efficiency (ratio of sums) | {efficiency:.3f} | | {len(rows)} |")
        lines.append(
            f"| {arm} | correlation of predicted and real drop | {correlation:.3f} | | {len(rows)} |"
        )
        lines.append(
            f"| {arm} | drop at least 10 times that of random entries | {many:.3f} | | {len(rows)} |"
        )
        for name in _measures(rows):
            if rows[name].notna().any():
                lines.append(_line(str(arm), name, rows[name].dropna().to_numpy(float)))
        worst: Any = rows.groupby("finding")["point attribution"].agg(["mean", "size"])
        worst = worst.sort_values(by="mean")
        lines.append(f"| {arm} | lowest pointing of a finding: {worst.index[0]} | {worst['mean'].iloc[0]:.3f} | | "
                     f"{int(worst['size'].iloc[0])} |")  # fmt: skip
    for name in _measures(generated):
        lines.append(_line("generated", name, generated[name].to_numpy(float)))
    atomic_write(folder / "attribution.md", "\n".join(lines) + "\n")


def _measures(rows: pd.DataFrame) -> list[str]:
    """Columns that hold numbers or yes and no."""
    return [name for name in rows.select_dtypes(["number", "bool"]) if name != "seed"]


def _line(arm: str, name: str, values: np.ndarray) -> str:
    found = bootstrap_mean(values)
    return f"| {arm} | {name} | {values.mean():.3f} | {found.low:.3f} to {found.high:.3f} | {len(values)} |"


if __name__ == "__main__":
    from sae_lens_maira.cli.recipe import run_recipe

    sys.exit(run_recipe(Settings, run, __doc__))

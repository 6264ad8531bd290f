"""Compare SAEs trained on different tokens: presets of token roles, trained and steered in the same way.

    preset x seed -> an SAE on equally many rows -> its latents at the patches, and its best text latent everywhere

The study (arXiv 2507.12950) left image tokens out in training and steering. Here every preset has the same number of
rows, steps and latents, and the same studies are steered. A preset without image patches is the control.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from sae_lens_maira.activations import ActivationRows, RowSettings, read_rows
from sae_lens_maira.checksums import read_parquet, write_parquet
from sae_lens_maira.cli.parser import run_recipe
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.io import atomic_write, save_figure
from sae_lens_maira.latents import study_firing
from sae_lens_maira.maira2 import TokenRole, resolve_roles
from sae_lens_maira.quickstart.sae import TrainingPlan, train_sae
from sae_lens_maira.recipes._shared import require_run
from sae_lens_maira.recipes.steering.source import Source
from sae_lens_maira.sae import load_matryoshka
from sae_lens_maira.stats import explained_variance, f1_of_firing, p99
from sae_lens_maira.steering.cohort import Cohort
from sae_lens_maira.steering.evaluate import evaluate_steering
from sae_lens_maira.steering.methods import EVERYWHERE, MAPS, MEANS, MethodFactory
from sae_lens_maira.steering.statistics import collect_statistics, encoder_of

PRESETS = ("paper", "text_only", "all")
FINDINGS = ("cardiomegaly", "pacemaker", "oedema", "pleural_effusion_left", "pneumothorax_right")


@dataclass(frozen=True)
class FilterRun(Source):
    """Settings of the comparison of token filters.

    Attributes:
        out: Folder of SAEs, tables and the figure; existing results are not computed again.
        findings: Findings that are inserted.
        presets: Token roles to train on.
        seeds: Number of SAEs per preset.
        studies: Number of phantom studies; one half is used for training and selection.
        layer: Decoder layer.
        rows: Number of rows that every SAE is trained on.
        d_sae: Latents.
        k: Mean active latents per token.
        steps: Training steps of 1,024 rows.
        latents: Number of latents of the maps.
        choose: Number of studies on which a strength is chosen.
        report: Number of other studies on which its effect is measured.
        seed: Random seed of studies and halves.
        progress: Show progress bars.
    """

    out: Path = Path("runs/token_filter")
    findings: tuple[str, ...] = FINDINGS
    presets: tuple[str, ...] = PRESETS
    seeds: int = 3
    studies: int = 1200
    layer: int = 3
    rows: int = 30_000
    d_sae: int = 1024
    k: int = 8
    steps: int = 3000
    latents: int = 16
    choose: int = 16
    report: int = 40
    seed: int = 0
    progress: bool = True


def run_filters(settings: FilterRun) -> Path:
    """Train and steer the missing SAEs, and write `table.md`, `table.parquet` and `token_filter.png`."""
    exists = any(
        next(settings.out.glob(made), None) for made in ("settings.json", "sae_*", "*_[0-9].parquet")
    )
    if settings.sae is not None:
        raise ConfigError("The recipe compares SAEs that it trains; leave --sae out.")
    require_run(settings, exists, free=("seeds",))
    wanted = [(preset, seed) for seed in range(settings.seeds) for preset in settings.presets]
    missing = [(p, s) for p, s in wanted if not (settings.out / f"{p}_{s}.parquet").exists()]
    if missing:
        hook_name = f"blocks.{settings.layer}.hook_resid_post"
        pool = (7 * settings.choose, 6 * settings.report)
        cohort = settings.cohort(settings.studies, settings.layer, settings.seed, pool)
        kept = RowSettings(roles="all", batch_size=16, seed=settings.seed)
        rows = read_rows(cohort.maira, cohort.studies, hook_name, kept, progress=settings.progress)
        for preset, seed in tqdm(missing, desc="SAEs", unit="SAE", disable=not settings.progress):
            made = one_sae(cohort, rows, preset, seed, settings)
            write_parquet(made, settings.out / f"{preset}_{seed}.parquet")
            write_filter_tables(settings.out)
    write_filter_tables(settings.out)
    return settings.out


def one_sae(
    cohort: Cohort, rows: ActivationRows, preset: str, seed: int, settings: FilterRun
) -> pd.DataFrame:
    """Train one SAE and steer every finding with it; return one row per finding and method."""
    taught = cohort.halves.choose
    roles = [int(role) for role in resolve_roles(preset)]
    mine = np.flatnonzero(np.isin(rows.role, roles) & taught[rows.study])
    drawn = np.random.default_rng(seed).permutation(mine)[: settings.rows]
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[drawn] = True
    learned_from = rows.where(chosen)
    folder = settings.out / f"sae_{preset}_{seed}"
    if not (folder / "cfg.json").exists():
        train_sae(learned_from, TrainingPlan(folder, settings.d_sae, settings.k, settings.steps, seed))
    sae = load_matryoshka(folder)
    encode = encoder_of(sae)
    image, text = rows.where(rows.is_image), rows.where((rows.role == TokenRole.REPORT) & taught[rows.study])
    statistics = collect_statistics(
        [image.where(taught[image.study])], encode, cohort.studies, cohort.known, cohort.reader
    )
    fires, _ = study_firing(encode, text, len(cohort.studies))
    agreement = torch.from_numpy(f1_of_firing(fires[taught], cohort.known[taught]))
    units = p99(encode(text.values[:: max(1, len(text) // 20_000)]))
    factory = MethodFactory(sae, statistics, settings.latents, (sae, units, agreement), seed)
    parts = []
    for finding in settings.findings:
        methods = [m for m in factory.insertion(finding) if m.name in (MAPS, EVERYWHERE)]
        if seed == 0 and preset == settings.presets[0]:  # needs no SAE, so that it is run once
            methods += [m for m in factory.insertion(finding) if m.name == MEANS]
        tables = evaluate_steering(
            cohort.maira,
            sae,
            cohort.hook_name,
            methods,
            cohort.pick("choose", [], [finding], settings.choose),
            cohort.pick("report", [], [finding], settings.report),
            finding,
            cohort.reader.stated,
            cohort.reader.names,
            p99=statistics.p99,
            max_new_tokens=cohort.max_new_tokens,
            progress=False,
            prompts=cohort.prompts,
            measure_kl=False,
        )
        parts.append(tables.summary.assign(finding=finding))
    patches = image.values[:: max(1, len(image) // 5000)]
    report = text.values[:: max(1, len(text) // 5000)]
    return pd.concat(parts, ignore_index=True).assign(
        preset=preset,
        seed=seed,
        rows=len(learned_from),
        explained_patches=explained_variance(patches, lambda rows: sae.decode(encode(rows))),
        explained_report=explained_variance(report, lambda rows: sae.decode(encode(rows))),
    )


def write_filter_tables(out: Path) -> None:
    """Write means and spread over seeds from the results in the folder."""
    files = sorted(out.glob("*_[0-9].parquet"))
    if not files:
        return
    table = pd.concat([read_parquet(file) for file in files], ignore_index=True)
    write_parquet(table, out / "table.parquet")
    atomic_write(out / "table.md", filter_page(table))
    save_figure(filter_figure(table), out / "token_filter.png", dpi=90)


def filter_page(table: pd.DataFrame) -> str:
    """Table per preset and method: mean over findings, and the mean of each seed."""
    lines = [
        "| trained on | seeds | explained variance patches / report | method | on target %, mean (each seed) | "
        "off target % |",
        "|---|---|---|---|---|---|",
    ]
    for preset in [p for p in PRESETS if p in set(table.preset)]:
        for method in (MAPS, EVERYWHERE):
            mine = table[(table.preset == preset) & (table.method == method)]
            if mine.empty:
                continue
            seeds = 100 * mine.groupby("seed").on_target.mean()
            each = ", ".join(f"{value:.0f}" for value in seeds)
            lines.append(
                f"| {preset} | {len(seeds)} | {mine.explained_patches.mean():.3f} / "
                f"{mine.explained_report.mean():.3f} | {method} | {seeds.mean():.1f} ({each}) | "
                f"{100 * mine.off_target.mean():.1f} |"
            )
    means = table[table.method == MEANS]
    if len(means):
        lines.append(
            f"| no SAE | | | {MEANS} | {100 * means.on_target.mean():.1f} | {100 * means.off_target.mean():.1f} |"
        )
    return "\n".join(lines) + "\n"


def filter_figure(table: pd.DataFrame) -> Figure:
    """On-target share per finding and preset: bars are means over seeds, dots are seeds."""
    findings = list(dict.fromkeys(table.finding))
    presets = [p for p in PRESETS if p in set(table.preset)]
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    for axis, method in zip(panels, (MAPS, EVERYWHERE), strict=True):
        for i, preset in enumerate(presets):
            mine = table.loc[(table.method == method) & (table.preset == preset)]
            places = np.arange(len(findings)) + (i - (len(presets) - 1) / 2) * 0.27
            shares = [100 * mine.loc[mine.finding == f, "on_target"].mean() for f in findings]
            axis.bar(places, shares, 0.25, color=f"C{i}", alpha=0.55, label=preset)
            for place, finding in zip(places, findings, strict=True):
                values = 100 * mine.loc[mine.finding == finding, "on_target"].to_numpy()
                axis.plot(np.full(len(values), place), values, "o", color=f"C{i}", ms=3.5)
        axis.set_xticks(
            range(len(findings)), [f.replace("_", " ") for f in findings], rotation=25, ha="right", fontsize=8
        )
        axis.set_title({MAPS: "latents at the patches"}.get(method, method), fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(-3, 103)
    panels[0].set_ylabel("% of studies that get the finding")
    panels[1].legend(title="SAE trained on", frameon=False, fontsize=8)
    return drawn


if __name__ == "__main__":
    sys.exit(run_recipe(FilterRun, run_filters, __doc__))

"""Tables and figures of a steering run over findings: one Markdown page, one Parquet table, small figures.

Shares are pooled over findings with Wilson intervals. All data are read from the folder of the run.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from sae_lens_maira.checksums import read_parquet, write_parquet
from sae_lens_maira.io import atomic_write, save_figure
from sae_lens_maira.stats import wilson
from sae_lens_maira.steering import methods as names

PARTS = {
    "insert": "Insert: studies without the finding",
    "remove": "Remove: studies whose reports state it",
    "move": "Move to the other side",
}
LATENT_METHODS = {
    "insert": (
        names.CAUSAL,
        names.EXEMPLAR,
        names.POOLED,
        names.MAPS,
        names.EFFECT,
        names.AGREEMENT,
        names.SET,
        names.AT_LEAST,
    ),
    "remove": (names.ABLATE_HERE, names.ABLATE, names.AT_MOST, names.SUBTRACT),
    "move": (names.OTHER, names.MIRRORED),
}
REACHED = 0.8
SHOWN = ("off_target", "kl", "perplexity", "repetition", "length", "ratio")


def read_run(out: Path) -> pd.DataFrame:
    """Read all summaries of a run's folder: one row per part, finding and method."""
    frames = [
        read_parquet(file).assign(finding=file.parts[-3], part=part)
        for part in PARTS
        for file in sorted(out.glob(f"*/{part}/summary.parquet"))
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def write_tables(out: Path) -> None:
    """Write `table.parquet`, `table.md` and a figure per part from the current contents of the folder."""
    table = read_run(out)
    if table.empty:
        return
    write_parquet(table, out / "table.parquet")
    pages = ["# Steering all findings\n"]
    for part, title in PARTS.items():
        mine = table.loc[table.part == part]
        if mine.empty:
            continue
        pages += [f"## {title}\n", by_method(mine), "", by_finding(mine), "", best_line(mine, part), ""]
        save_figure(figure(mine, title), out / f"{part}.png", dpi=90)
    atomic_write(out / "table.md", "\n".join(pages))


def by_method(table: pd.DataFrame) -> str:
    """One row per method: pooled on-target share with its Wilson interval, and means over findings of the rest."""
    lines = [
        "| method | findings | n | on target % (95 %) | findings at 80 % or more | off target % | KL | "
        "perplexity (unsteered) | repetition | length | norm ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, part in table.groupby("method", sort=False):
        n = int(part.n.sum())
        hits = round(float((part.on_target * part.n).sum()))
        low, high = wilson(hits, n)
        off, kl, perplexity, repeated, length, ratio = (float(part[name].mean()) for name in SHOWN)
        lines.append(
            f"| {method} | {len(part)} | {n} | {100 * hits / n:.1f} ({100 * low:.0f} to {100 * high:.0f}) | "
            f"{int((part.on_target >= REACHED).sum())} | "
            f"{100 * off:.1f} | {kl:.3f} | {perplexity:.2f} ({part.unsteered_perplexity.mean():.2f}) | "
            f"{repeated:.3f} | {length:.2f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def by_finding(table: pd.DataFrame) -> str:
    """One row per finding, one column per method: on-target % / off-target % at the chosen strength."""
    methods = list(dict.fromkeys(table.method))
    lines = ["| finding | n | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
    for finding in dict.fromkeys(table.finding):
        mine = table[table.finding == finding].set_index("method")
        if mine.empty:
            continue
        cells = []
        for method in methods:
            if method not in mine.index:
                cells.append("")
                continue
            row = mine.loc[method]
            cells.append(f"{100 * row.on_target:.0f} / {100 * row.off_target:.1f} (s {row.strength:g})")
        lines.append(f"| {finding.replace('_', ' ')} | {int(mine.n.max())} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_line(table: pd.DataFrame, part: str) -> str:
    """Summary of the chosen maps over findings, or of the latent method that is best on the reported studies."""
    found = []
    for method in LATENT_METHODS[part]:
        mine = table[table.method == method]
        if len(mine):
            found.append(
                (
                    float(mine.on_target.mean()),
                    method,
                    int((mine.on_target >= REACHED).sum()),
                    float(mine.off_target.mean()),
                )
            )
    if not found:
        return ""
    chosen = [row for row in found if row[1] == names.CAUSAL]
    mean, method, reached, off = max(chosen or found)
    findings = table.finding.nunique()
    how = "Chosen without the studies shown" if chosen else "Best latent method over findings"
    return (
        f"{how}: {method}, mean {100 * mean:.1f} %, at least 80 % for {reached} of "
        f"{findings} findings, {100 * off:.1f} % of other labels changed."
    )


def figure(table: pd.DataFrame, title: str) -> Figure:
    """On-target share by finding and method as a heatmap, findings down."""
    methods = list(dict.fromkeys(table.method))
    findings = list(dict.fromkeys(table.finding))
    grid = np.full((len(findings), len(methods)), np.nan)
    for row, finding in enumerate(findings):
        for column, method in enumerate(methods):
            mine = table[(table.finding == finding) & (table.method == method)]
            if len(mine):
                grid[row, column] = 100 * mine.on_target.iloc[0]
    drawn = Figure(
        figsize=(max(5.5, 1.4 + 0.85 * len(methods)), 2.4 + 0.33 * len(findings)), layout="constrained"
    )
    axis = drawn.subplots()
    image = axis.imshow(grid, cmap=colormaps["viridis"], vmin=0, vmax=100, aspect="auto")
    for row in range(len(findings)):
        for column in range(len(methods)):
            if np.isfinite(grid[row, column]):
                colour = "white" if grid[row, column] < 60 else "black"
                axis.text(
                    column,
                    row,
                    f"{grid[row, column]:.0f}",
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=8,
                )
    axis.set_xticks(range(len(methods)), methods, rotation=35, ha="right", fontsize=8)
    axis.set_yticks(range(len(findings)), [f.replace("_", " ") for f in findings], fontsize=8)
    axis.set_title(f"{title}\n% of held-out studies", fontsize=10, loc="left")
    drawn.colorbar(image, ax=axis, shrink=0.7)
    return drawn

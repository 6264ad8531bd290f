"""What a steering sweep leaves: a row per steered report, a row per method with intervals, and the sweep as a picture.

Shares of studies get Wilson intervals, since a bootstrap of 0 hits would claim certainty; means get bootstrap
intervals over studies. It knows nothing about models or how reports were steered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from sae_lens_maira.stats import bootstrap_mean, wilson

METRICS = (
    "on_target",
    "off_target",
    "kl",
    "perplexity",
    "unsteered_perplexity",
    "repetition",
    "length",
    "ratio",
)
SHARES = ("on_target",)


@dataclass(frozen=True)
class SteeringTables:
    """`studies`: a row per method, strength and study, with its report; `summary`: a row per method.

    The summary holds the chosen strength and, for the reporting half, every metric with a 95 % interval; `n` studies.
    """

    studies: pd.DataFrame
    summary: pd.DataFrame
    finding: str

    def save(self, folder: Path) -> None:
        """Write `studies.parquet`, `summary.parquet` and `dose_response.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.studies.to_parquet(folder / "studies.parquet")
        self.summary.to_parquet(folder / "summary.parquet")
        dose_response(self).savefig(folder / "dose_response.png", dpi=130)


def summarise(
    table: pd.DataFrame, names: Sequence[str], chosen: dict[str, float], before: float, seed: int
) -> pd.DataFrame:
    """A row per method: its strength and, over the reporting half, every metric with its interval.

    Args:
        table: a row per method, strength and study.
        names: of the methods, in the order wanted.
        chosen: strength of each.
        before: share of unsteered reports that already are as wanted.
        seed: of the bootstrap; the same resampled studies for every method.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        part = table.loc[(table.method == name) & (table.half == "report")].sort_values(by="study")
        row: dict[str, Any] = {"method": name, "strength": chosen[name], "n": len(part), "unsteered": before}
        for metric in METRICS:
            values = part[metric].to_numpy()
            if metric in SHARES:  # a bootstrap of 0 hits would claim certainty
                low, high = wilson(int(values.sum()), len(values))
            else:
                resampled = bootstrap_mean(values, seed=seed)
                low, high = resampled.low, resampled.high
            row |= {metric: float(values.mean()), f"{metric}_low": float(low), f"{metric}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def dose_response(tables: SteeringTables) -> Figure:
    """On-target and off-target shares of the choosing half against strength, a line a method."""
    swept = tables.studies[tables.studies.half == "choose"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    colours = mpl.colormaps["tab10"]
    for axis, metric, title in zip(
        axes, ("on_target", "off_target"), ("states the finding", "other labels changed"), strict=True
    ):
        for i, (name, part) in enumerate(swept.groupby("method", sort=False)):
            means = part.groupby("strength")[metric].mean()
            dashed = "--" if "random" in str(name) or "flipped" in str(name) else "-"
            axis.plot(
                means.index, 100 * means, dashed, marker="o", ms=4, color=colours(i % 10), label=str(name)
            )
        axis.set(
            xlabel="strength", ylabel="% of studies" if metric == "on_target" else "% of labels", title=title
        )
        axis.set_ylim(bottom=-2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(tables.finding.replace("_", " "))
    return figure

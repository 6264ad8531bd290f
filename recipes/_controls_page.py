"""Tables of `controls_table`: paired differences of spatial scores, and the Markdown page."""

import numpy as np
import pandas as pd

from sae_lens_maira.latents.space import MEASURES
from sae_lens_maira.stats import bootstrap

KINDS = ("trained", "frozen_decoder", "frozen_encoder", "untrained", "raw")


def per_finding(kind: str, maps: dict[str, np.ndarray]) -> pd.DataFrame:
    """Mean spatial scores per finding."""
    columns = [*MEASURES, *(f"elsewhere {m}" for m in MEASURES)]
    frame = pd.DataFrame({f: values[:, :6].mean(0) for f, values in maps.items()}, index=columns).T
    frame["n"] = [len(values) for values in maps.values()]
    return frame.rename_axis("finding").reset_index().assign(kind=kind)


def compare(trained: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean over findings of each spatial score and its control, and the difference trained minus other, paired over
    studies.
    """
    ids = sorted({int(i) for values in trained.values() for i in values[:, 6]})
    at = {i: row for row, i in enumerate(ids)}
    cells: dict[str, float] = {}
    for column, measure in enumerate(MEASURES):
        sums = np.zeros((2, len(trained), len(ids)))
        count = np.zeros((len(trained), len(ids)))
        for f, finding in enumerate(trained):
            rows = [at[int(i)] for i in trained[finding][:, 6]]
            sums[0, f, rows], sums[1, f, rows] = trained[finding][:, column], other[finding][:, column]
            count[f, rows] = 1

        def difference(weights: np.ndarray, sums: np.ndarray = sums, count: np.ndarray = count) -> np.ndarray:
            return ((weights @ (sums[0] - sums[1]).T) / np.maximum(weights @ count.T, 1)).mean(1)

        own = float(np.mean([values[:, column].mean() for values in other.values()]))
        interval = bootstrap(difference, len(ids))
        gain = float(difference(np.ones((1, len(ids))))[0])
        cells |= gain_cells(measure, own, gain, float(interval.low), float(interval.high))
        cells[f"{measure} elsewhere"] = float(np.mean([v[:, 3 + column].mean() for v in other.values()]))
    return cells


def gain_cells(name: str, value: float, gain: float, low: float, high: float) -> dict[str, float]:
    """Cells of a control's measure: its value, and the difference of the trained SAE with its interval."""
    return {name: value, f"{name} trained minus": gain, f"{name} low": low, f"{name} high": high}


def markdown(frame: pd.DataFrame, space: pd.DataFrame) -> str:
    """Format the tables as Markdown: one line per measure, one column per SAE."""
    lines = ["# Measures of an SAE and its controls", ""]
    for place, part in frame.groupby("place", sort=False):
        rows = part.set_index("kind")
        lines += [f"## {place} positions, {int(rows['n'].iloc[0])} studies of the reporting half", ""]
        lines += ["| measure | " + " | ".join(k.replace("_", " ") for k in rows.index) + " |"]
        lines += ["|---|" + "---|" * len(rows)]
        for name in ("explained variance", "loss recovered"):
            lines.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in rows[name]) + " |")
        for name in ("F1 of firing", *(MEASURES if place == "image" else ())):
            cells = [
                f"{r[name]:.3f}"
                if kind == "trained"
                else f"{r[name]:.3f} ({r[f'{name} trained minus']:+.3f}, {r[f'{name} low']:+.3f} to "
                f"{r[f'{name} high']:+.3f})"
                for kind, r in rows.iterrows()
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
            if name in MEASURES:
                lines.append(
                    f"| {name}, map of another study | "
                    + " | ".join(f"{v:.3f}" for v in rows[f"{name} elsewhere"])
                    + " |"
                )
        if place == "image":
            steered = [
                f"{r['steering']:.0%} ({r['steering low']:.0%} to {r['steering high']:.0%}), others changed "
                f"{r['steering off-target']:.1%}, strength {r['steering strength']:g}"
                for _, r in rows.iterrows()
            ]
            lines.append("| reports that state the finding when steered | " + " | ".join(steered) + " |")
            lines.append(
                "| same, random direction | "
                + " | ".join(f"{v:.0%}" for v in rows["random direction"])
                + " |"
            )
        for name in ("detection", "detection shuffled"):
            scores = zip(rows[name], rows["detection latents"], strict=True)
            cells = [f"{score:.3f} ({latents:.0f} latents)" for score, latents in scores]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    wide = space.pivot(index="finding", columns="kind", values=[*MEASURES])
    lines += [
        "## Image latents in space, by finding",
        "",
        "Pointing / energy / IoU of each finding's best latent; findings that are never boxed are left out.",
        "",
    ]
    lines += ["| finding | studies | " + " | ".join(k.replace("_", " ") for k in KINDS) + " |"]
    lines += ["|---|---|" + "---|" * len(KINDS)]
    counts = space[space["kind"] == "trained"].set_index("finding")["n"]
    for finding in counts.index:
        cells = [" / ".join(f"{wide.loc[finding, (m, kind)]:.2f}" for m in MEASURES) for kind in KINDS]
        lines.append(f"| {finding.replace('_', ' ')} | {counts[finding]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

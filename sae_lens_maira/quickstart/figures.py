"""The quickstart's figures: agreement bars, heatmaps of top studies, and the steering run.

Each function draws one PNG from plain results; none of them computes a score. Heatmaps are drawn over the image as the
model sees it, one square per patch, with the truth's box where the finding has one.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.io import save_figure
from sae_lens_maira.latents import Agreement
from sae_lens_maira.phantom import FINDING_KEYS
from sae_lens_maira.quickstart.results import PlaceResult
from sae_lens_maira.quickstart.sae import TrainedSAE
from sae_lens_maira.quickstart.steer import SteeringResult
from sae_lens_maira.studies import Study

# Okabe and Ito's palette: distinguishable with any colour vision.
COLOURS = ("#0072B2", "#CC79A7", "#E69F00", "#D55E00", "#999999", "#009E73")
FRONTAL = 0
N_TOP = 4


def draw_agreement(places: Sequence[PlaceResult], file: Path) -> None:
    """Firing F1 of every finding, one panel per kind of position, with bootstrap intervals."""
    figure = Figure(figsize=(11, 3.6 * len(places)))
    axes = figure.subplots(len(places), 1, sharex=True, squeeze=False)
    for axis, place in zip(axes[:, 0], places, strict=True):
        dictionaries = (
            place.trained,
            *place.frozen.values(),
            place.untrained,
            place.raw,
            place.supervised,
        )
        colours = (COLOURS[0], *COLOURS[1 : 1 + len(place.frozen)], *COLOURS[3:])
        width = 0.8 / len(dictionaries)
        for number, (scores, colour) in enumerate(zip(dictionaries, colours, strict=True)):
            _bars(axis, scores, (number - (len(dictionaries) - 1) / 2) * width, width, colour)
        axis.set_ylim(0, 1.02)
        axis.set_ylabel("F1 of firing")
        axis.set_title(
            f"{place.place} positions (held-out half, n = {place.trained.n})", loc="left", fontsize=10
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=6, frameon=False, fontsize=9)
    labels = [key.replace("_", " ") for key in FINDING_KEYS]
    axes[-1, 0].set_xticks(range(len(labels)), labels, rotation=35, ha="right", fontsize=9)
    _save(figure, file)


def _bars(axis: Axes, scores: Agreement, shift: float, width: float, colour: str) -> None:
    where = np.arange(len(scores.findings)) + shift
    errors = np.clip(np.stack([scores.f1 - scores.low, scores.high - scores.f1]), 0, None)
    axis.bar(where, scores.f1, width, color=colour, label=scores.name)
    axis.errorbar(where, scores.f1, yerr=errors, fmt="none", ecolor="black", elinewidth=0.6, alpha=0.6)


def draw_heatmaps(
    finding: str,
    latent: int,
    trained: TrainedSAE,
    rows: ActivationRows,
    studies: Sequence[Study],
    among: np.ndarray,
    file: Path,
) -> None:
    """The frontal images on which a latent is most active, with its activation on every patch.

    Args:
        finding: Key that the latent was chosen for.
        latent: Its number.
        trained: The SAE.
        rows: Image rows of all studies.
        studies: All studies.
        among: (n_studies,) mask of the studies to show, the held-out half.
        file: PNG to write.
    """
    frontal = rows.where((rows.view == FRONTAL) & among[rows.study])
    # One latent of many: encode in pieces and keep its column only.
    parts = [trained.encode(part)[:, latent] for part in frontal.values.split(8192)]
    activation = torch.cat(parts).numpy()
    peak = np.zeros(len(studies))
    np.maximum.at(peak, frontal.study, activation)
    top = np.argsort(-peak, kind="stable")[:N_TOP]
    side = int(frontal.patch_row.max()) + 1
    figure = Figure(figsize=(2.7 * N_TOP, 3.4))
    axes = figure.subplots(1, N_TOP)
    for axis, number in zip(axes, top, strict=True):
        grid = np.zeros((side, side))
        mine = frontal.study == number
        grid[frontal.patch_row[mine], frontal.patch_col[mine]] = activation[mine]
        axis.imshow(np.asarray(studies[number].frontal), cmap="gray", extent=(0, 1, 1, 0))
        shown = np.ma.masked_less_equal(grid, 0)
        axis.imshow(shown, cmap="inferno", alpha=0.5, vmin=0, vmax=max(peak.max(), 1e-9), extent=(0, 1, 1, 0))
        truth = [f for f in studies[number].truth or () if f.present and f.key == finding]
        for found in truth:
            if found.box is not None:
                x0, y0, x1, y1 = found.box
                axis.add_patch(
                    Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="#56B4E9", linewidth=1.5)
                )
        verdict = "present" if truth else "absent"
        axis.set_title(f"{studies[number].study_id}\n{verdict}, peak {peak[number]:.2f}", fontsize=8)
        axis.set_axis_off()
    figure.suptitle(f"latent {latent}: {finding.replace('_', ' ')}", fontsize=10, x=0.01, ha="left")
    _save(figure, file, top=0.95)


def draw_steering(result: SteeringResult, file: Path) -> None:
    """On-target and off-target effect of every intervention on held-out negative studies."""
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(result.rows)))
    axis = figure.subplots()
    where = np.arange(len(result.rows))
    on = np.array([row.on_target for row in result.rows])
    errors = np.clip(
        np.stack([[r.on_target - r.low for r in result.rows], [r.high - r.on_target for r in result.rows]]),
        0,
        None,
    )
    axis.barh(where - 0.2, on, 0.38, color=COLOURS[0], label="report states the finding")
    axis.errorbar(on, where - 0.2, xerr=errors, fmt="none", ecolor="black", elinewidth=0.8)
    axis.barh(
        where + 0.2,
        [r.off_target for r in result.rows],
        0.38,
        color=COLOURS[1],
        label="other findings changed",
    )
    axis.set_yticks(
        where, [f"{row.label} x {row.strength:g}" if row.strength else row.label for row in result.rows]
    )
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    name = result.finding.replace("_", " ")
    axis.set_title(
        f"steering {name} into {result.rows[0].n} held-out studies without it", loc="left", fontsize=10
    )
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def _save(figure: Figure, file: Path, top: float = 1.0) -> None:
    # A Figure without pyplot: a notebook's own backend and open figures are not changed.
    figure.tight_layout(rect=(0, 0, 1, top))
    save_figure(figure, file, dpi=110)

"""Draw the figure of the README: an image with a latent's patches and name, and a report before and after steering.

    python recipes/readme_figure.py quickstart_out docs/figures/phantom.png

It reads the output of `sae-lens-maira quickstart`: the SAE of image patches, the records and the offline
interpretations. The latent is the best one of the finding by agreement; steering adds the eight latents of largest map
difference.
"""

import sys
import textwrap
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.interp.records import load
from sae_lens_maira.io import save_figure
from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, load_phantom, read_report, truth_labels
from sae_lens_maira.sae import load_matryoshka
from sae_lens_maira.steering import Add, steering
from sae_lens_maira.steering.choose import by_map_difference
from sae_lens_maira.steering.positions import patches

FINDING, HOOK, N_LATENTS, STRENGTH = "cardiomegaly", "blocks.3.hook_resid_post", 8, 2.0


def main(folder: Path, out: Path) -> None:
    """Draw the figure from the folder of a quickstart."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    maira, sae = load_phantom(), load_matryoshka(folder / "sae_image")
    drawn = generate_studies(300, seed=60_000)
    studies = [study for study in drawn if study.prior_frontal is None and study.lateral is None]
    present = np.array([truth_labels(study)[FINDING_KEYS.index(FINDING)] for study in studies])
    rows = read_rows(maira, studies, HOOK, RowSettings(roles="image_only"), progress=False)
    ranking, difference = by_map_difference(rows, sae.encode, sae.W_dec.detach(), present, ~present)
    latents = [int(j) for j in ranking.scores.abs().topk(N_LATENTS).indices]
    side = round(len(difference) ** 0.5)

    table = pd.read_csv(folder / "tables" / "agreement_image.csv", index_col="finding")
    best = int(table.loc[FINDING, "latent"])
    names = {one.latent: one.explanation for one in load(folder / "records")}
    with torch.no_grad():
        fires = sae.encode(rows.values)[:, best].numpy()
    subject = int(rows.study[np.where(present[rows.study], fires, -1).argmax()])
    fires = fires[rows.study == subject].reshape(side, side)

    negative = [studies[int(i)] for i in np.flatnonzero(~present)[:4]]
    encoding = maira.processor.encode(negative)
    reports = []
    for strength in (0.0, STRENGTH):
        items = [
            Add(
                latents=(j,),
                strength=strength,
                unit="raw",
                where=patches(grid=difference[:, j].reshape(side, side)),
            )
            for j in latents
        ]
        with steering(maira, sae, HOOK, items, encoding) as run:
            reports.append([found.text for found in run.reports(maira.processor, 90)])
    shown = next((i for i, text in enumerate(reports[1]) if FINDING in read_report(text).present), 0)

    figure, axes = plt.subplots(
        1, 3, figsize=(11, 3.3), layout="constrained", width_ratios=(1, 1, 1.6), facecolor="white"
    )
    image = np.asarray(studies[subject].frontal)
    for axis, activation in zip(axes[:2], (None, fires), strict=True):
        axis.imshow(image, cmap="gray", extent=(0, side, side, 0))
        axis.set_axis_off()
        if activation is not None:
            axis.imshow(
                activation,
                cmap="inferno",
                alpha=np.clip(activation / activation.max(), 0, 0.75),
                extent=(0, side, side, 0),
            )
    name = textwrap.shorten(
        names.get(best) or f"best latent of {FINDING}, by agreement", 60, placeholder=" …"
    )
    axes[0].set_title("synthetic image with cardiomegaly\n", fontsize=9)
    axes[1].set_title(
        f"latent {best}, F1 {table.loc[FINDING, 'f1']:.2f}\n{textwrap.fill(name, 40)}", fontsize=9
    )
    axes[2].set_axis_off()
    place = 1.0
    for title, text in zip(
        (
            "another image, without it: the phantom's report",
            f"the same image, {N_LATENTS} latents added at its patches",
        ),
        (reports[0][shown], reports[1][shown]),
        strict=True,
    ):
        axes[2].text(0, place, title, fontsize=9, weight="bold", va="top")
        body = textwrap.fill(text, 62)
        axes[2].text(0, place - 0.08, body, fontsize=8.5, va="top")
        place -= 0.16 + 0.07 * (body.count("\n") + 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Write a quickstart's folder: `report.md`, `results.json`, tables as CSV, figures as PNG.

The text states what was measured, on what, and next to which control; it claims nothing that the numbers do not
show. It computes nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.io import atomic_write, csv_of
from sae_lens_maira.latents import Halves
from sae_lens_maira.phantom import FINDING_KEYS
from sae_lens_maira.quickstart.figures import draw_agreement, draw_heatmaps, draw_steering
from sae_lens_maira.quickstart.results import PlaceResult, QuickstartResult
from sae_lens_maira.quickstart.steer import SteeringResult
from sae_lens_maira.studies import Study


def write_report(
    result: QuickstartResult, studies: Sequence[Study], rows: ActivationRows, halves: Halves
) -> None:
    """Write everything into `result.folder`."""
    folder = result.folder
    for name in ("figures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    places = (result.text, result.image)
    for place in places:
        table = folder / "tables" / f"agreement_{place.place}.csv"
        atomic_write(table, csv_of(agreement_frame(place), index=True))
    draw_agreement(places, folder / "figures" / "agreement.png")
    for column, finding in enumerate(FINDING_KEYS):
        latent = int(result.image.trained.unit[column])
        file = folder / "figures" / f"latent_{finding}.png"
        draw_heatmaps(finding, latent, result.image.sae, rows, studies, halves.report, file)
    draw_steering(result.steering, folder / "figures" / "steering.png")
    atomic_write(folder / "results.json", json.dumps(summary(result), indent=2) + "\n")
    atomic_write(folder / "report.md", _markdown(result))


def agreement_frame(place: PlaceResult) -> pd.DataFrame:
    """One row per finding: the latent, its F1 with interval, and the controls' F1."""
    best = place.trained
    return pd.DataFrame(
        {
            "latent": best.unit,
            "f1": best.f1.round(3),
            "low": best.low.round(3),
            "high": best.high.round(3),
            **{kind: scores.f1.round(3) for kind, scores in place.frozen.items()},
            "untrained": place.untrained.f1.round(3),
            "raw": place.raw.f1.round(3),
            "supervised": place.supervised.f1.round(3),
            "positives": best.positives,
        },
        index=pd.Index(best.findings, name="finding"),
    )


def summary(result: QuickstartResult) -> dict[str, object]:
    """The main figures, for machines."""
    places = {
        place.place: {
            "mean_f1": float(place.trained.f1.mean()),
            "mean_f1_untrained": float(place.untrained.f1.mean()),
            "mean_f1_raw": float(place.raw.f1.mean()),
            "mean_f1_supervised": float(place.supervised.f1.mean()),
            "gain": place.gain.mean,
            "gain_low": place.gain.low,
            "gain_high": place.gain.high,
            "mean_f1_frozen": {kind: float(scores.f1.mean()) for kind, scores in place.frozen.items()},
            "gains": {kind: asdict(gain) for kind, gain in place.gains.items()},
            "l0": place.l0,
            "explained_variance": place.explained_variance,
            "n_studies": place.trained.n,
            "n_rows": place.n_rows,
            "draws": [asdict(draw) for draw in place.draws],
        }
        for place in (result.text, result.image)
    }
    steering = [
        {
            "label": row.label,
            "strength": row.strength,
            "on_target": row.on_target,
            "low": row.low,
            "high": row.high,
            "off_target": row.off_target,
            "errors": row.errors,
            "errors_change": row.errors_change,
            "n": row.n,
        }
        for row in result.steering.rows
    ]
    return {
        "model": "phantom",
        "hook_names": {place.place: place.sae.hook_name for place in (result.text, result.image)},
        "d_sae": result.text.sae.widths[-1],
        "widths": list(result.text.sae.widths),
        "agreement": places,
        "steering": {"finding": result.steering.finding, "rows": steering},
    }


def _markdown(result: QuickstartResult) -> str:
    config = result.config
    return f"""# Quickstart on the phantom

The phantom is a small MAIRA-2 trained on synthetic radiographs. It tests the tools: nothing here is a result about
medicine, or about MAIRA-2 itself.

- {config.studies} studies that the phantom was not trained on; latents and strengths chosen on one half of the
  patients, every figure below from the other half ({result.text.trained.n} studies)
- two Matryoshka BatchTopK SAEs of widths {", ".join(map(str, result.text.sae.widths))}: report tokens at
  `{result.text.sae.hook_name}` (k = {config.text_k:g}, {config.text_steps} steps of 1,024 whitened rows, seed
  {result.text.sae.seed}), image patches at `{result.image.sae.hook_name}` (k = {config.k}, {config.steps} steps, seed
  {result.image.sae.seed})

## Which latents agree with findings

F1 of firing: a latent fires in a study if it is active at one or more positions. No threshold is tuned.
*frozen decoder* and *frozen encoder* are trained like the SAE while their random decoder or encoder stays fixed.
*untrained* has random directions and the same L0 (where the SAE was trained on whitened rows, directions that are
random in the whitened space), *raw* are the residual stream's own dimensions at the same L0, *supervised* is the
difference of means, which has seen the labels of the first half.

![agreement](figures/agreement.png)

{_place(result.text, "report tokens")}
{_place(result.image, "image patches")}
## Where a latent looks

The four held-out images on which each finding's image latent is most active. Blue boxes are the truth.

{chr(10).join(f"![{finding}](figures/latent_{finding}.png)" for finding in FINDING_KEYS)}

{_steering(result.steering)}
## The latents, one by one

Open [page/index.html](page/index.html) for latents of the image SAE and [page_text/index.html](page_text/index.html)
for those of the text SAE: what they fire on in held-out studies, with explanations made without a language model. No
server is needed. `sae-lens-maira latents` records all latents, `sae-lens-maira dashboards html` makes such a page.

## Load the SAEs

In plain SAELens, without this package:

```python
from sae_lens import SAE

text_sae = SAE.load_from_disk("sae_text")
image_sae = SAE.load_from_disk("sae_image")
```

`sae_text_seeds` has every text SAE that was trained. With this package, `sae_lens_maira.sae.load_matryoshka` reads the
same folders with their levels.
"""


def _place(place: PlaceResult, what: str) -> str:
    means = {kind: scores.f1.mean() for kind, scores in place.frozen.items()}
    means |= {"untrained": place.untrained.f1.mean(), "raw": place.raw.f1.mean()}
    frame = pd.DataFrame(
        {
            "mean F1": [f"{mean:.3f}" for mean in means.values()],
            "trained minus control": [f"{place.gains[kind].mean:+.3f}" for kind in means],
            "95 % interval": [
                f"{place.gains[kind].low:+.3f} to {place.gains[kind].high:+.3f}" for kind in means
            ],
        },
        index=pd.Index([kind.replace("_", " ") for kind in means], name="control"),
    )
    return f"""### {place.place.capitalize()} positions ({what})

Mean F1 {place.trained.f1.mean():.3f} (supervised direction {place.supervised.f1.mean():.3f}). Explained variance
{place.explained_variance:.3f} at L0 {place.l0:.1f} on {place.n_rows:,} rows. Intervals are a paired bootstrap over
studies.

{_table(frame)}

{_table(agreement_frame(place))}
{_draws(place)}"""


def _draws(place: PlaceResult) -> str:
    if len(place.draws) < 2:
        return ""
    frame = pd.DataFrame(
        {
            "taken": ["yes" if draw.seed == place.sae.seed else "" for draw in place.draws],
            "F1, selection half": [f"{draw.choose_f1:.3f}" for draw in place.draws],
            "F1, other half": [f"{draw.f1:.3f}" for draw in place.draws],
            "untrained, selection half": [f"{draw.untrained_choose_f1:.3f}" for draw in place.draws],
            "untrained, other half": [f"{draw.untrained_f1:.3f}" for draw in place.draws],
            "explained variance": [f"{draw.explained_variance:.3f}" for draw in place.draws],
        },
        index=pd.Index([draw.seed for draw in place.draws], name="seed"),
    )
    return f"""
SAEs that differ in their initial weights alone learn different latents. {len(place.draws)} were trained; the one with
the highest F1 on the selection half was taken, and so was the untrained SAE, drawn as often at the L0 of the one taken.

{_table(frame)}
"""


def _steering(steering: SteeringResult) -> str:
    rows = pd.DataFrame(
        {
            "intervention": [row.label for row in steering.rows],
            "strength": [f"{row.strength:g}" for row in steering.rows],
            "states the finding": [
                f"{row.on_target:.0%} ({row.low:.0%} to {row.high:.0%})" for row in steering.rows
            ],
            "other findings changed": [f"{row.off_target:.1%}" for row in steering.rows],
            "errors in other findings per report": [f"{row.errors:.2f}" for row in steering.rows],
            "change": [
                "{:+.2f} ({:+.2f} to {:+.2f})".format(*row.errors_change) if row.strength else ""
                for row in steering.rows
            ],
            "delta / h": [f"{row.relative_norm:.2f}" for row in steering.rows],
            "studies": [row.n for row in steering.rows],
        }
    ).set_index("intervention")
    sweep = ", ".join(f"{strength:g}: {share:.0%}" for strength, share in steering.sweep)
    # The first row is without an intervention, the second the map of the trained SAE's latents.
    choice = f"The strength {steering.rows[1].strength:g} was chosen on other studies ({sweep})."
    if not any(share for _, share in steering.sweep):
        choice = (
            f"No strength put the finding into a report of the studies that it is chosen on ({sweep}); the weakest was "
            "taken."
        )
    return f"""## Steering from the image positions

`{steering.finding}` into held-out studies that do not have it: a map of the latents
{", ".join(map(str, steering.latents))} added at the frontal image's patches during the prefill.
{choice} Maps of control SAEs are scaled to the same norm; the strength of each was chosen in the same way.
Intervals are 95 % (Wilson; of changes the paired bootstrap). Errors are false findings,
omissions, wrong sides, places and changes against the truth, in findings other than the steered one.

![steering](figures/steering.png)

{_table(rows)}

Study {steering.example}, before:

> {steering.before}

and steered:

> {steering.after}

"""


def _table(frame: pd.DataFrame) -> str:
    """A Markdown table (pandas' own needs one more package)."""
    frame = frame.reset_index()
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + " --- |" * len(frame.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)


__all__ = ["agreement_frame", "summary", "write_report"]

"""Do change words follow the prior? The phantom's prior image and prior report are swapped for those of another study.

For every finding that a study has, the prior says whether it is new (the prior does not have it) or was there before.
A report follows its prior if a change word that it states agrees with that. Latents of report tokens that are chosen,
on one half, for reports that state something new should change with the swap; latents chosen for findings should not.

    python recipes/counterfactual_prior.py --config recipes/counterfactual_prior.yaml
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

from sae_lens_maira.attribution.counterfactual import counterfactual
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.interface import load_sae
from sae_lens_maira.io import atomic_write, csv_of
from sae_lens_maira.maira2 import role_mask
from sae_lens_maira.phantom import generate_studies, load_phantom, read_report
from sae_lens_maira.phantom.sampling import FINDING_KEYS
from sae_lens_maira.recipes._shared import mean_line
from sae_lens_maira.stats import f1_of_firing
from sae_lens_maira.studies import Study

BEFORE = frozenset({"unchanged", "larger", "smaller"})
"""Change words that say that the prior had the finding."""


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Attributes:
        out: Folder of the tables; made if missing.
        sae: SAE of report tokens.
        studies: Studies with a prior; one half chooses latents, the other is reported.
        latents: Latents that are chosen for change, and for findings.
        seed: Random seed of the studies.
    """

    out: Path = Path("runs/counterfactual_prior")
    sae: str = "phantom-text"
    studies: int = 120
    latents: int = 8
    seed: int = 99_000


def run(settings: Settings) -> Path:
    """Run the comparison and write its tables.

    Args:
        settings: The settings.

    Returns:
        The folder.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    hooked, sae = HookedMaira2(load_phantom()), load_sae(settings.sae)
    words: list[dict[str, Any]] = []
    fires: list[np.ndarray] = []
    news: list[list[bool]] = []
    stated: list[list[np.ndarray]] = []
    for study, own, other in tqdm(pairs(settings), total=settings.studies, desc="swap the prior"):
        swapped = counterfactual(study, prior_image=other.frontal, prior_report=other.report)
        sides = []
        for arm, one, before in (("own prior", study, own), ("swapped prior", swapped, other.present_keys)):
            (report,) = hooked.generate(one, return_type="reports")
            labels = read_report(report.text)
            for key in sorted(study.present_keys & labels.present):
                word = labels.changes.get(key)
                if word is not None:
                    expected = BEFORE if key in before else {"new"}
                    words.append({
                        "study": study.study_id, "arm": arm, "finding": key, "word": word,
                        "flips": (key in own) != (key in other.present_keys), "follows": word in expected,
                    })  # fmt: skip
            shown = np.array([key in labels.present for key in FINDING_KEYS])
            sides.append((firing(hooked, sae, one, report.text), "new" in labels.changes.values(), shown))
        fires.append(np.stack([side[0] for side in sides]))
        news.append([side[1] for side in sides])
        stated.append([side[2] for side in sides])
    table = pd.DataFrame(words)
    atomic_write(settings.out / "words.csv", csv_of(table))
    lines = [
        "# Prior swapped",
        "",
        "| measure | value | 95 % interval | n |",
        "|---|---|---|---|",
    ]
    for arm, rows in table.groupby("arm", sort=False):
        lines.append(mean_line(f"{arm}: change words that follow it", rows["follows"].to_numpy(float)))
    flipped = table.query("arm == 'swapped prior' and flips")
    lines.append(
        mean_line("swapped prior, only where old and new prior disagree", flipped["follows"].to_numpy(float))
    )
    chosen = flips(np.stack(fires), np.array(news), np.array(stated), settings.latents)
    lines += [mean_line(name, values) for name, values in chosen.items()]
    atomic_write(settings.out / "counterfactual_prior.md", "\n".join(lines) + "\n")
    return settings.out


def pairs(settings: Settings) -> Iterator[tuple[Study, frozenset[str], Study]]:
    """Studies with a prior and its report, the findings of that prior, and another study to take a prior from."""
    drawn = generate_studies(12 * settings.studies, settings.seed)
    others = [s for s in drawn if s.prior_frontal is None and s.report and s.present_keys]
    mine = [s for s in drawn if s.prior_frontal is not None and s.prior_report and s.present_keys]
    for study, other in list(zip(mine, others, strict=False))[: settings.studies]:
        yield study, read_report(study.prior_report or "").present, other


@torch.no_grad()
def firing(hooked: HookedMaira2, sae: Any, study: Study, report: str) -> np.ndarray:
    """(d_sae,) bool, latents active at a token of the report."""
    processor: Any = hooked.processor
    encoding = processor.encode([study], report=[report], padding_side="right")
    hook = sae.cfg.metadata.hook_name
    _, cache = hooked.run_with_cache(encoding, names_filter=[hook])
    here = role_mask(encoding, "generated_only")[0]
    return (sae.encode(cache[hook][0][here]) > 0).any(0).numpy()


def flips(fires: np.ndarray, news: np.ndarray, stated: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """How often latents change with the swap, on the second half of the studies.

    Args:
        fires: (S, 2, d_sae) bool, latents active in the report with the own and with the swapped prior.
        news: (S, 2) bool, whether the report states something new.
        stated: (S, 2, F) bool, findings that the report states.
        n: Latents of either choice.
    """
    half = len(fires) // 2
    flat, changed = fires[:half].reshape(-1, fires.shape[2]), news[:half].reshape(-1)
    score = flat[changed].mean(0) - flat[~changed].mean(0)
    change = np.argsort(-score)[:n]
    findings = stated[:half].reshape(-1, stated.shape[2])
    ranked = [int(j) for j in np.argsort(-f1_of_firing(flat, findings).max(1)) if j not in change][:n]
    turned = news[half:, 0] != news[half:, 1]
    later = fires[half:]
    moved = later[:, 0] != later[:, 1]
    # A latent flips with its report if it is active on the side that states something new and silent on the other.
    right = later[np.arange(len(later)), news[half:].argmax(1)] & moved
    return {
        "latents of change that flip, where the statement of something new does": right[turned][
            :, change
        ].mean(1),
        "latents of findings that change there": moved[turned][:, ranked].mean(1),
        "latents of change that change where the statement does not": moved[~turned][:, change].mean(1),
    }


if __name__ == "__main__":
    from sae_lens_maira.cli.parser import run_recipe

    sys.exit(run_recipe(Settings, run, __doc__))

"""Does image evidence tell true sentences of generated reports from false ones? Phantom, also with planted errors.

Every sentence that states a finding is true if the study has all findings it states. Two scores are compared as
predictors of truth, by the area under the ROC curve: the sentence's own log-probability per token (the baseline) and
its image evidence per token, at several blocks.

    python recipes/image_evidence.py --config recipes/image_evidence.yaml
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_lens_maira.attribution.evidence import image_evidence
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.io import atomic_write, csv_of
from sae_lens_maira.phantom import generate_studies, load_phantom, read_report
from sae_lens_maira.phantom.flaws import Flaw, plant
from sae_lens_maira.stats import bootstrap


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Attributes:
        out: Folder of the tables; made if missing.
        layers: Decoder blocks at whose output the images' content is removed.
        studies: Studies per phantom.
        seed: Random seed of the studies.
        teaching: Studies from which the planted errors' directions are measured.
    """

    out: Path = Path("runs/image_evidence")
    layers: tuple[int, ...] = (0, 3)
    studies: int = 300
    seed: int = 97_000
    teaching: int = 300


def run(settings: Settings) -> Path:
    """Run the comparison and write its tables.

    Args:
        settings: The settings.

    Returns:
        The folder.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    clean = load_phantom()
    taught = [s for s in generate_studies(settings.teaching, 71_000) if s.prior_frontal is None]
    lines = [
        "# Image evidence",
        "",
        "| phantom | score | AUC | 95 % interval | true | false |",
        "|---|---|---|---|---|---|",
    ]
    for name, maira in (("clean", clean), ("planted errors", plant(clean, taught, Flaw()))):
        hooked = HookedMaira2(maira)
        rows = []
        for study in tqdm(generate_studies(settings.studies, settings.seed), desc=name, unit="study"):
            (report,) = hooked.generate(study, return_type="reports")
            for layer in settings.layers:
                found = image_evidence(hooked, study, f"blocks.{layer}.hook_resid_post", report=report.text)
                for row in found.to_dict("records"):
                    stated = read_report(row["sentence"]).present
                    if stated:
                        rows.append(row | {"layer": layer, "true": stated <= study.present_keys})
        frame = pd.DataFrame(rows)
        atomic_write(settings.out / f"{name.replace(' ', '_')}.csv", csv_of(frame))
        first = frame.query("layer == @settings.layers[0]")
        lines.append(_line(name, "log-probability per token", first, "score_per_token"))
        for layer, part in frame.groupby("layer"):
            lines.append(_line(name, f"image evidence per token, block {layer}", part, "evidence_per_token"))
    atomic_write(settings.out / "image_evidence.md", "\n".join(lines) + "\n")
    return settings.out


def auc(scores: np.ndarray, true: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a true sentence scores above a false one; NaN without both."""
    if not true.any() or true.all():
        return float("nan")
    ranks = pd.Series(scores).rank().to_numpy()
    n = int(true.sum())
    return float((ranks[true].sum() - n * (n + 1) / 2) / (n * (len(true) - n)))


def _line(name: str, label: str, rows: pd.DataFrame, column: str) -> str:
    scores, true = rows[column].to_numpy(float), rows["true"].to_numpy(bool)
    drawn = bootstrap(
        lambda weights: np.array([auc(scores.repeat(w), true.repeat(w)) for w in weights]), len(true), 500
    )
    low, high = np.nanquantile(drawn.samples, [0.025, 0.975])  # a resample of one kind only has no AUC
    found = auc(scores, true)
    return f"| {name} | {label} | {found:.3f} | {low:.3f} to {high:.3f} | {int(true.sum())} | {int((~true).sum())} |"


if __name__ == "__main__":
    from sae_lens_maira.cli.parser import run_recipe

    sys.exit(run_recipe(Settings, run, __doc__))

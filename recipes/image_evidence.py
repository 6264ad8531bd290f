"""Does image evidence separate true from false sentences of generated reports? On the phantom, also with planted
errors.

A sentence that states findings is true if the study has all of them. Two scores are compared as predictors of truth by
the area under the ROC curve: the log-probability of the sentence per token (the baseline) and its image evidence per
token, at several blocks. Intervals and differences are bootstrapped over studies.

    python recipes/image_evidence.py --config recipes/image_evidence.yaml
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_lens_maira.attribution.evidence import image_evidence
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.io import atomic_write, csv_of
from sae_lens_maira.phantom import generate_studies, load_phantom, read_report
from sae_lens_maira.phantom.flaws import Flaw, plant
from sae_lens_maira.stats import bootstrap

BATCH = 16
DRAWS = 500


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Attributes:
        out: Folder of the tables; created if missing.
        layers: Decoder blocks at whose output the images' content is removed.
        studies: Studies per phantom.
        seed: Random seed of the studies.
        teaching: Number of studies from which the directions of the planted errors are measured.
        flaw: Planted errors.
    """

    out: Path = Path("runs/image_evidence")
    layers: tuple[int, ...] = (0, 3)
    studies: int = 400
    seed: int = 97_000
    teaching: int = 240
    flaw: Flaw = field(default_factory=Flaw)


def run(settings: Settings) -> Path:
    """Run the comparison and write its tables.

    Args:
        settings: The settings.

    Returns:
        The folder.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    clean = load_phantom()
    flawed = plant(clean, generate_studies(settings.teaching, 71_000), settings.flaw)
    lines = [
        "# Image evidence",
        "",
        "| phantom | score | AUC | 95 % interval | true | false |",
        "|---|---|---|---|---|---|",
    ]
    for name, maira in (("clean", clean), ("planted errors", flawed)):
        rows = pd.DataFrame(sentence_rows(HookedMaira2(maira), settings, name))
        atomic_write(settings.out / f"{name.replace(' ', '_')}.csv", csv_of(rows))
        lines += table_lines(name, rows)
        if name != "clean":
            stated = [settings.flaw.stated in str(keys).split() for keys in rows["findings"]]
            lines += table_lines(f"{name}, sentences that state {settings.flaw.stated}", rows.loc[stated])
    atomic_write(settings.out / "image_evidence.md", "\n".join(lines) + "\n")
    return settings.out


def sentence_rows(hooked: HookedMaira2, settings: Settings, name: str) -> Iterator[dict[str, Any]]:
    """Yield one row per sentence that states a finding: study, findings, truth, and scores per block."""
    studies = generate_studies(settings.studies, settings.seed)
    with tqdm(total=len(studies), desc=name, unit="study") as progress:
        for start in range(0, len(studies), BATCH):
            batch = studies[start : start + BATCH]
            for study, report in zip(batch, hooked.generate(batch, return_type="reports"), strict=True):
                progress.update()
                if not report.text.strip():
                    continue
                found = {
                    layer: image_evidence(
                        hooked, study, f"blocks.{layer}.hook_resid_post", report=report.text
                    )
                    for layer in settings.layers
                }
                first = found[settings.layers[0]]
                for number, row in enumerate(first.to_dict("records")):
                    stated = read_report(row["sentence"]).present
                    if stated:
                        made: dict[str, Any] = {
                            "study": study.study_id,
                            "sentence": row["sentence"],
                            "findings": " ".join(sorted(stated)),
                            "true": stated <= study.present_keys,
                            "log-probability per token": row["score_per_token"],
                        }
                        for layer, table in found.items():
                            made[_column(layer)] = table["evidence_per_token"].iloc[number]
                        yield made


def _column(layer: int) -> str:
    return f"image evidence per token, block {layer}"


def auc(scores: np.ndarray, true: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve: probability that a true sentence scores above a false one; NaN without both.

    Args:
        scores: (n,) scores; ties count half.
        true: (n,) bool.
        weights: (n,) weight per sentence; 1 if not given.
    """
    w = np.ones(len(scores)) if weights is None else weights.astype(float)
    _, place = np.unique(scores, return_inverse=True)
    yes = np.bincount(place, weights=w * true)
    no = np.bincount(place, weights=w * ~true)
    if not yes.sum() or not no.sum():
        return float("nan")
    return float((yes * (no.cumsum() - no / 2)).sum() / (yes.sum() * no.sum()))


def table_lines(name: str, rows: pd.DataFrame) -> list[str]:
    """Lines of the table: the AUC of each score, and the difference of each evidence from the log-probability."""
    true = rows["true"].to_numpy(bool)
    _, study = np.unique(rows["study"], return_inverse=True)
    columns = [c for c in rows.columns if c.endswith("per token") or ", block " in c]
    values = {c: rows[c].to_numpy(float) for c in columns}
    counts = f"{int(true.sum())} | {int((~true).sum())} |"
    drawn = bootstrap(
        lambda weights: np.array([[auc(values[c], true, w[study]) for c in columns] for w in weights]),
        int(study.max()) + 1,
        DRAWS,
    )
    lines = []
    for number, column in enumerate(columns):
        low, high = np.nanquantile(drawn.samples[:, number], [0.025, 0.975])
        lines.append(
            f"| {name} | {column} | {auc(values[column], true):.3f} | {low:.3f} to {high:.3f} | {counts}"
        )
    for number, column in enumerate(columns[1:], start=1):
        low, high = np.nanquantile(drawn.samples[:, number] - drawn.samples[:, 0], [0.025, 0.975])
        gap = auc(values[column], true) - auc(values[columns[0]], true)
        label = f"{column}, minus {columns[0]}"
        lines.append(f"| {name} | {label} | {gap:+.3f} | {low:+.3f} to {high:+.3f} | {counts}")
    return lines


if __name__ == "__main__":
    from sae_lens_maira.cli.parser import run_recipe

    sys.exit(run_recipe(Settings, run, __doc__))

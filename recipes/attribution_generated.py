"""Remove statements from the phantom's reports by removing their causes.

For every statement of a generated report whose finding has a true box, entries are removed from the prompt in rounds
until the report no longer contains the statement (`attribution.regenerate`). The control removes as many random
entries, scaled to the same norm. Every arm has its own file, so that a killed run continues. The recipe `planted_cause`
measures causes of planted errors.

    python recipes/attribution_generated.py --config recipes/attribution_generated.yaml
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sae_lens_maira.attribution import attribute
from sae_lens_maira.attribution.entries import active_entries
from sae_lens_maira.attribution.regenerate import Removal, generate_with_delta, remove_statement
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.io import atomic_write
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import generate_studies, load_phantom, read_report
from sae_lens_maira.phantom.sampling import FINDING_KEYS
from sae_lens_maira.recipes._shared import box_patches, continue_rows, mean_line, sae_of, sae_settings
from sae_lens_maira.studies import Finding, Study

SAVED_EVERY = 10


@dataclass(frozen=True)
class Settings:
    """Settings of the check.

    Attributes:
        out: Folder of the tables; created if missing.
        saes: Folder of SAEs, as in the recipe `attribution`; missing ones are trained.
        arms: SAEs: "trained" and controls.
        layer: Decoder block at whose output entries are removed.
        seeds: Seeds of studies and SAEs.
        statements: Statements per seed and arm.
        step: Entries removed per round.
        max_rounds: Rounds after which a statement counts as not removed.
        protect: Weight of an entry's effect on other sentences.
        train_studies: Studies that an SAE is trained on.
        d_sae: Latents.
        k: Mean active latents per patch.
        steps: Training steps of 1,024 rows.
    """

    out: Path = Path("runs/attribution_generated")
    saes: Path = Path("runs/attribution/saes")
    arms: tuple[str, ...] = ("trained", "frozen_decoder")
    layer: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    statements: int = 60
    step: int = 16
    max_rounds: int = 12
    protect: float = 0.3
    train_studies: int = 500
    d_sae: int = 1024
    k: int = 16
    steps: int = 1500


@dataclass(frozen=True)
class Statement:
    """One statement of a generated report.

    Attributes:
        study: The study.
        report: The report.
        finding: The finding that is stated, with its true box.
    """

    study: Study
    report: str
    finding: Finding


def run(settings: Settings) -> Path:
    """Run the check and write its tables.

    Args:
        settings: The settings.

    Returns:
        The folder.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    maira = load_phantom()
    for seed in settings.seeds:
        for arm in settings.arms:
            _arm(maira, settings, seed, arm)
            write_table(settings)
    return settings.out


def _arm(maira: Maira2, settings: Settings, seed: int, arm: str) -> None:
    """Measure the statements of one arm that are not in its file yet."""

    def rows(done: int) -> Iterator[dict[str, Any]]:
        sae = sae_of(maira, settings, arm, settings.layer, seed)
        hooked = HookedMaira2(maira)
        for one in islice(statements(hooked, seed), done, settings.statements):
            yield {"arm": arm, "seed": seed} | measured(hooked, sae, one, settings)

    file = settings.out / f"generated-{arm}-{seed}.csv"
    depends = sae_settings(settings, arm)
    depends |= {name: getattr(settings, name) for name in ("layer", "step", "max_rounds", "protect")}
    continue_rows(file, depends, settings.statements, rows, f"{arm} seed {seed}", SAVED_EVERY)


def statements(hooked: HookedMaira2, seed: int) -> Iterator[Statement]:
    """Yield statements of generated reports whose finding has a true box."""
    for study in generate_studies(1500, 95_000 + 7_000 * seed):
        boxes = {f.key: f for f in study.truth or () if f.present and f.box is not None}
        if study.prior_frontal is not None:
            continue
        (report,) = hooked.generate(study, return_type="reports")
        for key in sorted(read_report(report.text).present & set(boxes)):
            yield Statement(study, report.text, boxes[key])


def measured(hooked: HookedMaira2, sae: Any, one: Statement, settings: Settings) -> dict[str, Any]:
    """Measure one statement: whether its map points at the box, and the reports without its causes and without random
    entries.
    """

    def states(text: str) -> bool:
        return one.finding.key in read_report(text).present

    hook = f"blocks.{settings.layer}.hook_resid_post"
    answer = attribute(hooked, one.study, sae, report=one.report, roles="image_only", check=False)
    number = next(i for i, item in enumerate(answer.sentences) if states(item.sentence.text))
    grid = answer.map(number)
    removal = remove_statement(
        hooked, one.study, sae, states, one.report, hook, "image_only",
        settings.step, settings.max_rounds, settings.protect,
    )  # fmt: skip
    random = random_report(hooked, sae, one.study, removal, hook, seed=len(one.report))
    before, inside = read_report(one.report).present, box_patches(one.finding, grid.shape)
    row: dict[str, Any] = {
        "study": one.study.study_id,
        "finding": one.finding.key,
        "area": float(inside.mean()),
        "point": bool(inside.flat[grid.argmax()]),
        "entries": len(removal),
        "rounds": removal.rounds,
        "norm": float(removal.delta.norm()),
    }
    for name, text in (("attributed", removal.report), ("random", random)):
        after = read_report(text).present
        row[f"gone {name}"] = one.finding.key not in after
        row[f"others changed {name}"] = len((after ^ before) - {one.finding.key}) / (len(FINDING_KEYS) - 1)
    return row


def random_report(
    hooked: HookedMaira2, sae: Any, study: Study, removal: Removal, hook: str, seed: int
) -> str:
    """Generate the report without as many random active entries, scaled to the same norm."""
    processor: Any = hooked.processor
    prompt = processor.encode([study])
    held = ResidualRun(hooked, prompt, hook)
    entries, _ = active_entries(sae, held.hidden, (held.encoding.view[0] >= 0).nonzero()[:, 0])
    generator = torch.Generator().manual_seed(seed)
    delta = entries.random_delta(len(removal), removal.delta.norm(), generator)
    return generate_with_delta(hooked, prompt, hook, -delta).text


def write_table(settings: Settings) -> None:
    """Write one summary of every row measured so far, with bootstrap intervals over statements."""
    found = pd.concat([pd.read_csv(file) for file in sorted(settings.out.glob("generated-*.csv"))])
    lines = [
        "# Statements removed by their causes",
        "",
        "| arm | measure | mean | 95 % interval | n |",
        "|---|---|---|---|---|",
    ]
    for arm, rows in found.groupby("arm", sort=False):
        for name in rows.select_dtypes(["number", "bool"]):
            if name != "seed":
                lines.append(mean_line(f"{arm} | {name}", rows[name].to_numpy(float)))
    own = found[found["arm"] == "trained"]
    gone = [
        f"{key} {rows['gone attributed'].mean():.2f} (n {len(rows)})" for key, rows in own.groupby("finding")
    ]
    lines += ["", "Gone, per finding (trained): " + ", ".join(gone)]
    atomic_write(settings.out / "generated.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    from sae_lens_maira.cli.parser import run_recipe

    sys.exit(run_recipe(Settings, run, __doc__))

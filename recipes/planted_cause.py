"""Do maps of a false sentence point at its planted cause? On a phantom with a planted error: it takes one finding for
another.

The studies have the finding that the error detects but not the one that it states, and the flawed phantom's report
states it. The map of the words that name it should be strongest at the box of the finding that causes it. The SAE is
trained on the flawed phantom's patches. Maps that need no SAE are measured on the same sentences. The planted
coefficient is measured too: how often it is largest at the box is an upper reference for the maps.

    python recipes/planted_cause.py --config recipes/planted_cause.yaml
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sae_lens_maira.attribution import attribute
from sae_lens_maira.attribution.baselines import gradient_maps
from sae_lens_maira.attribution.inputs import encode_with_report
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.attribution.sentences import report_sentences
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.io import atomic_write
from sae_lens_maira.phantom import generate_studies, load_phantom, read_report
from sae_lens_maira.phantom.flaws import Flaw, plant, planted_coefficient
from sae_lens_maira.recipes._shared import box_patches, continue_rows, mean_line, sae_of, sae_settings
from sae_lens_maira.studies import Study

SAVED_EVERY = 10
BATCH = 16
MARGINS = (0.5, 1.0)
"""The strongest patch counts if its centre is at most this many patches outside the box."""


@dataclass(frozen=True)
class Settings:
    """Settings of the check.

    Attributes:
        out: Folder of the tables; created if missing.
        saes: Folder of SAEs, as in the recipe `attribution`; missing ones are trained.
        layer: Decoder block whose output is read.
        seeds: Seeds of studies and SAEs. Span, candidates and margins were chosen on seed 0.
        statements: Number of false sentences per seed.
        max_steps: Largest number of points of the numerical integration.
        n_check: Number of entries that the ablation check removes.
        teaching: Number of studies from which the directions of the planted error are measured.
        train_studies: Studies that an SAE is trained on.
        d_sae: Latents.
        k: Mean active latents per patch.
        steps: Training steps of 1,024 rows.
        flaw: Planted error.
    """

    out: Path = Path("runs/planted_cause")
    saes: Path = Path("runs/attribution/saes")
    layer: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    statements: int = 30
    max_steps: int = 8
    n_check: int = 32
    teaching: int = 240
    train_studies: int = 500
    d_sae: int = 1024
    k: int = 16
    steps: int = 1500
    flaw: Flaw = field(default_factory=Flaw)


def run(settings: Settings) -> Path:
    """Run the check and write its tables.

    Args:
        settings: The settings.

    Returns:
        The folder.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    clean = load_phantom()
    teaching = generate_studies(settings.teaching, 71_000)
    flawed = plant(clean, teaching, settings.flaw)
    hooked, coefficient = HookedMaira2(flawed), planted_coefficient(clean, teaching, settings.flaw)
    for seed in settings.seeds:

        def rows(done: int, seed: int = seed) -> Iterator[dict[str, Any]]:
            sae = sae_of(flawed, settings, "flawed", settings.layer, seed)
            for study, report in islice(
                false_statements(hooked, seed, settings.flaw), done, settings.statements
            ):
                yield {"seed": seed} | measured(hooked, sae, study, report, coefficient(study), settings)

        depends = sae_settings(settings, "flawed")
        depends |= {name: getattr(settings, name) for name in ("layer", "teaching", "max_steps", "n_check")}
        file = settings.out / f"planted-{seed}.csv"
        continue_rows(file, depends, settings.statements, rows, f"seed {seed}", SAVED_EVERY)
        write_table(settings)
    return settings.out


def false_statements(hooked: HookedMaira2, seed: int, flaw: Flaw) -> Iterator[tuple[Study, str]]:
    """Yield studies with the detected and without the stated finding, whose reports state it in one sentence."""
    drawn = [
        study
        for study in generate_studies(1500, 95_000 + 7_000 * seed)
        if study.prior_frontal is None
        and flaw.stated not in study.present_keys
        and any(f.key == flaw.seen and f.present and f.box is not None for f in study.truth or ())
    ]
    for start in range(0, len(drawn), BATCH):
        batch = drawn[start : start + BATCH]
        for study, report in zip(batch, hooked.generate(batch, return_type="reports"), strict=True):
            if flaw.stated in read_report(report.text).present:
                yield study, report.text


def measured(
    hooked: HookedMaira2,
    sae: Any,
    study: Study,
    report: str,
    coefficient: torch.Tensor,
    settings: Settings,
) -> dict[str, Any]:
    """Measure one false sentence: whether each map points at the box."""
    flaw = settings.flaw
    hook = f"blocks.{settings.layer}.hook_resid_post"
    encoding = encode_with_report(hooked, study, report)
    sentences = report_sentences(encoding, hooked.tokenizer)
    number = next(i for i, s in enumerate(sentences) if flaw.stated in read_report(s.text).present)
    words = flaw.stated.replace("_", " ")
    named = attribute(
        hooked, study, sae, number, report, hook, "image_only",
        candidates=None, max_steps=settings.max_steps, n_check=settings.n_check, words=words,
    )  # fmt: skip
    maps = {"attribution": named.map(0)}
    shape = maps["attribution"].shape
    held = ResidualRun(hooked, named.encoding, hook)
    span = named.sentences[0].sentence.positions
    frontal = (named.encoding.view[0] == 0).nonzero()[:, 0]
    maps |= {name: m[frontal].reshape(shape).numpy() for name, m in gradient_maps(held, span).items()}
    maps["planted coefficient"] = coefficient.reshape(shape).numpy()
    maps["random"] = np.random.default_rng(len(report)).random(shape)
    cause = next(f for f in study.truth or () if f.key == flaw.seen and f.present)
    check = named.sentences[0].check
    assert check is not None
    row: dict[str, Any] = {
        "study": study.study_id,
        "sentence": sentences[number].text,
        "completeness error": check.completeness_error,
        "drop": check.drop,
        "drop random": check.drop_random,
        "drop at least 10 times random": check.drop >= 10 * max(0.0, check.drop_random),
    }
    for margin in MARGINS:
        inside = box_patches(cause, shape, margin)
        row[f"area, {margin} patch"] = float(inside.mean())
        for name, values in maps.items():
            row[f"point {name}, {margin} patch"] = bool(inside.flat[values.argmax()])
    return row


def write_table(settings: Settings) -> None:
    """Write one summary of every row measured so far, with bootstrap intervals over statements."""
    files = sorted(settings.out.glob("planted-*.csv"))
    found = pd.concat([pd.read_csv(file) for file in files])
    flaw = asdict(settings.flaw)
    lines = [
        f"# Planted cause: {flaw['seen']} taken for {flaw['stated']}",
        "",
        "| measure | mean | 95 % interval | n |",
        "|---|---|---|---|",
    ]
    for name in found.select_dtypes(["number", "bool"]):
        if name != "seed":
            lines.append(mean_line(str(name), found[name].to_numpy(float)))
    for seed, rows in found.groupby("seed"):
        for margin in MARGINS:
            name = f"point attribution, {margin} patch"
            lines.append(mean_line(f"seed {seed}: {name}", rows[name].to_numpy(float)))
    atomic_write(settings.out / "planted_cause.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    from sae_lens_maira.cli.parser import run_recipe

    sys.exit(run_recipe(Settings, run, __doc__))

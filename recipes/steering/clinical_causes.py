"""Correct planted errors of the phantom by their causes, chosen by attribution on one half of the studies.

With the planted error the phantom takes one finding for another and often misses a third. On the selection half the
false and the missing statements are attributed to latents of image patches. Candidates remove or strengthen only the
part of these latents that causes the errors (`steering.correction.along`); "no correction" is one of the candidates.
The candidate of highest label F1 is evaluated once on the other half, with its parts and random latents of equal norm
as controls.

    python recipes/steering/clinical_causes.py --config recipes/steering/clinical_causes.yaml
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.attribution.causes import Causes, gather
from sae_lens_maira.attribution.sentences import split_sentences
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.io import atomic_write
from sae_lens_maira.phantom import generate_studies, load_phantom, phantom_reader
from sae_lens_maira.phantom.flaws import Flaw, plant
from sae_lens_maira.recipes._shared import sae_of
from sae_lens_maira.steering import AddVectors, steered_reports
from sae_lens_maira.steering.correction import (
    along,
    f1_change,
    mean_step,
    micro_f1,
    report_counts,
    spared,
)
from sae_lens_maira.steering.positions import patches
from sae_lens_maira.studies import Study, known_findings

FALSE, RIGHT, CAUSE, MISSED = "false", "right", "cause", "missed"


@dataclass(frozen=True)
class Settings:
    """Settings of the correction.

    Attributes:
        out: Folder of the result; created if missing.
        saes: Folder of SAEs, as in the recipe `attribution`; a missing one is trained on patches of the flawed phantom.
        studies: Number of generated studies; those with a prior image are left out, the others are split into halves.
        tuned: Number of studies of the selection half on which a candidate is tried.
        layer: Decoder block at whose output the stream is corrected.
        removed: Numbers of latents whose false part is removed; 0 for none.
        strengthened: Numbers of latents whose missing part is strengthened; 0 for none.
        factors: Factors of the strengthened part.
        random: Number of random controls.
        seed: Seed of the studies and the SAE.
        train_studies: Studies that the SAE is trained on.
        d_sae: Latents.
        k: Mean active latents per patch.
        steps: Training steps of 1,024 rows.
        max_new_tokens: Largest number of tokens of a report.
        flaw: Planted error.
    """

    out: Path = Path("runs/clinical_causes")
    saes: Path = Path("runs/attribution/saes")
    studies: int = 500
    tuned: int = 64
    layer: int = 0
    removed: tuple[int, ...] = (0, 2, 4)
    strengthened: tuple[int, ...] = (0, 1, 2)
    factors: tuple[float, ...] = (2.0, 3.0)
    random: int = 3
    seed: int = 1
    train_studies: int = 500
    d_sae: int = 1024
    k: int = 16
    steps: int = 1500
    max_new_tokens: int = 120
    flaw: Flaw = field(default_factory=Flaw)


def run(settings: Settings) -> dict[str, Any]:
    """Choose a correction and evaluate it.

    Raises:
        ConfigError: The flawed phantom makes no error of one kind on the selection half.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    flaw, reader, hook = settings.flaw, phantom_reader(), f"blocks.{settings.layer}.hook_resid_post"
    maira = plant(load_phantom(), generate_studies(240, 71_000), flaw)
    hooked = HookedMaira2(maira)
    sae = sae_of(maira, settings, "flawed", settings.layer, settings.seed)
    drawn = [s for s in generate_studies(settings.studies, 70_000 + settings.seed) if s.prior_frontal is None]
    choose, report = drawn[::2], drawn[1::2]
    truth = {id(part): known_findings(part, reader)[0] for part in (choose, report)}

    def texts(items: list[AddVectors], part: Sequence[Study]) -> list[str]:
        return steered_reports(maira, sae, hook, items, part, settings.max_new_tokens)

    def counts(written: list[str], part: list[Study], n: int | None = None) -> np.ndarray:
        return report_counts(written, truth[id(part)][:n], reader)

    plain = texts([], choose)
    causes = _causes(hooked, sae, hook, choose, plain, flaw, reader.read)
    candidates = _candidates(sae, causes, settings)
    tried: dict[str, np.ndarray] = {}
    for name, made in tqdm(candidates.items(), desc="candidates"):
        written = plain[: settings.tuned] if not made else texts(made, choose[: settings.tuned])
        tried[name] = counts(written, choose, settings.tuned)
    best = max(tried, key=lambda name: micro_f1(tried[name]))
    before = counts(texts([], report), report)
    arms = {"chosen": candidates[best]}
    if best != "no correction":
        removed, _, strengthened = best.partition(" + ")
        arms |= {
            part: candidates[part] for part in (removed, strengthened) if strengthened and part in candidates
        }
        settings_of_rows = RowSettings(roles="image_only", batch_size=16)
        rows = read_rows(maira, choose[:40], hook, settings_of_rows, progress=False)
        acts = sae.encode(rows.values.to(sae.W_dec)).float()
        for i in range(settings.random):
            arms[f"random latents {i}"] = _random(sae, candidates[best], acts, settings.seed + i)
    result: dict[str, Any] = {
        "n choose": len(choose),
        "n report": len(report),
        "chosen": best,
        "candidates, micro F1 on the selection half": {
            name: micro_f1(found) for name, found in tried.items()
        },
        "sentences attributed": {name: one.n for name, one in causes.items()},
        "unsteered": micro_f1(before),
        "errors unsteered (false, missed)": [int(x) for x in np.nansum(before[:, 1:], 0)],
        "arms": {},
    }
    for name, made in arms.items():
        written = texts(made, report)
        found = counts(written, report)
        change, low, high = f1_change(before, found, settings.seed)
        readable = [reader.stated(text) is not None for text in written]
        stated, true = reader.table(written)[readable], truth[id(report)][readable]
        wrong = {
            key: [int((stated & ~true)[:, i].sum()), int((~stated & true)[:, i].sum())]
            for i, key in enumerate(reader.names)
        }
        result["arms"][name] = {
            "micro F1": micro_f1(found), "change": change, "low": low, "high": high,
            "errors (false, missed)": [int(x) for x in np.nansum(found[:, 1:], 0)], "per finding": wrong,
        }  # fmt: skip
    atomic_write(settings.out / "result.json", json.dumps(result, indent=2))
    return result


def _causes(
    hooked: HookedMaira2,
    sae: Any,
    hook: str,
    studies: Sequence[Study],
    written: Sequence[str],
    flaw: Flaw,
    read: Any,
) -> dict[str, Causes]:
    """Attribute false, right, causing and missing statements of the selection half."""
    causes = {name: Causes(sae.cfg.d_sae, sae.cfg.d_in) for name in (FALSE, RIGHT, CAUSE, MISSED)}
    for study, text in zip(tqdm(studies, desc="causes"), written, strict=True):
        pieces = [text[a:b] for a, b in split_sentences(text)]
        kinds = []
        for piece in pieces:
            if read(piece) == {flaw.stated}:
                kinds.append((causes[RIGHT if flaw.stated in study.present_keys else FALSE], piece))
            elif read(piece) == {flaw.seen}:
                kinds.append((causes[CAUSE], piece))
        if any(read(piece) == {flaw.stated} for piece in pieces):
            gather(hooked, sae, hook, study, text, kinds)
        own = study.report or ""
        if flaw.missed in study.present_keys and flaw.missed not in read(text):
            needed = [own[a:b] for a, b in split_sentences(own) if read(own[a:b]) == {flaw.missed}]
            gather(hooked, sae, hook, study, own, [(causes[MISSED], piece) for piece in needed])
    if not causes[FALSE].n or not causes[MISSED].n:
        raise ConfigError("The model makes no error of one kind on the selection half; read more studies.")
    return causes


def _candidates(sae: Any, causes: dict[str, Causes], settings: Settings) -> dict[str, list[AddVectors]]:
    """Make all combinations of removing and strengthening; the first is no correction."""
    kept = [causes[CAUSE].direction] if causes[CAUSE].n else []
    false = spared(causes[FALSE].direction, kept)
    missing = spared(causes[MISSED].direction, [*kept, causes[FALSE].direction])
    ranked = (causes[FALSE].latents - causes[RIGHT].latents).argsort(descending=True).tolist()
    needed = causes[MISSED].latents.argsort(descending=True).tolist()
    found: dict[str, list[AddVectors]] = {"no correction": []}
    for n in settings.removed:
        removal = [along(sae, ranked[:n], false, -1.0)] if n else []
        if n:
            found[f"remove {n}"] = removal
        for m in settings.strengthened:
            for factor in settings.factors if m else ():
                boost = along(sae, needed[:m], missing, factor - 1)
                name = f"strengthen {m} by {factor:g}"
                found[f"remove {n} + {name}" if n else name] = [*removal, boost]
    return found


def _random(sae: Any, made: list[AddVectors], acts: torch.Tensor, seed: int) -> list[AddVectors]:
    """Make the control: as many random active latents, partly removed, so that the mean norm of the change is equal."""
    taken = {j for item in made for j in item.latents}
    active = [int(j) for j in (acts > 0).any(0).nonzero()[:, 0] if int(j) not in taken]
    n = sum(len(item.latents) for item in made)
    drawn = [int(j) for j in np.random.default_rng(seed).choice(active, n, replace=False)]
    other = AddVectors(latents=tuple(drawn), vectors=-sae.W_dec.detach().float()[drawn], where=patches())
    return [replace(other, strength=mean_step(made, acts) / mean_step([other], acts))]


def report_run(settings: Settings) -> Path:
    """Run, print a table, and return the result file."""
    result = run(settings)
    sys.stdout.write(f"chosen: {result['chosen']}; {result['n report']} studies: {result['unsteered']:.3f}\n")
    for name, row in result["arms"].items():
        sys.stdout.write(
            f"{name:32} {row['micro F1']:.3f}  change {row['change']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})\n"
        )
    return settings.out / "result.json"


if __name__ == "__main__":
    from sae_lens_maira.cli.parser import run_recipe

    sys.exit(run_recipe(Settings, report_run, __doc__))

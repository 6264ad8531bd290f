"""Correct planted errors of the phantom with its own latents: a thin script over `steering.correction`.

A flawed phantom takes one finding for another and hardly sees a third (`phantom.flaws`). On one half of the patients
latents and strengths are chosen that mend it; on the other half the change of the label F1 is counted, beside random
latents that change the stream as much. Every arm is a file in the folder, so that a killed run goes on.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from tqdm.auto import tqdm

from sae_lens_maira.activations import ActivationRows, harvest_rows
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.io import atomic_write
from sae_lens_maira.latents import split_by_patient
from sae_lens_maira.maira2 import Maira2, generate_reports
from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, load_phantom, read_report, truth_labels
from sae_lens_maira.phantom.flaws import Flaw, plant
from sae_lens_maira.quickstart.sae import train_sae
from sae_lens_maira.sae import MatryoshkaSAE, load_matryoshka
from sae_lens_maira.steering import Intervention, steering
from sae_lens_maira.steering.correction import (
    Correction,
    best_of,
    f1_change,
    label_counts,
    micro_f1,
    random_control,
    tied_to_errors,
)
from sae_lens_maira.studies import Study


@dataclass(frozen=True)
class Clinical:
    """Settings.

    Attributes:
        studies: phantom studies drawn; those with a prior film are left out.
        tuned: studies of the choosing half on which a grid point is tried.
        layer: decoder layer whose output is steered.
        d_sae: latents of the SAE, trained on the flawed model's patches.
        k: mean active latents a patch.
        steps: training steps of 1,024 rows.
        latents: sizes of either set that are tried.
        shares: how much of the suppressed latents is taken away.
        factors: what boosted latents are multiplied by.
        specific: how many times as active a latent must be where the error is.
        random: random twins of the chosen correction.
        seed: of studies, halves, SAE and controls.
        flaw: what is planted.
    """

    studies: int = 500
    tuned: int = 64
    layer: int = 3
    d_sae: int = 512
    k: int = 16
    steps: int = 1500
    latents: tuple[int, ...] = (4, 12)
    shares: tuple[float, ...] = (0.5, 1.0)
    factors: tuple[float, ...] = (2.0, 4.0)
    specific: float = 3.0
    random: int = 3
    seed: int = 0
    flaw: Flaw = field(default_factory=Flaw)


class Arms:
    """Reports of a set of studies under an intervention, kept in a file each."""

    def __init__(self, folder: Path, maira: Maira2, sae: MatryoshkaSAE | None, hook: str) -> None:
        self.folder, self.maira, self.sae, self.hook = folder, maira, sae, hook
        folder.mkdir(parents=True, exist_ok=True)

    def reports(self, name: str, studies: Sequence[Study], items: Sequence[Intervention] = ()) -> list[str]:
        """One text a study; read from the file if the arm was run before."""
        file = self.folder / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        texts: list[str] = []
        for start in tqdm(range(0, len(studies), 32), desc=name, leave=False):
            part = list(studies[start : start + 32])
            if items:
                encoding = self.maira.processor.encode(part)
                with steering(self.maira, self.sae, self.hook, items, encoding, require_effect=False) as run:
                    texts += [report.text for report in run.reports(self.maira.processor, 120)]
            else:
                plain = generate_reports(self.maira.model, self.maira.processor, part, max_new_tokens=120)
                texts += [report.text for report in plain]
        atomic_write(file, json.dumps(texts))
        return texts


def stated(texts: Sequence[str]) -> np.ndarray:
    """(n, F) findings that reports state."""
    return np.array([[key in read_report(text).present for key in FINDING_KEYS] for text in texts])


def image_rows(maira: Maira2, studies: Sequence[Study], hook: str) -> ActivationRows:
    """The patches of the studies' films at the hook point."""
    return harvest_rows(maira, studies, hook, roles="image_only")


def run(config: Clinical, out: Path) -> dict[str, Any]:
    """Plant, choose, judge; every arm stays in `out`.

    Raises:
        ConfigError: the folder holds a run of other settings, or the flawed model makes no error.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings, ours = out / "settings.json", json.dumps(asdict(config), sort_keys=True)
    if settings.exists() and settings.read_text(encoding="utf-8") != ours:
        raise ConfigError(f"{out} holds a run of other settings; pass the same to go on, or another folder.")
    settings.write_text(ours, encoding="utf-8")
    torch.manual_seed(config.seed)
    clean, hook = load_phantom(), f"blocks.{config.layer}.hook_resid_post"
    # Without a prior film: with one, "unchanged" could be right as well.
    drawn = [s for s in generate_studies(config.studies, 70_000 + config.seed) if s.prior_frontal is None]
    halves = split_by_patient([study.patient_id for study in drawn], config.seed)
    choose, report = (
        [s for s, mine in zip(drawn, half, strict=True) if mine] for half in (halves.choose, halves.report)
    )
    truth = {
        name: np.stack([truth_labels(s) for s in part])
        for name, part in (("choose", choose), ("report", report))
    }
    # The flaw's directions come from studies that no later step sees.
    flawed = plant(clean, generate_studies(240, 71_000 + config.seed), config.flaw)
    rows = image_rows(flawed, choose, hook)
    if not (out / "sae" / "cfg.json").exists():
        train_sae(rows, config.d_sae, config.k, config.steps, config.seed, out / "sae")
    sae = load_matryoshka(out / "sae")
    decoder = sae.W_dec.detach()
    arms = Arms(out / "arms", flawed, sae, hook)

    def counts(name: str, half: str, items: Sequence[Intervention] = (), n: int | None = None) -> np.ndarray:
        studies = (choose if half == "choose" else report)[:n]
        return label_counts(stated(arms.reports(f"{half}-{name}", studies, items)), truth[half][:n])

    def encode(values: torch.Tensor, /) -> torch.Tensor:
        with torch.no_grad():
            return sae.encode(values)

    # Which finding is stated falsely and which is missed is read from the errors of the choosing half.
    said, true = stated(arms.reports("choose-unsteered", choose)), truth["choose"]
    false, missed = (said & ~true), (~said & true)
    wrong, lost = int(false.sum(0).argmax()), int(missed.sum(0).argmax())
    if not false[:, wrong].any() or not missed[:, lost].any():
        raise ConfigError(
            "The flawed phantom makes no error of one kind on the choosing half; draw more studies."
        )
    acts = encode(rows.values[:: max(1, len(rows) // 5000)])
    candidates: list[tuple[Correction, np.ndarray]] = []
    for n in config.latents:
        boost = tied_to_errors(rows, encode, decoder, true[:, lost], ~true[:, lost], n, config.specific)
        neither = ~said[:, wrong] & ~true[:, wrong]
        taken = tied_to_errors(rows, encode, decoder, false[:, wrong], neither, 2 * n, config.specific)
        suppress = tuple(j for j in taken if j not in boost)[:n]
        if not boost and not suppress:
            continue
        for share in config.shares:
            for factor in config.factors:
                made = Correction(suppress, share, boost, factor)
                name = f"{n}-{share:g}-{factor:g}"
                candidates.append((made, counts(name, "choose", made.interventions(), config.tuned)))
    if not candidates:
        raise ConfigError(
            f"No latent is {config.specific:g} times as active where the errors are; train a larger SAE, or lower "
            "`specific`."
        )
    best = best_of(candidates)
    parts = {"both": best}
    if best.suppress and best.boost:
        parts |= {
            "suppress only": Correction(best.suppress, best.share),
            "boost only": Correction(boost=best.boost, factor=best.factor),
        }
    parts |= {
        f"random latents {i}": random_control(best, acts, decoder, config.seed + i)
        for i in range(config.random)
    }
    before = counts("unsteered", "report")
    after = {name: counts(name, "report", made.interventions()) for name, made in parts.items()}
    result: dict[str, Any] = {
        "false finding": FINDING_KEYS[wrong],
        "missed finding": FINDING_KEYS[lost],
        "n choose": len(choose),
        "n report": len(report),
        "correction": asdict(best),
        "grid, micro F1 on the choosing half": {
            f"{len(c.boost)} latents, share {c.share:g}, factor {c.factor:g}": micro_f1(found)
            for c, found in candidates
        },
        "no correction, micro F1 on the same studies": micro_f1(
            label_counts(said[: config.tuned], true[: config.tuned])
        ),
        "clean model": micro_f1(label_counts(stated(_clean(out, clean, report)), truth["report"])),
        "unsteered": micro_f1(before),
        "arms": {},
    }
    for name, found in after.items():
        change, low, high = f1_change(before, found, config.seed)
        result["arms"][name] = {"micro F1": micro_f1(found), "change": change, "low": low, "high": high}
        result["arms"][name] |= {
            "errors": [int(x) for x in found[:, 1:].sum(0)],
            "step": parts[name].step(acts, decoder),
        }
    result["errors unsteered (false, missed)"] = [int(x) for x in before[:, 1:].sum(0)]
    (out / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


def _clean(out: Path, clean: Maira2, studies: Sequence[Study]) -> list[str]:
    return Arms(out / "arms", clean, None, "").reports("report-clean", studies)


def main(arguments: list[str] | None = None) -> int:
    """Read the settings, run or go on, write `result.json` and a table."""
    parser = ArgumentParser(description=__doc__, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_argument("--out", type=Path, default=Path("runs/clinical"), help="arms, SAE and result")
    parser.add_class_arguments(Clinical, "clinical")
    options = parser.parse_args(arguments)
    result = run(parser.instantiate(options).clinical, options.out)
    sys.stdout.write(
        f"stated falsely: {result['false finding']}; missed: {result['missed finding']}; label F1 of "
        f"{result['n report']} held-out studies: clean model {result['clean model']:.3f}, flawed "
        f"{result['unsteered']:.3f}\n"
    )
    for name, row in result["arms"].items():
        sys.stdout.write(
            f"{name:18} {row['micro F1']:.3f}  change {row['change']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
            f"  relative {100 * row['change'] / result['unsteered']:+.1f} %\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Correct a model's errors with its own latents.

With a planted error, the phantom takes one finding for another and often misses a third (`phantom.flaws`); without one,
the most frequent errors of the model are corrected. Latents and strengths are chosen on one half of the patients. On
the other half the change of the label F1 is measured; the controls are random latents that change the stream by the
same amount. Every arm has its own file, so that a killed run continues.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_lens_maira.activations import ActivationRows, RowSettings, read_rows
from sae_lens_maira.cli.parser import run_recipe
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.interface import chosen_studies, finding_reader, named_model
from sae_lens_maira.io import atomic_write
from sae_lens_maira.latents import split_by_patient
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.phantom.flaws import Flaw, plant
from sae_lens_maira.quickstart.sae import TrainingPlan, train_sae
from sae_lens_maira.recipes._shared import require_run
from sae_lens_maira.recipes.steering.source import Source
from sae_lens_maira.sae import MatryoshkaSAE, load_matryoshka
from sae_lens_maira.steering import Intervention, steered_reports
from sae_lens_maira.steering.correction import (
    Correction,
    best_of,
    f1_change,
    micro_f1,
    random_control,
    report_counts,
    tied_to_errors,
)
from sae_lens_maira.steering.report_errors import error_changes
from sae_lens_maira.steering.statistics import encoder_of
from sae_lens_maira.studies import Study, known_findings, readable_studies


@dataclass(frozen=True)
class Clinical(Source):
    """Settings of the correction.

    Attributes:
        out: Folder of arms, SAE and result.
        studies: Number of studies to read; those with a prior image are left out.
        tuned: Number of studies of the selection half on which a grid point is tried.
        layer: Decoder layer whose output is steered.
        d_sae: Latents of the SAE, trained on the flawed model's patches.
        k: Mean active latents per patch.
        steps: Training steps of 1,024 rows.
        latents: Numbers of latents per set that are tried.
        shares: Shares of the suppressed latents' activation that are removed.
        factors: Factors of the boosted latents.
        specific: Smallest ratio of a latent's activation in studies with the error to other studies.
        random: Number of random controls of the chosen correction.
        seed: Random seed of studies, halves, SAE and controls.
        flaw: Errors that are planted in the phantom; null to correct the errors of the model itself.
    """

    out: Path = Path("runs/clinical")
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
    max_new_tokens: int = 120
    flaw: Flaw | None = field(default_factory=Flaw)


class Arms:
    """Reports of a set of studies per intervention, one file each."""

    def __init__(
        self, folder: Path, maira: Maira2, sae: MatryoshkaSAE | None, hook: str, budget: int
    ) -> None:
        self.folder, self.maira, self.sae, self.hook, self.budget = folder, maira, sae, hook, budget
        folder.mkdir(parents=True, exist_ok=True)

    def reports(self, name: str, studies: Sequence[Study], items: Sequence[Intervention] = ()) -> list[str]:
        """Generate one report per study, or read them from the file if the arm was run before."""
        file = self.folder / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        texts = steered_reports(self.maira, self.sae, self.hook, items, studies, self.budget)
        atomic_write(file, json.dumps(texts))
        return texts


def image_rows(maira: Maira2, studies: Sequence[Study], hook: str) -> ActivationRows:
    """Read the image patches of the studies at the hook point."""
    return read_rows(maira, studies, hook, RowSettings(roles="image_only", batch_size=16))


def run(config: Clinical) -> dict[str, Any]:
    """Plant errors, choose a correction and evaluate it; every arm is stored in the folder.

    Raises:
        ConfigError: The folder has a run with other settings, a planted error was requested for another model than the
            phantom, or the model makes no error.
    """
    out = config.out
    if config.flaw is not None and (config.model != "phantom" or config.sae is not None):
        raise ConfigError(
            "Errors are planted in the phantom, with an SAE that the recipe trains; pass --flaw null to correct the "
            f"errors of {config.model} with the SAE {config.sae}."
        )
    if config.flaw is None and config.sae is None:
        raise ConfigError("Without a flaw an SAE of the model is needed; pass --sae.")
    require_run(config, any((out / name).exists() for name in ("sae", "arms", "settings.json")))
    torch.manual_seed(config.seed)
    clean, hook = named_model(config.model, device=config.device), f"blocks.{config.layer}.hook_resid_post"
    side = clean.processor.recipe.crop
    read = chosen_studies(config.studies, 70_000 + config.seed, side, config.table, config.root, config.split)
    # Studies with a prior image are left out, since "unchanged" could be right in them.
    drawn = [s for s in read if s.prior_frontal is None and s.frontal is not None]
    reader = finding_reader(drawn, config.reader)
    drawn = readable_studies(drawn, reader)
    halves = split_by_patient([study.patient_id for study in drawn], config.seed)
    choose, report = (
        [s for s, mine in zip(drawn, half, strict=True) if mine] for half in (halves.choose, halves.report)
    )
    truth = {name: known_findings(part, reader)[0] for name, part in (("choose", choose), ("report", report))}
    flawed = clean
    if config.flaw is not None:
        # The directions of the planted error come from studies that no later step uses.
        flawed = plant(clean, generate_studies(240, 71_000 + config.seed), config.flaw)
    else:
        hook = str(config.image_sae().cfg.metadata.hook_name)
    rows = image_rows(flawed, choose, hook)
    if config.sae is None and not (out / "sae" / "cfg.json").exists():
        train_sae(rows, TrainingPlan(out / "sae", config.d_sae, config.k, config.steps, config.seed))
    sae = load_matryoshka(out / "sae") if config.sae is None else config.image_sae()
    decoder = sae.W_dec.detach().float().cpu()
    encode = encoder_of(sae)
    arms = Arms(out / "arms", flawed, sae, hook, config.max_new_tokens)

    def counts(name: str, half: str, items: Sequence[Intervention] = (), n: int | None = None) -> np.ndarray:
        studies = (choose if half == "choose" else report)[:n]
        return report_counts(arms.reports(f"{half}-{name}", studies, items), truth[half][:n], reader)

    # The falsely stated finding and the missed finding are determined on the selection half.
    plain, true = arms.reports("choose-unsteered", choose), truth["choose"]
    stated, known = reader.table(plain), np.array([[reader.stated(text) is not None] for text in plain])
    false, missed = (stated & ~true & known), (~stated & true & known)
    wrong, lost = int(false.sum(0).argmax()), int(missed.sum(0).argmax())
    if not false[:, wrong].any() or not missed[:, lost].any():
        raise ConfigError("The model makes no error of one kind on the selection half; read more studies.")
    acts = encode(rows.values[:: max(1, len(rows) // 5000)])
    candidates: list[tuple[Correction, np.ndarray]] = []
    for n in config.latents:
        boost = tied_to_errors(rows, encode, decoder, true[:, lost], ~true[:, lost], n, config.specific)
        neither = ~stated[:, wrong] & ~true[:, wrong]
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
        "false finding": reader.names[wrong],
        "missed finding": reader.names[lost],
        "n choose": len(choose),
        "n report": len(report),
        "correction": asdict(best),
        "grid, micro F1 on the selection half": {
            f"{len(c.boost)} latents, share {c.share:g}, factor {c.factor:g}": micro_f1(found)
            for c, found in candidates
        },
        "no correction, micro F1 on the same studies": micro_f1(
            report_counts(plain[: config.tuned], true[: config.tuned], reader)
        ),
        "unsteered": micro_f1(before),
        "arms": {},
    }
    if config.flaw is not None:
        texts = Arms(out / "arms", clean, None, "", config.max_new_tokens).reports("report-clean", report)
        result["clean model"] = micro_f1(report_counts(texts, truth["report"], reader))
    for name, found in after.items():
        change, low, high = f1_change(before, found, config.seed)
        result["arms"][name] = {"micro F1": micro_f1(found), "change": change, "low": low, "high": high}
        result["arms"][name] |= {
            "errors": [int(x) for x in np.nansum(found[:, 1:], 0)],
            "reports that cannot be read": int(np.isnan(found).any(1).sum()),
            "step": parts[name].step(acts, decoder),
        }
    result["errors unsteered (false, missed)"] = [int(x) for x in np.nansum(before[:, 1:], 0)]
    texts = {
        name: arms.reports(f"report-{name}", report, made.interventions()) for name, made in parts.items()
    }
    errors = error_changes(texts, arms.reports("report-unsteered", report), report, reader, seed=config.seed)
    result["errors"] = {
        name: part.drop(columns="method").set_index("measure").to_dict("index")
        for name, part in errors.groupby("method", sort=False)
    }
    atomic_write(out / "result.json", json.dumps(result, indent=2))
    return result


def report_run(config: Clinical) -> Path:
    """Run, print a table, and return the result file."""
    result = run(config)
    clean = f"clean model {result['clean model']:.3f}, flawed " if "clean model" in result else ""
    sys.stdout.write(
        f"stated falsely: {result['false finding']}; missed: {result['missed finding']}; label F1 of "
        f"{result['n report']} held-out studies: {clean}{result['unsteered']:.3f}\n"
    )
    for name, row in result["arms"].items():
        sys.stdout.write(
            f"{name:18} {row['micro F1']:.3f}  change {row['change']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
            f"  relative {100 * row['change'] / result['unsteered']:+.1f} %\n"
        )
    for name, measures in result["errors"].items():
        total = measures["errors_per_report"]
        sys.stdout.write(
            f"{name:18} errors per report {total['before']:.2f} -> {total['after']:.2f}  change {total['change']:+.2f} "
            f"({total['low']:+.2f} to {total['high']:+.2f})\n"
        )
    return config.out / "result.json"


if __name__ == "__main__":
    sys.exit(run_recipe(Clinical, report_run, __doc__))

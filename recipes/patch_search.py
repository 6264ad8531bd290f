"""Search for a setting in which a trained SAE of image patches agrees better with findings than a frozen decoder.

Each setting changes one or two things: layer, k, size, whitening, pooling of patches before the SAE, number of studies,
decoder rows taken from the data, or a threshold per latent that is chosen by study. In every setting two SAEs are
trained, one of them with its decoder frozen (arXiv 2602.14111).

    search   units chosen on a quarter of the patients, scored on another quarter; one seed, all settings
    report   the setting of the largest difference, that of the highest F1 of the trained SAE, and the first one, on
             new seeds: units chosen on one half of the patients, scored on the other half, which is used once

The budget is the number of settings in the YAML file times `steps`.

    python recipes/patch_search.py --config recipes/patch_search.yaml
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sae_lens_maira.activations import ActivationRows, RowSettings, read_rows
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.io import atomic_write
from sae_lens_maira.latents import Agreement, Halves, best_units, paired_difference, split_by_patient
from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, load_phantom, truth_labels
from sae_lens_maira.quickstart.run import dead_after
from sae_lens_maira.quickstart.sae import TrainedSAE, TrainingPlan, train_saes
from sae_lens_maira.recipes._shared import continue_rows
from sae_lens_maira.stats import f1

QUANTILES = np.linspace(0.02, 0.98, 25)
"""Quantiles of a latent's largest activation per study that are tried as its threshold."""


@dataclass(frozen=True)
class Setting:
    """One setting of the search.

    Attributes:
        name: Name in the tables.
        layer: Decoder layer whose output is read.
        k: Mean active latents per patch.
        d_sae: Number of latents.
        studies: Number of studies, half of which are trained on.
        whiten: Whether patches are whitened.
        pool: Side of the square of patches whose mean is one row; 1 keeps patches.
        data_decoder: Whether decoder rows are initialised with rows of the data (and stay so if frozen).
        threshold: Whether a latent counts as active in a study above its own threshold, chosen on studies.
    """

    name: str
    layer: int = 3
    k: int = 8
    d_sae: int = 1024
    studies: int = 1200
    whiten: bool = False
    pool: int = 1
    data_decoder: bool = False
    threshold: bool = False


@dataclass(frozen=True)
class Settings:
    """Settings of the search.

    Attributes:
        settings: Settings that are compared; the first is the reference.
        seed: Random seed of the search.
        fresh: Random seeds of the report, not used in the search.
        steps: Training steps of 1,024 rows.
        out: Folder of the tables; created if missing.
    """

    settings: tuple[Setting, ...]
    seed: int = 0
    fresh: tuple[int, ...] = (10, 11, 12)
    steps: int = 1500
    out: Path = Path("runs/patch_search")

    def __post_init__(self) -> None:
        names = [setting.name for setting in self.settings]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"The settings are called {names}; expected two or more different names.")


def pooled(rows: ActivationRows, side: int) -> ActivationRows:
    """Means of squares of `side` x `side` patches of each image; the columns are those of a square's first patch."""
    if side == 1:
        return rows
    key = np.stack([rows.study, rows.view, rows.patch_row // side, rows.patch_col // side])
    _, first, group = np.unique(key, axis=1, return_index=True, return_inverse=True)
    group = torch.from_numpy(group.reshape(-1))
    sums = torch.zeros(len(first), rows.values.shape[1]).index_add_(0, group, rows.values)
    mask = np.zeros(len(rows), dtype=bool)
    mask[first] = True
    kept, counts = rows.where(mask), torch.bincount(group).unsqueeze(1)
    order = torch.from_numpy(np.argsort(np.argsort(first)))
    means = torch.empty_like(sums)
    means[order] = sums / counts
    return replace(kept, values=means)


def peaks(sae: TrainedSAE, rows: ActivationRows, n_studies: int) -> torch.Tensor:
    """(n_studies, d_sae) largest activation of each latent in each study."""
    found: torch.Tensor | None = None
    study = torch.from_numpy(rows.study)
    for start in range(0, len(rows), 8192):
        acts = sae.encode(rows.values[start : start + 8192])
        if found is None:
            found = torch.zeros(n_studies, acts.shape[1])
        index = study[start : start + 8192, None].expand(-1, acts.shape[1])
        found.scatter_reduce_(0, index, acts, "amax")
    if found is None:
        raise ConfigError("There are no image patches; read studies with images.")
    return found


def agreement(setting: Setting, name: str, top: torch.Tensor, truth: np.ndarray, halves: Halves) -> Agreement:
    """Best unit per finding, chosen on `halves.choose` and scored on `halves.report`."""
    if not setting.threshold:
        return best_units(name, (top > 0).numpy(), truth, FINDING_KEYS, halves)
    # One column per finding: its best pair of latent and threshold on the selection half.
    chosen, known = top[torch.from_numpy(halves.choose)], truth[halves.choose]
    best, threshold = np.full(len(FINDING_KEYS), -1.0), np.zeros(len(FINDING_KEYS))
    unit = np.zeros(len(FINDING_KEYS), dtype=np.int64)
    for quantile in QUANTILES:
        limits = chosen.quantile(float(quantile), dim=0)
        fires = (chosen > limits).numpy()
        hits = fires.T.astype(np.float32) @ known.astype(np.float32)
        scores = f1(hits, fires.sum(0)[:, None], known.sum(0)[None])
        better = scores.max(0) > best
        unit[better], best[better] = scores.argmax(0)[better], scores.max(0)[better]
        threshold[better] = limits.numpy()[unit[better]]
    fires = top.numpy()[:, unit] > threshold
    return best_units(name, fires, truth, FINDING_KEYS, halves, unit=np.arange(len(unit)))


def compared(setting: Setting, seed: int, steps: int, folder: Path, search: bool) -> dict[str, Any]:
    """Train the SAE and its frozen control in one setting, and compare them."""
    studies = generate_studies(setting.studies, seed=20_000 + seed)
    halves = split_by_patient([study.patient_id for study in studies], seed)
    truth = np.stack([truth_labels(study) for study in studies])
    hook = f"blocks.{setting.layer}.hook_resid_post"
    read = RowSettings(roles="image_only", batch_size=16, seed=seed)
    rows = pooled(read_rows(load_phantom(), studies, hook, read, progress=False), setting.pool)
    learned = rows.where(halves.choose[rows.study])
    plans = [
        TrainingPlan(
            folder / f"{setting.name}_{seed}_{kind}",
            setting.d_sae,
            setting.k,
            steps,
            seed,
            lr=2e-3,
            dead_after=dead_after(steps),
            normalize="covariance_whitening" if setting.whiten else "expected_average_only_in",
            control=kind,
            data_decoder=setting.data_decoder,
        )
        for kind in (None, "frozen_decoder")
    ]
    saes = train_saes([(learned, plan) for plan in plans], min(2, 1 + steps // 500), progress=False)
    if search:  # both quarters belong to the selection half
        patients = [study.patient_id for study in studies]
        quarters = split_by_patient(patients, seed + 1)
        halves = Halves(halves.choose & quarters.choose, halves.choose & quarters.report)
    tops = [peaks(sae, rows, len(studies)) for sae in saes]
    trained, frozen = (
        agreement(setting, name, top, truth, halves)
        for name, top in zip(("trained", "frozen decoder"), tops, strict=True)
    )
    gain = paired_difference(trained, frozen)
    held_out = rows.where(halves.report[rows.study]).values
    return {
        "setting": setting.name,
        "seed": seed,
        "studies": int(halves.report.sum()),
        "trained": float(trained.f1.mean()),
        "frozen_decoder": float(frozen.f1.mean()),
        "difference": gain.mean,
        "low": gain.low,
        "high": gain.high,
        "trained_explained_variance": saes[0].explained_variance(held_out),
        "frozen_explained_variance": saes[1].explained_variance(held_out),
    }


def run(settings: Settings) -> Path:
    """Search, report on fresh seeds, and write `search.csv`, `report.csv` and `patch_search.md`."""
    out = settings.out

    def search(start: int) -> Iterator[dict[str, Any]]:
        for setting in settings.settings[start:]:
            yield compared(setting, settings.seed, settings.steps, out / "saes", search=True)

    about = {
        "settings": [asdict(setting) for setting in settings.settings],
        "seed": settings.seed,
        "steps": settings.steps,
    }
    continue_rows(out / "search.csv", about, len(settings.settings), search, "search", 1)
    searched = pd.read_csv(out / "search.csv")
    best, highest = (
        settings.settings[int(column.argmax())] for column in (searched.difference, searched.trained)
    )
    reported = list(dict.fromkeys((settings.settings[0], best, highest)))
    pairs = [(setting, seed) for seed in settings.fresh for setting in reported]

    def report(start: int) -> Iterator[dict[str, Any]]:
        for setting, seed in pairs[start:]:
            yield compared(setting, seed, settings.steps, out / "saes", search=False)

    about |= {"fresh": list(settings.fresh), "reported": [setting.name for setting in reported]}
    continue_rows(out / "report.csv", about, len(pairs), report, "report", 1)
    table = pd.read_csv(out / "report.csv")
    text = (
        f"# Search for a setting at the image patches\n\n{len(searched)} settings of {settings.steps} steps, seed "
        f"{settings.seed}; units chosen on one quarter of the patients, F1 on another.\n\n{_table(searched)}\n\n"
        f"Largest difference: {best.name}; highest F1 of a trained SAE: {highest.name}. On fresh seeds, F1 on the half "
        "that no choice has seen:\n\n"
    )
    atomic_write(out / "patch_search.md", f"{text}{_table(table)}\n")
    return out / "patch_search.md"


def _table(frame: pd.DataFrame) -> str:
    head = "| setting | seed | studies | trained | frozen decoder | trained minus frozen (95 %) | explained variance |"
    lines = [
        "| {setting} | {seed} | {studies} | {trained:.3f} | {frozen_decoder:.3f} | {difference:+.3f} ({low:+.3f} to "
        "{high:+.3f}) | {trained_explained_variance:.3f}, {frozen_explained_variance:.3f} |".format_map(row)
        for row in frame.to_dict("records")
    ]
    return "\n".join([head, "|---" * 7 + "|", *lines])


if __name__ == "__main__":
    from sae_lens_maira.cli.parser import run_recipe

    sys.exit(run_recipe(Settings, run, __doc__))

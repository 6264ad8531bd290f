"""The one path through the house, at the size of the phantom.

    studies -> activation rows -> Matryoshka SAE -> best latent per finding -> steering -> a folder to read

Every score stands beside its controls: an untrained SAE with the same sparsity, the raw residual dimensions under
the same sparsity, a supervised difference of means, and for steering a random direction of equal norm. Units and
strengths are chosen on one half of the patients and reported on the other. It composes rooms and owns no science.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sae_lens_maira.activations import ActivationRows, harvest_rows
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.latents import (
    Agreement,
    Difference,
    Encoder,
    Halves,
    MeanDifference,
    RawDimensions,
    best_units,
    paired_difference,
    split_by_patient,
    study_firing,
)
from sae_lens_maira.maira2 import Maira2, TokenRole
from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, load_phantom, truth_labels
from sae_lens_maira.quickstart.sae import TrainedSAE, train_sae, untrained_encoder
from sae_lens_maira.quickstart.steer import SteeringResult, steer_finding
from sae_lens_maira.studies import Study

# Everything a report is written from: the film, the sections, the report itself; no boilerplate.
KEPT = (
    TokenRole.IMAGE,
    TokenRole.INDICATION,
    TokenRole.TECHNIQUE,
    TokenRole.COMPARISON,
    TokenRole.PRIOR_REPORT,
    TokenRole.REPORT,
)


@dataclass(frozen=True)
class QuickstartConfig:
    """Settings of a quickstart run.

    Attributes:
        out: folder of the report; made if missing.
        studies: phantom studies to read, none of which the phantom was trained on.
        layer: decoder layer whose output is read and steered, 0 to 7.
        d_sae: latents.
        k: mean active latents per token.
        steps: training steps of 1,024 rows.
        finding: the finding to steer into reports that do not have it.
        steer_studies: negative studies to steer, from either half.
        seed: of everything drawn here.
        progress: show progress bars.
    """

    out: Path = Path("quickstart_out")
    studies: int = 1200
    layer: int = 3
    d_sae: int = 2048
    k: int = 16
    steps: int = 1500
    finding: str = "cardiomegaly"
    steer_studies: int = 60
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.finding not in FINDING_KEYS:
            raise ConfigError(f"Unknown finding {self.finding!r}; the phantom's are {', '.join(FINDING_KEYS)}.")
        if not 0 <= self.layer <= 7:
            raise ConfigError(f"layer is {self.layer}; the phantom has decoder layers 0 to 7.")
        for name, least in (("studies", 40), ("d_sae", 64), ("k", 1), ("steps", 1), ("steer_studies", 4)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


@dataclass(frozen=True)
class PlaceResult:
    """Agreement with the findings at one kind of position ("text" or "image").

    Attributes:
        place: "text" or "image".
        trained, untrained, raw, supervised: best units of each dictionary.
        gain: trained minus untrained, mean over the findings, paired over studies.
        l0: active latents per row of the trained SAE here.
        explained_variance: of the trained SAE on the held-out half's rows here.
        n_rows: rows of this kind.
    """

    place: str
    trained: Agreement
    untrained: Agreement
    raw: Agreement
    supervised: Agreement
    gain: Difference
    l0: float
    explained_variance: float
    n_rows: int


@dataclass(frozen=True)
class QuickstartResult:
    """What a quickstart found, and the folder where it is written."""

    config: QuickstartConfig
    sae: TrainedSAE
    text: PlaceResult
    image: PlaceResult
    steering: SteeringResult
    folder: Path


def run_quickstart(config: QuickstartConfig) -> QuickstartResult:
    """Run the whole job and write `config.out`.

    Args:
        config: the settings.

    Returns:
        The results; `report.md` in the folder says the same in words and pictures.

    Raises:
        ConfigError: a setting is out of range.
    """
    from sae_lens_maira.quickstart.report import write_report

    torch.manual_seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    maira = load_phantom()
    # The phantom was trained on seed 0; these studies come from another seed.
    studies = generate_studies(config.studies, seed=20_000 + config.seed)
    halves = split_by_patient([study.patient_id for study in studies], config.seed)
    truth = np.stack([truth_labels(study) for study in studies])
    hook_name = f"blocks.{config.layer}.hook_resid_post"
    rows = harvest_rows(maira, studies, hook_name, roles=KEPT, seed=config.seed, progress=config.progress)
    training_rows = rows.where(halves.choose[rows.study])
    trained = train_sae(training_rows, config, hook_name)
    untrained = untrained_encoder(trained, training_rows, config.seed)
    text, image = (
        _agreement(place, rows, truth, halves, trained, untrained) for place in ("text", "image")
    )
    steering = steer_finding(maira, studies, rows.where(rows.is_image), truth, halves, trained, config)
    result = QuickstartResult(config, trained, text, image, steering, config.out)
    write_report(result, maira, studies, rows)
    return result


def _agreement(
    place: str,
    rows: ActivationRows,
    truth: np.ndarray,
    halves: Halves,
    trained: TrainedSAE,
    untrained: Encoder,
) -> PlaceResult:
    here = rows.where(rows.is_image if place == "image" else rows.role == TokenRole.REPORT)
    n = len(truth)
    fires, l0 = study_firing(trained.encode, here, n)
    chosen_half = here.where(halves.choose[here.study])
    others: dict[str, Encoder] = {
        "untrained SAE": untrained,
        "raw dimensions": RawDimensions(chosen_half, l0),
    }
    scored = {
        name: best_units(name, study_firing(encode, here, n)[0], truth, FINDING_KEYS, halves)
        for name, encode in others.items()
    }
    # The supervised direction of a finding belongs to that finding: its unit is given, not chosen.
    fitted = study_firing(MeanDifference(here, truth, halves.choose), here, n)[0]
    own = np.arange(len(FINDING_KEYS))
    supervised = best_units("difference of means", fitted, truth, FINDING_KEYS, halves, unit=own)
    best = best_units("Matryoshka SAE", fires, truth, FINDING_KEYS, halves)
    held_out = here.where(halves.report[here.study]).values
    return PlaceResult(
        place=place,
        trained=best,
        untrained=scored["untrained SAE"],
        raw=scored["raw dimensions"],
        supervised=supervised,
        gain=paired_difference(best, scored["untrained SAE"]),
        l0=l0,
        explained_variance=trained.explained_variance(held_out),
        n_rows=len(here),
    )


def negatives(studies: Sequence[Study], truth: np.ndarray, finding: str, mask: np.ndarray) -> list[int]:
    """Numbers of the studies in `mask` that do not have `finding` and have no earlier film to compare with."""
    column = FINDING_KEYS.index(finding)
    return [i for i, study in enumerate(studies) if mask[i] and not truth[i, column] and study.prior_frontal is None]


__all__ = ["Maira2", "PlaceResult", "QuickstartConfig", "QuickstartResult", "negatives", "run_quickstart"]

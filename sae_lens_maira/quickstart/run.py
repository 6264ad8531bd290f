"""The one path through the house, at the size of the phantom.

    studies -> store of activation rows -> Matryoshka SAE -> best latent per finding -> steering -> a folder to read

Every score stands beside its controls: an untrained SAE with the same sparsity, the raw residual dimensions under
the same sparsity, a supervised difference of means, and for steering a random direction of equal norm. Units and
strengths are chosen on one half of the patients and reported on the other. It composes rooms and owns no science.
"""

from collections.abc import Sequence

import numpy as np
import torch

from sae_lens_maira.activations import ActivationRows, harvest, joined
from sae_lens_maira.latents import (
    Encoder,
    Halves,
    MeanDifference,
    RandomDirections,
    RawDimensions,
    best_units,
    paired_difference,
    split_by_patient,
    study_firing,
)
from sae_lens_maira.maira2 import Maira2, TokenRole
from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, load_phantom, truth_labels
from sae_lens_maira.quickstart.page import write_pages
from sae_lens_maira.quickstart.report import write_report
from sae_lens_maira.quickstart.results import PlaceResult, QuickstartConfig, QuickstartResult
from sae_lens_maira.quickstart.sae import TrainedSAE, train_sae
from sae_lens_maira.quickstart.steer import steer_finding
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


def run_quickstart(config: QuickstartConfig) -> QuickstartResult:
    """Run the whole job and write `config.out`.

    Args:
        config: the settings.

    Returns:
        The results; `report.md` in the folder says the same in words and pictures.

    Raises:
        ConfigError: a setting is out of range.
    """
    torch.manual_seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    maira = load_phantom()
    # The phantom was trained on seed 0; these studies come from another seed.
    studies = generate_studies(config.studies, seed=20_000 + config.seed)
    halves = split_by_patient([study.patient_id for study in studies], config.seed)
    truth = np.stack([truth_labels(study) for study in studies])
    hook_name = f"blocks.{config.layer}.hook_resid_post"
    rows = stored_rows(maira, studies, hook_name, config)
    # One SAE a kind of position: patches have four times the norm of report tokens in the phantom, and one SAE for
    # both would spend itself on them.
    places = []
    for place, mine in (("text", ~rows.is_image), ("image", rows.is_image)):
        learned = rows.where(mine & halves.choose[rows.study])
        folder = config.out / f"sae_{place}"
        trained = train_sae(learned, config.d_sae, config.k, config.steps, config.seed, folder)
        places.append(_agreement(place, rows, truth, halves, trained, config.seed))
    text, image = places
    steering = steer_finding(
        maira,
        studies,
        rows.where(rows.is_image),
        truth,
        halves,
        image.sae,
        finding=config.finding,
        n_studies=config.steer_studies,
        seed=config.seed,
        progress=config.progress,
    )
    result = QuickstartResult(config, text, image, steering, config.out)
    write_report(result, studies, rows, halves)
    write_pages(result, maira, studies, rows, halves)
    return result


def stored_rows(
    maira: Maira2, studies: Sequence[Study], hook_name: str, config: QuickstartConfig
) -> ActivationRows:
    """All rows, from a store in the folder; it is harvested where it is not complete, and read in study order."""
    store = harvest(
        maira,
        studies,
        config.out / "store" / f"layer{config.layer}_studies{config.studies}_seed{config.seed}",
        [hook_name],
        roles=KEPT,
        dtype="float32",
        batch_size=16,
        seed=config.seed,
        progress=config.progress,
    )
    return joined(list(store.blocks(hook_name, max_rows=len(store))))


def _agreement(
    place: str,
    rows: ActivationRows,
    truth: np.ndarray,
    halves: Halves,
    trained: TrainedSAE,
    seed: int,
) -> PlaceResult:
    here = rows.where(rows.is_image if place == "image" else rows.role == TokenRole.REPORT)
    n = len(truth)
    fires, l0 = study_firing(trained.encode, here, n)
    chosen_half = here.where(halves.choose[here.study])
    others: dict[str, Encoder] = {
        "untrained SAE": RandomDirections(chosen_half, len(trained.decoder), l0, seed),
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
        sae=trained,
        trained=best,
        untrained=scored["untrained SAE"],
        raw=scored["raw dimensions"],
        supervised=supervised,
        gain=paired_difference(best, scored["untrained SAE"]),
        l0=l0,
        explained_variance=trained.explained_variance(held_out),
        n_rows=len(here),
    )

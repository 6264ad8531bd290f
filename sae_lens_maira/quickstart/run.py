"""Run the whole path on the phantom.

    studies -> store of activations -> Matryoshka SAEs -> best latent per finding -> steering -> report and pages

Every score is reported with its controls: SAEs with a frozen random decoder or encoder, an untrained SAE of the same
sparsity, the raw residual dimensions at that sparsity, a supervised difference of means, and for steering a random
direction of equal norm. Units and strengths are chosen on one half of the patients and reported on the other.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sae_lens_maira.activations import ActivationRows, RowSettings, harvest, joined
from sae_lens_maira.io import atomic_folder
from sae_lens_maira.latents import split_by_patient
from sae_lens_maira.maira2 import Maira2, TokenRole
from sae_lens_maira.phantom import generate_studies, load_phantom, truth_labels
from sae_lens_maira.quickstart.agree import agreement
from sae_lens_maira.quickstart.page import write_pages
from sae_lens_maira.quickstart.report import write_report
from sae_lens_maira.quickstart.results import QuickstartConfig, QuickstartResult
from sae_lens_maira.quickstart.sae import TrainedSAE, TrainingPlan, train_saes
from sae_lens_maira.quickstart.steer import steer_finding
from sae_lens_maira.sae import make_control
from sae_lens_maira.sae.config import Frozen
from sae_lens_maira.studies import Study


def run_quickstart(config: QuickstartConfig) -> QuickstartResult:
    """Run the whole job and write `config.out`.

    Args:
        config: Settings.

    Returns:
        The results, which `report.md` in the folder shows with figures.

    Raises:
        ConfigError: A setting is out of range.
    """
    torch.manual_seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    maira = load_phantom()
    studies = studies_of(config)
    halves = split_by_patient([study.patient_id for study in studies], config.seed)
    truth = np.stack([truth_labels(study) for study in studies])
    # One SAE per kind of position: patches have four times the norm of report tokens in the phantom, so one SAE for
    # both would mostly learn patches. Each is trained at its own layer (reasons in docs/log.md).
    rows = stored_rows(maira, studies, hook_names(config)["image"], config)
    rows = rows.where(rows.is_image)
    spoken = stored_rows(maira, studies, hook_names(config)["text"], config)
    spoken = spoken.where(spoken.role == TokenRole.REPORT)
    # SAEs of an earlier run into this folder could not be distinguished from those of this one.
    for kind in (None, *config.frozen):
        shutil.rmtree(text_folder(config, 0, kind).parent, ignore_errors=True)
    plans = {"text": text_plans(config), "image": image_plans(config)}
    learned = {
        "text": spoken.where(halves.choose[spoken.study]),
        "image": rows.where(halves.choose[rows.study]),
    }
    jobs = [(learned[place], plan) for place in plans for plan in plans[place]]
    trained = iter(train_saes(jobs, progress=config.progress))
    saes = {place: {plan: next(trained) for plan in plans[place]} for place in plans}

    def of_kind(place: str, kind: Frozen | None) -> list[TrainedSAE]:
        return [sae for plan, sae in saes[place].items() if plan.control == kind]

    scores = {
        place: agreement(
            place,
            mine,
            truth,
            halves,
            of_kind(place, None),
            of_kind(place, None)[0].seed,
            {kind: of_kind(place, kind) for kind in config.frozen},
        )
        for place, mine in (("text", spoken), ("image", rows))
    }
    text, image = scores["text"], scores["image"]
    with atomic_folder(config.out / "sae_text", "replace") as draft:
        shutil.copytree(text_folder(config, text.sae.seed), draft, dirs_exist_ok=True)
    controls = {kind: of_kind("image", kind)[0].inference for kind in config.frozen}
    if config.frozen:
        controls["untrained"] = make_control(
            "untrained", image.sae.inference, learned["image"].values, config.seed, l0=image.l0
        )
    steering = steer_finding(
        maira,
        studies,
        rows,
        truth,
        halves,
        image.sae,
        finding=config.finding,
        n_studies=config.steer_studies,
        seed=config.seed,
        progress=config.progress,
        controls=controls,
    )
    result = QuickstartResult(config, text, image, steering, config.out)
    write_report(result, studies, rows, halves)
    write_pages(result, maira, studies, {"image": rows, "text": spoken}, halves)
    return result


def text_plans(config: QuickstartConfig) -> list[TrainingPlan]:
    """Plans of the SAEs of report tokens, one per initial weights, and of their frozen controls."""
    first = config.seed * config.text_seeds  # runs of different seeds share no initial weights
    # Whitened, since the word explains most of the variance of report tokens and the study little: without it
    # more latents die. The whitening ends up in the weights.
    return [
        TrainingPlan(
            text_folder(config, seed, kind),
            config.d_sae,
            config.text_k,
            config.text_steps,
            seed,
            lr=3e-3,
            dead_after=dead_after(config.text_steps),
            normalize="covariance_whitening",
            control=kind,
        )
        for kind in (None, *config.frozen)
        for seed in range(first, first + config.text_seeds)
    ]


def image_plans(config: QuickstartConfig) -> list[TrainingPlan]:
    """Plans of the SAE of image patches and of its frozen controls."""
    return [
        TrainingPlan(
            config.out / ("sae_image" if kind is None else f"sae_image_{kind}"),
            config.d_sae,
            config.k,
            config.steps,
            config.seed,
            lr=2e-3,
            dead_after=dead_after(config.steps),
            control=kind,
        )
        for kind in (None, *config.frozen)
    ]


def studies_of(config: QuickstartConfig) -> list[Study]:
    """The studies of a run; the phantom was trained on seed 0, these come from another seed."""
    return generate_studies(config.studies, seed=20_000 + config.seed)


def dead_after(steps: int) -> int:
    """Steps without activation after which a latent counts as dead: a sixth of the run, so that it can recover."""
    return max(1, steps // 6)


def text_folder(config: QuickstartConfig, seed: int, control: Frozen | None = None) -> Path:
    """Folder of the text SAE of one seed, or of a control; the SAE that is taken is copied to `sae_text`."""
    return config.out / ("sae_text_seeds" if control is None else f"sae_text_{control}") / str(seed)


def hook_names(config: QuickstartConfig) -> dict[str, str]:
    """Hook point of either SAE, by place."""
    layers = {"image": config.layer, "text": config.text_layer}
    return {place: f"blocks.{layer}.hook_resid_post" for place, layer in layers.items()}


def stored_rows(
    maira: Maira2, studies: Sequence[Study], hook_name: str, config: QuickstartConfig
) -> ActivationRows:
    """All rows at one of `hook_names`, from a store in the folder, in study order.

    The store is harvested where it is not complete, at both hook points in one pass.
    """
    names = sorted(set(hook_names(config).values()))
    store = harvest(
        maira,
        studies,
        config.out
        / "store"
        / f"layers{config.layer}_{config.text_layer}_studies{config.studies}_seed{config.seed}",
        names,
        RowSettings(batch_size=16, seed=config.seed),
        dtype="float32",
        progress=config.progress,
    )
    return joined(list(store.blocks(hook_name, max_rows=len(store))))

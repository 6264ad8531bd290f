"""An SAE is taken, and its control made and taken, by one rule; a whitened SAE is compared with a whitened control."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.latents import best_units, split_by_patient, study_firing
from sae_lens_maira.phantom import FINDING_KEYS
from sae_lens_maira.quickstart.agree import agreement
from sae_lens_maira.quickstart.sae import TrainedSAE
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, make_control

STUDIES, EACH, D_IN, D_SAE = 120, 6, 16, 64


@pytest.fixture(scope="module")
def material():
    """Rows whose loud dimensions say nothing and whose quiet ones hold the findings, and their truth."""
    generator = torch.Generator().manual_seed(0)
    truth = np.random.default_rng(0).random((STUDIES, len(FINDING_KEYS))) < 0.3
    study = np.repeat(np.arange(STUDIES), EACH)
    values = torch.randn(len(study), D_IN, generator=generator) * torch.logspace(1, -1, D_IN)
    values[:, 8:] += 0.5 * torch.from_numpy(truth[study][:, :8]).float()
    blank = np.full(len(study), -1)
    rows = ActivationRows(
        values,
        study,
        np.tile(np.arange(EACH), STUDIES),
        blank,
        blank,
        blank,
        blank,
        blank,
        "blocks.0.hook_resid_post",
    )
    return rows, truth, split_by_patient([str(i) for i in range(STUDIES)])


def drawn(rows: ActivationRows, seed: int) -> TrainedSAE:
    config = MatryoshkaTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4, matryoshka_widths=[16, 64])
    sae = make_control("untrained", MatryoshkaTrainingSAE(config), rows.values, l0=3.0 + seed, seed=seed)
    return TrainedSAE(sae, (16, 64), rows.hook_name, seed, whitened=False)


@pytest.mark.parametrize("whitened", [False, True])
def test_the_control_is_made_and_taken_as_the_sae_was(whitened, material):
    """Three draws at the L0 of the SAE taken, in its space; the best on the selection half."""
    rows, truth, halves = material
    saes = [replace(drawn(rows, seed), whitened=whitened) for seed in range(3)]
    result = agreement("text", rows, truth, halves, saes, seed=50)
    half = rows.where(halves.choose[rows.study])
    controls = []
    for i in range(3):
        kind = "untrained_whitened" if whitened else "untrained"
        made = make_control(kind, saes[0].inference, half.values, 50 + i, l0=result.l0)
        fires = study_firing(made.encode, rows, STUDIES)[0]
        controls.append(best_units("control", fires, truth, FINDING_KEYS, halves))
    best = max(controls, key=lambda control: control.choose_f1.mean())
    assert result.untrained.f1.tolist() == best.f1.tolist()
    assert [d.untrained_choose_f1 for d in result.draws] == [float(c.choose_f1.mean()) for c in controls]
    assert result.sae.seed == max(result.draws, key=lambda d: d.choose_f1).seed


def test_one_sae_is_taken_as_it_is(material):
    rows, truth, halves = material
    result = agreement("image", rows, truth, halves, [drawn(rows, 4)], seed=0)
    assert [draw.seed for draw in result.draws] == [4]
    assert result.l0 == pytest.approx(7, rel=0.1)

"""The search for a setting at the image patches: pooling, thresholds per latent, and what is reported."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.latents import Halves
from sae_lens_maira.phantom import FINDING_KEYS

RECIPE = Path(__file__).parents[2] / "recipes" / "patch_search.py"


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE), run_name="recipe")


def test_pooled_rows_are_means_of_squares_in_any_order(recipe):
    """Rows of two studies and two views in random order: each pooled row is the mean of its own four patches."""
    grid = np.array([(s, v, r, c) for s in (0, 1) for v in (0, 2) for r in range(4) for c in range(4)])
    study, view, row, col = np.random.default_rng(0).permutation(grid).T
    values = torch.from_numpy(np.stack([study, view, row, col], 1)).float()
    zeros = np.zeros(len(study), dtype=np.int64)
    rows = ActivationRows(values, study, zeros, zeros, zeros, view, row, col, "blocks.3.hook_resid_post")
    pooled = recipe["pooled"](rows, 2)
    assert len(pooled) == 16
    for i in range(16):
        corner = (pooled.patch_row[i] // 2 * 2, pooled.patch_col[i] // 2 * 2)
        expected = [pooled.study[i], pooled.view[i], corner[0] + 0.5, corner[1] + 0.5]
        assert pooled.values[i].tolist() == expected
    assert recipe["pooled"](rows, 1) is rows


def test_a_threshold_per_latent_is_chosen_on_the_choosing_half_only(recipe):
    """A latent that is always active, and stronger with a finding, agrees with it once it has a threshold."""
    generator = np.random.default_rng(0)
    truth = generator.random((400, len(FINDING_KEYS))) < 0.3
    top = torch.from_numpy(1 + truth + 0.2 * generator.random(truth.shape)).float()
    halves = Halves(np.arange(400) < 200, np.arange(400) >= 200)
    plain, tuned = (
        recipe["agreement"](recipe["Setting"]("x", threshold=own), "x", top, truth, halves)
        for own in (False, True)
    )
    assert plain.f1.mean() < 0.6
    assert tuned.f1.mean() > 0.95
    swapped = truth.copy()
    swapped[200:] = ~swapped[200:]
    other = recipe["agreement"](recipe["Setting"]("x", threshold=True), "x", top, swapped, halves)
    assert np.allclose(other.choose_f1, tuned.choose_f1)
    assert other.f1.mean() < 0.2


@pytest.mark.slow
def test_the_first_setting_and_the_chosen_ones_are_reported(tmp_path):
    """The reference, the largest difference and the highest F1 of the search are run on the fresh seeds."""
    settings = [{"name": "first"}, {"name": "pooled", "pool": 2}, {"name": "data", "data_decoder": True}]
    file = tmp_path / "search.yaml"
    small = [setting | {"studies": 40, "d_sae": 64} for setting in settings]
    file.write_text(f"settings: {small}\nsteps: 20\nfresh: [10]\nout: {tmp_path / 'out'}\n", encoding="utf-8")
    subprocess.run([sys.executable, str(RECIPE), "--config", str(file)], check=True)
    searched, reported = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("search", "report"))
    assert list(searched.setting) == ["first", "pooled", "data"]
    chosen = {
        "first",
        searched.setting[searched.difference.idxmax()],
        searched.setting[searched.trained.idxmax()],
    }
    assert set(reported.setting) == chosen
    assert "| first | 10 |" in (tmp_path / "out" / "patch_search.md").read_text(encoding="utf-8")

"""The run over findings on a small budget: a finding comes, controls do not bring it, and a second run resumes."""

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.recipes.steering.candidates import choose_map
from sae_lens_maira.recipes.steering.steering_table import SteeringRun, other_side, prepare, run_steering
from sae_lens_maira.steering import Direction
from sae_lens_maira.steering import methods as names
from sae_lens_maira.steering.cohort import Cohort
from sae_lens_maira.steering.maps import LatentMap
from sae_lens_maira.steering.positions import Patches

FINDING = "cardiomegaly"
SMALL = {
    "parts": ("insert", "remove"),
    "findings": (FINDING,),
    "studies": 240,
    "d_sae": 256,
    "steps": 400,
    "gradients": 4,
    "choose": 6,
    "report": 10,
    "progress": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_steering(SteeringRun(out=tmp_path_factory.mktemp("steering"), **SMALL))


@pytest.mark.slow
def test_latents_put_it_in_and_controls_do_not(folder):
    """Cardiomegaly into studies without it: 32 latents at the patches in 8 of 10 or more, controls in at most 1."""
    table = pd.read_parquet(folder / "table.parquet").set_index(["part", "method"]).loc["insert"]
    assert set(table.n) == {10}
    assert (table.unsteered == 0).all()
    assert max(table.on_target[[names.MAPS, names.EFFECT]]) >= 0.8
    assert table.on_target[names.MEANS] >= 0.8
    assert table.on_target[names.RANDOM_DIRECTION] <= 0.1
    assert table.on_target[names.FLIPPED] <= 0.1
    assert table.on_target[names.CAUSAL] >= 0.8
    assert table.on_target[[names.RANDOM_CAUSAL, names.RANDOM_LATENTS_CAUSAL]].max() <= 0.1
    assert table.off_target[names.MAPS] <= 0.1
    assert (table.on_target_high - table.on_target_low > 0.2).all(), "ten studies cannot be this certain"


@pytest.mark.slow
def test_taking_out(folder):
    """Subtracting what puts it in takes it out of 8 of 10 reports or more; random latents do not."""
    table = pd.read_parquet(folder / "table.parquet").set_index(["part", "method"]).loc["remove"]
    assert table.on_target[names.SUBTRACT] >= 0.8
    assert table.on_target[names.RANDOM_ABLATED] <= 0.2


@pytest.mark.slow
def test_tables_are_written_and_a_second_run_resumes(folder):
    """Markdown and figures are there; run again, nothing is steered again and nothing is loaded."""
    for name in ("table.md", "insert.png", "remove.png"):
        assert (folder / name).stat().st_size > 500
    files = sorted(folder.glob("*/*/studies.parquet"))
    before = [file.stat().st_mtime_ns for file in files]
    run_steering(SteeringRun(out=folder, **SMALL))
    assert [file.stat().st_mtime_ns for file in files] == before
    studies = pd.read_parquet(files[0])
    assert np.isfinite(studies.kl[studies.half == "report"]).all()
    assert not set(studies.columns) & {"frontal", "report"}


@pytest.fixture(scope="module")
def bench(folder):
    settings = SteeringRun(out=folder, **SMALL)
    cohort = settings.cohort(settings.studies, settings.layer, settings.seed, (42, 60))
    return prepare(settings, cohort), cohort


@pytest.mark.slow
def test_what_is_kept_is_no_worse_than_its_components_and_is_what_is_reported(folder):
    """On the selection half; its strength is the summary's, and the table's mean map is among the candidates."""
    trials = pd.read_parquet(folder / FINDING / "insert" / "trials.parquet")
    summary = pd.read_parquet(folder / FINDING / "insert" / "summary.parquet").set_index("method")
    kept = trials[trials.kept].iloc[0]
    assert set(trials.kind) == {names.MAPS, names.EXEMPLAR, names.POOLED}
    assert kept.gain == trials.gain.max()
    assert summary.strength[names.CAUSAL] == kept.strength
    at = summary.strength[names.MAPS]
    assert at in set(trials[(trials.kind == names.MAPS) & (trials.place == "whole image")].strength)


@pytest.mark.slow
def test_the_choice_does_not_see_the_reporting_half(bench):
    """Without any study of the reporting half the same maps are tried, with the same outcome; exemplars have it."""
    made, cohort = bench
    which = cohort.pick("choose", [], [FINDING], 4)
    choice = choose_map(made, cohort, FINDING, which, n_exemplars=2, screened_on=2)
    alone = Cohort(
        cohort.maira, cohort.studies, cohort.hook_name, cohort.reader, 0, (42, 0), max_new_tokens=76
    )
    again = choose_map(made, alone, FINDING, which, n_exemplars=2, screened_on=2)
    pd.testing.assert_frame_equal(choice.table(), again.table())
    used = {i for trial in choice.trials for i in trial.candidate.studies}
    assert used
    assert max(used) < len(alone.prompts), "an exemplar is of the selection half"
    for i in used:
        assert any(item.key == FINDING and item.present for item in cohort.study(i).truth)


@pytest.mark.slow
def test_controls_move_every_patch_as_far(bench):
    """The random direction and the random latents have the chosen map's norm at every patch, and other latents."""
    made, _ = bench
    decoder, latents = made.decoder, made.chosen(FINDING, names.MAPS)
    grids = made.difference(FINDING)[:, latents] * made.place(FINDING)[:, None]
    kept = LatentMap(tuple(latents), grids, made.statistics.shape)
    methods = {method.name: method for method in made.tried({names.CAUSAL: (kept, 2.0)})}
    wanted = 2 * kept.delta(decoder).norm(dim=1)

    def moved(name):
        total = torch.zeros(len(wanted), decoder.shape[1])
        for item in methods[name].make(2.0):
            row = torch.as_tensor(item.vector) if isinstance(item, Direction) else decoder[item.latents[0]]
            assert isinstance(item.where, Patches)
            assert item.where.grid is not None
            total += torch.as_tensor(item.strength) * item.where.grid.reshape(-1, 1) * row
        return total

    for name in (names.CAUSAL, names.RANDOM_CAUSAL, names.RANDOM_LATENTS_CAUSAL):
        torch.testing.assert_close(moved(name).norm(dim=1), wanted, rtol=1e-4, atol=1e-5)
        assert methods[name].control_of == (None if name == names.CAUSAL else names.CAUSAL)
    assert not {item.latents[0] for item in methods[names.RANDOM_LATENTS_CAUSAL].make(2.0)} & set(latents)


def test_sides_and_bad_input(tmp_path):
    """The other side of a key, and names that are not known."""
    assert other_side("pneumothorax_left") == "pneumothorax_right"
    assert other_side("nodule") is None
    with pytest.raises(ConfigError, match="known are"):
        run_steering(SteeringRun(out=tmp_path, findings=("measles",), studies=8))
    with pytest.raises(ConfigError, match="give --sae"):
        run_steering(SteeringRun(out=tmp_path, model="elsewhere"))
    with pytest.raises(ConfigError, match="known are"):
        SteeringRun(out=tmp_path, parts=("enlarge",))

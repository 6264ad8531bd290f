"""The choice among latent maps: its rule, that it reads one half only, and controls that move every patch as far."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from sae_lens_maira.commands import steering_methods as names
from sae_lens_maira.commands.steering_chosen import Candidate, Choice, Trial, choose_map
from sae_lens_maira.commands.steering_run import SteeringRun, prepare, steer_part
from sae_lens_maira.commands.steering_subjects import Subjects
from sae_lens_maira.phantom import FINDING_KEYS
from sae_lens_maira.steering import Direction
from sae_lens_maira.steering.exemplar import LatentMap

FINDING = "pleural_effusion_left"


def test_the_rule_counts_excess_off_target_three_times():
    """On minus off below the allowance; above it the excess counts twice more; of equal gains the weaker strength."""
    mean = Candidate(names.MAPS, "whole film", (), LatentMap((0,), torch.ones(4, 1), (2, 2)))
    one = replace(mean, kind=names.EXEMPLAR, studies=(3,))
    assert Trial(mean, 1.0, 0.9, 0.05).gain == pytest.approx(0.85)
    assert Trial(mean, 1.0, 0.9, 0.16).gain == pytest.approx(0.54)
    trials = (Trial(one, 2.0, 1.0, 0.16), Trial(mean, 3.0, 0.8, 0.02), Trial(mean, 1.5, 0.8, 0.02))
    choice = Choice(trials, 10)
    assert choice.best() is trials[2]
    assert choice.best(names.EXEMPLAR) is trials[0]
    assert choice.table().kept.tolist() == [False, False, True]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    settings = SteeringRun(
        out=tmp_path_factory.mktemp("chosen"),
        layer=0,
        studies=160,
        d_sae=256,
        steps=200,
        gradients=2,
        choose=6,
        report=8,
        kl=False,
        progress=False,
        methods=(
            names.CAUSAL,
            names.EXEMPLAR,
            names.POOLED,
            names.MAPS,
            names.RANDOM_CAUSAL,
            names.TWINS_CAUSAL,
        ),
    )
    return *prepare(settings), settings


@pytest.mark.slow
def test_the_choice_does_not_see_the_reporting_half(bench):
    """Without any study of the reporting half the same maps are tried, with the same outcome; exemplars have it."""
    made, subjects, _ = bench
    which = subjects.pick("choose", [], [FINDING], 6)
    choice = choose_map(made, subjects, FINDING, which, n_exemplars=2, screened_on=4)
    alone = Subjects(subjects.maira, subjects.studies, subjects.hook_name, 0, pool=(42, 0))
    again = choose_map(made, alone, FINDING, which, n_exemplars=2, screened_on=4)
    pd.testing.assert_frame_equal(choice.table(), again.table())
    for trial in choice.trials:
        assert not set(trial.candidate.studies) & set(which)
        assert all(
            any(item.key == FINDING and item.present for item in subjects.study(i).truth)
            for i in trial.candidate.studies
        )
    assert choice.best(names.EXEMPLAR).on_target >= 0.5


@pytest.mark.slow
def test_what_is_kept_is_no_worse_than_its_components_and_is_what_is_reported(bench):
    """On the choosing half; its strength is the one in the summary, and the reporting half holds other studies."""
    made, subjects, settings = bench
    summary = steer_part(made, subjects, "insert", FINDING, settings).summary.set_index("method")
    trials = pd.read_parquet(settings.out / FINDING / "insert" / "trials.parquet")
    kept = trials[trials.kept].iloc[0]
    assert kept.gain == trials.gain.max()
    assert set(trials.kind) == {names.MAPS, names.EXEMPLAR, names.POOLED}
    assert summary.strength[names.CAUSAL] == kept.strength
    at = summary.strength[names.MAPS]
    same = trials[(trials.kind == names.MAPS) & (trials.place == "whole film") & (trials.strength == at)]
    assert len(same) == 1, "the table's mean map is among the candidates"
    assert summary.n.nunique() == 1
    assert summary.on_target[[names.RANDOM_CAUSAL, names.TWINS_CAUSAL]].max() <= 0.25


@pytest.mark.slow
def test_controls_move_every_patch_as_far(bench):
    """The random direction and the random latents have the chosen map's norm at every patch, and other latents."""
    made, _, _ = bench
    decoder, column = made.decoder, FINDING_KEYS.index(FINDING)
    difference = made.learned.present[column] - made.learned.absent[column]
    latents = made.chosen(FINDING, names.MAPS)
    kept = LatentMap(
        tuple(latents), difference[:, latents] * made.place(FINDING)[:, None], made.learned.shape
    )
    methods = {m.name: m for m in made.tried({names.CAUSAL: (kept, 2.0)})}
    wanted = 2 * kept.delta(decoder).norm(dim=1)

    def moved(name):
        total = torch.zeros(len(wanted), decoder.shape[1])
        for item in methods[name].make(2.0):
            row = item.vector if isinstance(item, Direction) else decoder[item.latents[0]]
            total += item.strength * item.where.grid.reshape(-1, 1) * row
        return total

    for name in (names.CAUSAL, names.RANDOM_CAUSAL, names.TWINS_CAUSAL):
        torch.testing.assert_close(moved(name).norm(dim=1), wanted, rtol=1e-4, atol=1e-5)
    twins = {item.latents[0] for item in methods[names.TWINS_CAUSAL].make(2.0)}
    assert not twins & set(latents)
    assert methods[names.TWINS_CAUSAL].control_of == names.CAUSAL

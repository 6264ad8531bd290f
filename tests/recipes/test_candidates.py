"""The choice among latent maps: its rule. That it reads one half only, `test_steering_table.py` checks on a run."""

from dataclasses import replace

import pytest
import torch

from sae_lens_maira.recipes.steering.candidates import Candidate, Choice, Trial
from sae_lens_maira.steering import methods as names
from sae_lens_maira.steering.maps import LatentMap


def test_the_rule_counts_excess_off_target_three_times():
    """On minus off below the allowance; above it the excess counts twice more; of equal gains the weaker strength."""
    mean = Candidate(names.MAPS, "whole image", (), LatentMap((0,), torch.ones(4, 1), (2, 2)))
    one = replace(mean, kind=names.EXEMPLAR, studies=(3,))
    assert Trial(mean, 1.0, 0.9, 0.05).gain == pytest.approx(0.85)
    assert Trial(mean, 1.0, 0.9, 0.16).gain == pytest.approx(0.54)
    trials = (Trial(one, 2.0, 1.0, 0.16), Trial(mean, 3.0, 0.8, 0.02), Trial(mean, 1.5, 0.8, 0.02))
    choice = Choice(trials, 10)
    assert choice.best() is trials[2]
    assert choice.best(names.EXEMPLAR) is trials[0]
    assert choice.table().kept.tolist() == [False, False, True]

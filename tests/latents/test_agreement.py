"""Agreement of units with findings: F1 by hand, choice and report on different patients, pairing of bootstraps."""

import numpy as np
import pytest

from sae_lens_maira.errors import StudyError
from sae_lens_maira.latents import (
    best_dictionary,
    best_units,
    paired_difference,
    split_by_patient,
)
from sae_lens_maira.stats import f1_of_firing


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    truth = rng.random((200, 3)) < 0.3
    noise = rng.random((200, 40)) < 0.2
    return truth, noise


def test_f1_by_hand():
    """2 TP / (2 TP + FP + FN), and 0 where nothing fires."""
    fires = np.array([[1, 0], [1, 0], [0, 0], [1, 0]], dtype=bool)
    truth = np.array([[1], [1], [1], [0]], dtype=bool)
    assert f1_of_firing(fires, truth).tolist() == [[pytest.approx(2 * 2 / (4 + 1 + 1))], [0.0]]


def test_no_patient_is_in_both_halves():
    """The halves partition the studies and every patient's studies stay together."""
    patients = [f"p{i // 3}" for i in range(60)]
    halves = split_by_patient(patients, seed=3)
    assert (halves.choose ^ halves.report).all()
    for patient in set(patients):
        mine = [halves.choose[i] for i, p in enumerate(patients) if p == patient]
        assert len(set(mine)) == 1


def test_one_patient_cannot_be_split():
    with pytest.raises(StudyError, match="two halves"):
        split_by_patient(["p"] * 5)


def test_the_unit_is_chosen_without_the_reported_half(table):
    """A unit that is perfect on the reported half only is not chosen."""
    truth, noise = table
    halves = split_by_patient([str(i) for i in range(200)])
    fires = noise.copy()
    fires[:, 5] = truth[:, 0]
    fires[halves.choose, 5] = False
    fires[:, 6] = np.where(halves.choose, truth[:, 0], noise[:, 6])
    scores = best_units("d", fires, truth, ["a", "b", "c"], halves)
    assert scores.unit[0] == 6
    assert scores.f1[0] == pytest.approx(
        f1_of_firing(fires[halves.report], truth[halves.report])[6, 0], abs=1e-6
    )
    assert scores.f1[0] < 0.6


def test_the_dictionary_is_chosen_without_the_reported_half(table):
    """Of two, the one that is right on the selection half is taken, though the other is right on the reported one."""
    truth, noise = table
    halves = split_by_patient([str(i) for i in range(200)])
    names = ["a", "b", "c"]
    early, late = noise.copy(), noise.copy()
    early[:, :3] = np.where(halves.choose[:, None], truth, noise[:, :3])
    late[:, :3] = np.where(halves.report[:, None], truth, noise[:, :3])
    drawn = [
        best_units(name, fires, truth, names, halves) for name, fires in (("late", late), ("early", early))
    ]
    assert best_dictionary(drawn) == 1
    assert drawn[1].choose_f1 == pytest.approx(np.ones(3))
    assert best_dictionary([drawn[1], drawn[1]]) == 0
    with pytest.raises(StudyError, match="0 dictionaries"):
        best_dictionary([])


def test_f1_on_the_choosing_half_is_that_of_the_unit_given(table):
    """Also where the unit is not chosen but given."""
    truth, noise = table
    halves = split_by_patient([str(i) for i in range(200)])
    given = best_units("d", noise, truth, ["a", "b", "c"], halves, unit=np.array([4, 9, 4]))
    whole = f1_of_firing(noise[halves.choose], truth[halves.choose])
    assert given.choose_f1.tolist() == [whole[4, 0], whole[9, 1], whole[4, 2]]


def test_bootstrap_interval_covers_and_is_that_of_resampling(table):
    """The multinomial weights give the interval of an explicit loop over resampled studies."""
    truth, noise = table
    halves = split_by_patient([str(i) for i in range(200)])
    fires = noise.copy()
    fires[:, 0] = truth[:, 0] ^ (np.random.default_rng(1).random(200) < 0.1)
    scores = best_units("d", fires, truth, ["a", "b", "c"], halves, n_boot=4000)
    assert scores.low[0] < scores.f1[0] < scores.high[0]
    rng = np.random.default_rng(9)
    f, t = fires[halves.report][:, scores.unit[0]], truth[halves.report][:, 0]
    loop = []
    for _ in range(4000):
        pick = rng.integers(len(t), size=len(t))
        loop.append(2 * (f & t)[pick].sum() / (f[pick].sum() + t[pick].sum()))
    assert np.quantile(loop, [0.025, 0.975]) == pytest.approx([scores.low[0], scores.high[0]], abs=0.02)


def test_paired_difference_of_equals_is_zero(table):
    """Same dictionary, same seed: the difference and its interval vanish; other studies are refused."""
    truth, noise = table
    halves = split_by_patient([str(i) for i in range(200)])
    a = best_units("a", noise, truth, ["a", "b", "c"], halves)
    same = paired_difference(a, best_units("b", noise, truth, ["a", "b", "c"], halves))
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    other = split_by_patient([str(i // 5) for i in range(200)], seed=5)
    other.report[:3] = False
    with pytest.raises(StudyError, match="paired"):
        paired_difference(a, best_units("b", noise, truth, ["a", "b", "c"], other))

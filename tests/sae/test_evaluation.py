"""Figures of an evaluation are the formulas' values, per level and role, and an untrained SAE is beaten."""

import math

import numpy as np
import pytest
import torch
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import MatryoshkaTrainingSAE, evaluate_sae, load_matryoshka

pytestmark = pytest.mark.compat

NAMES = {3: "IMAGE", 10: "REPORT"}


@pytest.fixture
def sae(trained):
    return load_matryoshka(trained)


@pytest.fixture
def roles():
    return torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(4)) * 4 - 1  # -1, 3, 7


def formula(sae, x, width):
    """EV, EV per token, L0 and dead latents, straight from their definitions."""
    acts = sae.encode(x)
    acts[:, width:] = 0
    error = (x - sae.decode(acts)).double().pow(2).sum(-1)
    variance = (x.double() - x.double().mean(0)).pow(2).sum(-1)
    dead = int((acts[:, :width] == 0).all(0).sum())
    return (
        float(1 - error.sum() / variance.sum()),
        float((1 - error / variance).mean()),
        float((acts > 0).sum() / len(x)),
        dead,
    )


def test_every_record_is_its_formula(sae, make_rows, roles):
    x = make_rows(300, seed=5)
    result = evaluate_sae(sae, x, roles, role_names=NAMES, batch_rows=77, baseline=None)
    assert len(result.records) == 3 * 4
    groups = {"all": x, "-1": x[roles == -1], "IMAGE": x[roles == 3], "7": x[roles == 7]}
    for record in result.records:
        ev, per_token, l0, dead = formula(sae, groups[record.role], record.width)
        assert record.rows == len(groups[record.role])
        assert record.explained_variance == pytest.approx(ev, abs=1e-5)
        assert record.explained_variance_per_token == pytest.approx(per_token, abs=1e-5)
        assert record.l0 == pytest.approx(l0, abs=1e-6)
        assert record.dead_latents == dead
    assert [record.width for record in result.records if record.role == "all"] == [8, 20, 48]


@pytest.mark.parametrize("kind", ["numpy", "list of batches", "pairs", "float16"])
def test_ways_of_giving_rows(kind, sae, make_rows, roles):
    """Arrays, batches, pairs with roles and float16 give the same figures."""
    x = make_rows(300, seed=5)
    expected = evaluate_sae(sae, x, roles if kind != "list of batches" else None)
    given = {
        "numpy": lambda: evaluate_sae(sae, x.numpy(), roles.numpy()),
        "list of batches": lambda: evaluate_sae(sae, [x[:100], x[100:]]),
        "pairs": lambda: evaluate_sae(sae, [(x[:100], roles[:100]), (x[100:].numpy(), roles[100:].numpy())]),
        "float16": lambda: evaluate_sae(sae, x.half(), roles),
    }[kind]()
    assert any(one.sae == "trained" for one in expected.records)
    for a, b in zip(expected.records, given.records, strict=True):
        if a.sae == "trained":
            assert (a.role, a.level, a.rows) == (b.role, b.level, b.rows)
            assert a.explained_variance == pytest.approx(
                b.explained_variance, abs=5e-3 if kind == "float16" else 1e-6
            )


def test_untrained_sae_has_the_same_shape_and_sparsity_and_explains_less(
    make_config, make_trainer, make_rows
):
    training = MatryoshkaTrainingSAE(make_config())
    make_trainer(training, steps=800, lr=3e-3, lr_end=3e-3).fit()
    sae = load_matryoshka(training)
    x = make_rows(2000, seed=5)
    result = evaluate_sae(sae, x)
    for level in range(3):
        ours, other = result.get(level=level), result.get(level=level, sae="untrained")
        assert other.width == ours.width
        assert ours.explained_variance > other.explained_variance + 0.1
    whole = result.get(), result.get(sae="untrained")
    assert whole[0].l0 == pytest.approx(whole[1].l0, rel=0.05)
    assert whole[1].explained_variance > 0  # the fitted gain keeps it from overshooting


def test_each_role_has_its_own_untrained_sae(sae, make_rows, roles):
    """A role far from the others' mean: its untrained SAE starts from there, with the role's own sparsity."""
    x = make_rows(300, seed=5)
    x[roles == 3] += 2.0
    with torch.no_grad():
        sae.threshold.fill_(6.0)
    result = evaluate_sae(sae, x, roles, role_names=NAMES)
    for role in ("-1", "IMAGE", "7"):
        ours, other = result.get(role=role), result.get(role=role, sae="untrained")
        assert other.rows == ours.rows == int((roles == {"-1": -1, "IMAGE": 3, "7": 7}[role]).sum())
        assert other.explained_variance > -0.05
        assert other.l0 == pytest.approx(ours.l0, abs=0.05)


def test_a_training_sae_is_judged_as_it_would_be_saved(trained, sae, make_rows):
    x = make_rows(100)
    a, b = evaluate_sae(trained, x, baseline=None), evaluate_sae(sae, x, baseline=None)
    assert a == b


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_any_saelens_sae(normalisation, make_rows):
    """SAEs of other architectures are evaluated too, with one level."""
    x = make_rows(60)
    for other in (
        StandardSAE(StandardSAEConfig(d_in=12, d_sae=20, normalize_activations=normalisation)),
        TopKSAE(TopKSAEConfig(d_in=12, d_sae=20, k=3, normalize_activations=normalisation)),
    ):
        record = evaluate_sae(other, x, baseline=None).get()
        assert record.width == 20
        assert record.mse == pytest.approx(float((other(x) - x).pow(2).sum(-1).mean()), rel=1e-5)


def test_a_given_baseline_is_named(sae, make_rows):
    x = make_rows(50)
    frame = evaluate_sae(sae, x, baseline=sae.truncate(0)).to_frame()
    assert set(frame["sae"]) == {"trained", "baseline"}
    assert len(frame) == 4


def test_single_row_has_no_variance(sae, make_rows):
    record = evaluate_sae(sae, make_rows(1), baseline=None).get()
    assert math.isnan(record.explained_variance)
    assert record.rows == 1


def test_what_cannot_be_evaluated(sae, make_rows):
    x = make_rows(10)
    with pytest.raises(SAEError, match="read once"):
        evaluate_sae(sae, (part for part in (x,)))
    with pytest.raises(SAEError, match=r"\(n, 12\)"):
        evaluate_sae(sae, x[:, :5])
    with pytest.raises(SAEError, match="3 roles"):
        evaluate_sae(sae, x, [1, 2, 3])
    with pytest.raises(SAEError, match="NaN"):
        evaluate_sae(sae, x * np.nan)
    with pytest.raises(SAEError, match="at least one"):
        evaluate_sae(sae, x[:0])
    with pytest.raises(SAEError, match="Roles are"):
        evaluate_sae(sae, x, baseline=None).get(role="IMAGE")

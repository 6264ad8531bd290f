"""loss_convention="dictionary_learning" is that library's own trainer step, run by SAELens' trainer.

The whole comparison needs the library (`pip install --no-deps dictionary-learning`); without it, the parts
that can be stated as identities are still checked.
"""

import pytest
import torch

from sae_lens_maira.sae import MatryoshkaTrainingSAE, load_matryoshka
from sae_lens_maira.sae.losses import geometric_median, unit_rows, with_tangent_gradient

pytestmark = pytest.mark.compat

D_IN, D_SAE, BATCH = 12, 48, 16
DEAD_AFTER = 2 * BATCH  # rows; few enough for latents with positive pre-activations to count as dead
FRACTIONS = [0.25, 0.25, 0.5]


def make_theirs(module, **changes):
    trainer = module.MatryoshkaBatchTopKTrainer(
        **{
            "steps": 1000, "activation_dim": D_IN, "dict_size": D_SAE, "k": 1, "layer": 0, "lm_name": "none",
            "group_fractions": FRACTIONS, "lr": 1e-3, "warmup_steps": 0, "threshold_start_step": 3,
            "seed": 0, "device": "cpu",
        } | changes
    )  # fmt: skip
    trainer.dead_feature_threshold = DEAD_AFTER
    trainer.ae.double()
    return trainer


@pytest.mark.parametrize("group_weights", [None, [0.2, 0.3, 0.5]])
def test_same_parameters_after_every_step(
    their_trainer_module, group_weights, make_config, make_trainer, make_rows
):
    """Twelve steps: first b_dec, dead latents from step 1, threshold from 4, projected, clipped gradients."""
    theirs = make_theirs(their_trainer_module, group_weights=group_weights)
    config = make_config(
        matryoshka_widths=[], group_fractions=FRACTIONS, loss_convention="dictionary_learning",
        dtype="float64", level_weights=group_weights or [], threshold_start_step=3,
        dead_after_tokens=DEAD_AFTER, k=1,
    )  # fmt: skip
    ours = MatryoshkaTrainingSAE(config)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(ours, name).copy_(getattr(theirs.ae, name))
    trainer = make_trainer(ours, steps=12, batch=BATCH)
    dead_seen, aux_seen = 0, 0.0
    for step in range(12):
        rows = make_rows(BATCH, seed=step, dtype=torch.float64)
        their_loss = theirs.update(step, rows)
        our_step = trainer.step(rows)
        trainer.n_training_steps += 1
        dead_seen = max(dead_seen, theirs.dead_features)
        aux_seen = max(aux_seen, our_step.losses["auxiliary_reconstruction_loss"].item())
        # Their auxiliary term is computed in float32; before it sets in, agreement is to double precision.
        tol = 1e-6 if dead_seen else 1e-12
        torch.testing.assert_close(
            our_step.loss, torch.tensor(their_loss, dtype=torch.float64), rtol=tol, atol=tol
        )
        for name in ("W_enc", "b_enc", "b_dec"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs.ae, name), rtol=tol, atol=tol)
        torch.testing.assert_close(unit_rows(ours.W_dec), theirs.ae.W_dec.data, rtol=tol, atol=tol)
        torch.testing.assert_close(ours.topk_threshold, theirs.ae.threshold.double(), rtol=1e-6, atol=1e-6)
        assert torch.equal(ours.tokens_since_fired, theirs.num_tokens_since_fired)
    assert aux_seen > 0, "no dead latents: the auxiliary term was not compared"
    assert ours.topk_threshold > 0, "the threshold was not compared"


def test_same_first_weights_from_the_same_seed(their_trainer_module, make_config):
    theirs = their_trainer_module.MatryoshkaBatchTopKSAE
    torch.manual_seed(5)
    expected = theirs(D_IN, D_SAE, 4, [12, 12, 24])
    torch.manual_seed(5)
    got = MatryoshkaTrainingSAE(make_config(loss_convention="dictionary_learning"))
    torch.testing.assert_close(got.W_dec.data, expected.W_dec.data)
    torch.testing.assert_close(got.W_enc.data, expected.W_enc.data)
    assert float(got.topk_threshold) == float(expected.threshold) == -1.0


def test_saved_sae_equals_their_inference(
    their_trainer_module, make_config, make_trainer, make_rows, tmp_path
):
    sae = MatryoshkaTrainingSAE(make_config(loss_convention="dictionary_learning", threshold_start_step=3))
    make_trainer(sae, steps=30).fit()
    ours = load_matryoshka(sae)
    theirs = their_trainer_module.MatryoshkaBatchTopKSAE(D_IN, D_SAE, 4, [8, 12, 28])
    theirs.load_state_dict(
        theirs.state_dict() | {n: getattr(ours, n).data for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
        | {"threshold": ours.threshold[0].detach()}
    )  # fmt: skip
    rows = make_rows(50, seed=77)
    acts = theirs.encode(rows)
    torch.testing.assert_close(ours.encode(rows), acts)
    torch.testing.assert_close(ours.decode(ours.encode(rows)), theirs.decode(acts))


def test_gradient_is_orthogonal_to_decoder_rows():
    decoder = unit_rows(torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
    (with_tangent_gradient(decoder) * torch.randn(7, 5, dtype=torch.float64)).sum().backward()
    assert decoder.grad is not None
    assert decoder.grad.norm() > 0.1
    assert (decoder.grad * decoder).sum(
        -1
    ).abs().max() < 1e-5  # the library's 1e-6 in the norm leaves this much


def test_saved_decoder_rows_have_norm_one(make_config, make_trainer):
    sae = MatryoshkaTrainingSAE(make_config(loss_convention="dictionary_learning"))
    make_trainer(sae, steps=5).fit()
    torch.testing.assert_close(load_matryoshka(sae).W_dec.norm(dim=-1), torch.ones(D_SAE))


def test_geometric_median_minimises_the_sum_of_distances(make_rows):
    points = make_rows(40, dtype=torch.float64)
    points[0] += 1000.0
    median = geometric_median(points)

    def cost(point):
        return (points - point).norm(dim=1).sum()

    best = cost(median)
    assert all(cost(median + 0.01 * torch.randn(D_IN, dtype=torch.float64)) > best for _ in range(20))
    assert best < cost(points.mean(0)) - 100


def test_geometric_median_of_equal_rows_is_finite():
    assert torch.equal(geometric_median(torch.ones(4, 3)), torch.ones(3))


def test_loss_is_the_weighted_mean_over_groups(make_config, make_rows, step_input):
    sae = MatryoshkaTrainingSAE(make_config(loss_convention="dictionary_learning", dtype="float64"))
    out = sae.training_forward_pass(step_input(make_rows(33, dtype=torch.float64)))
    levels = [out.losses[name] for name in ("inner_mse_loss_8", "inner_mse_loss_20", "mse_loss")]
    torch.testing.assert_close(out.loss, sum(levels) / 9, rtol=1e-12, atol=1e-12)


def test_dead_latents_count_rows_not_steps(make_config, make_rows, step_input):
    sae = MatryoshkaTrainingSAE(make_config(loss_convention="dictionary_learning", dead_after_tokens=70, k=1))
    with torch.no_grad():
        sae.b_enc[5] = -1e6
    out = None
    for step in range(3):
        out = sae.training_forward_pass(step_input(make_rows(33, seed=step), None, step))
        dead = sae.dead_latents(step_input(make_rows(1)))
        assert dead is not None
        assert bool(dead[5]) == (33 * (step + 1) >= 70)
    assert out is not None
    assert out.losses["auxiliary_reconstruction_loss"] > 0


def test_a_loaded_sae_keeps_its_b_dec(make_config, make_rows, step_input):
    """The geometric median is the first guess of a fresh SAE, not of one whose training goes on."""
    sae = MatryoshkaTrainingSAE(make_config(loss_convention="dictionary_learning"))
    with torch.no_grad():
        sae.b_dec.fill_(0.25)
        sae.W_dec.mul_(2)
    sae.training_forward_pass(step_input(make_rows(33)))
    assert torch.equal(sae.b_dec.data, torch.full((D_IN,), 0.25))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))

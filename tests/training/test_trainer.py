"""The fused trainer gives SAELens' trainer's run: losses, gradients, weights, statistics, and clear refusals."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.errors import BackendError, SAEError
from sae_lens_maira.sae import control_kind, load_matryoshka
from sae_lens_maira.training import FusedSAETrainer

pytestmark = pytest.mark.compat
KINDS = ["batchtopk", "saelens", "ours", "dictionary_learning", "explicit"]


def run(trainer, steps):
    outputs = []
    for _ in range(steps):
        outputs.append(trainer.step(next(trainer.data_provider)))
        trainer.n_training_steps += 1
    return outputs


@pytest.mark.parametrize("kind", ["ours", "dictionary_learning"])
@pytest.mark.parametrize("control", ["frozen_decoder", "frozen_encoder", "soft_frozen_decoder"])
def test_frozen_controls_are_trained_as_saelens_trains_them(
    control, kind, dense_and_fused, make_config, planted_data, tmp_path
):
    """Ten steps of the fused step in float64 equal the dense ones; what is frozen is bit for bit as it began."""
    dense, fused = dense_and_fused(kind, dtype="float64", control=control)
    first = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    cfg = make_config(10, lr=3e-2, lr_end=3e-2)
    theirs = SAETrainer(cfg, dense, planted_data(24, 64))
    ours = FusedSAETrainer(cfg, fused, planted_data(24, 64))
    for a, b in zip(run(theirs, 10), run(ours, 10), strict=True):
        torch.testing.assert_close(b.loss, a.loss.detach(), rtol=1e-9, atol=1e-12)
    assert ours.dense_reason is None
    theirs.sae.constrain_decoder_()
    for name, tensor in theirs.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], tensor, rtol=1e-7, atol=1e-9)
    kept = {"frozen_decoder": {"W_dec"}, "frozen_encoder": {"W_enc", "b_enc"}, "soft_frozen_decoder": set()}
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        atol = 1e-12 if kind == "dictionary_learning" else 0  # rows of norm 1 are normalised again
        same = torch.allclose(fused.state_dict()[name], first[name], rtol=0, atol=atol)
        assert same == (name in kept[control]), name
    cosine = torch.nn.functional.cosine_similarity(fused.W_dec, first["W_dec"], dim=1)
    assert float(cosine.min()) >= 0.8 - 1e-9 or control == "frozen_encoder"
    if control == "soft_frozen_decoder":
        assert float(cosine.min()) < 0.81  # the bound was reached
    fused.save_inference_model(tmp_path)
    saved = load_matryoshka(tmp_path)
    assert control_kind(saved) == control
    assert set(saved.state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}


def test_any_frozen_parameter_stays(make_sae, make_config, planted_data):
    """Also those of SAELens' classes, frozen by hand; Adam keeps no moments for them."""
    sae = make_sae("batchtopk")
    sae.b_dec.requires_grad_(False)
    sae.W_enc.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    trainer = FusedSAETrainer(make_config(3), sae, planted_data(24, 64))
    run(trainer, 3)
    assert trainer.dense_reason is None
    for name, is_frozen in (("b_dec", True), ("W_enc", True), ("b_enc", False), ("W_dec", False)):
        assert torch.equal(getattr(sae, name), before[name]) == is_frozen
        assert (getattr(sae, name) in trainer.optimizer.state) != is_frozen


def test_kinds_cover_every_supported_class(make_sae):
    from sae_lens_maira.training.architectures import SUPPORTED

    assert {type(make_sae(kind)) for kind in KINDS} == set(SUPPORTED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False}]
)
def test_twelve_steps_in_float64_equal_saelens(kind, options, dense_and_fused, make_config, planted_data):
    """Dead latents appear from step 6 on (window 5), so the auxiliary loss is part of it."""
    if kind == "dictionary_learning" and options:
        options = {}
    dense, fused = dense_and_fused(kind, dtype="float64", **options)
    cfg = make_config(12, lr_warm_up_steps=3, lr_decay_steps=3)
    theirs = SAETrainer(cfg, dense, planted_data(24, 64))
    ours = FusedSAETrainer(cfg, fused, planted_data(24, 64))
    for a, b in zip(run(theirs, 12), run(ours, 12), strict=True):
        assert list(a.losses) == list(b.losses)
        for name, loss in a.losses.items():
            torch.testing.assert_close(b.losses[name], loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b.loss, a.loss.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b.feature_acts.to_dense(), a.feature_acts, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(b.sae_out, a.sae_out, rtol=1e-9, atol=1e-9)
    assert ours.dense_reason is None
    assert ours.dead_neurons.any() or kind == "dictionary_learning"
    for name, tensor in theirs.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], tensor, rtol=1e-7, atol=1e-9)
    assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)
    assert torch.equal(ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)
    assert ours.n_training_samples == theirs.n_training_samples
    assert ours.n_frac_active_samples == theirs.n_frac_active_samples


@pytest.mark.parametrize("options", [{}, {"use_matryoshka_aux_loss": True}, {"k": 40.0}])
@pytest.mark.parametrize("candidates", ["off", "bf16"])
def test_gradients_equal_saelens_autograd_in_float32(
    options, candidates, dense_and_fused, make_config, planted_data
):
    """One step with a third of the latents dead; k = 40 asks for more entries than are positive."""
    dense, fused = dense_and_fused("saelens", d_in=48, d_sae=160, matryoshka_widths=[20, 50, 160], **options)
    cfg = make_config(1, dead_feature_window=0)
    gradients = {}
    for name, trainer in (
        ("theirs", SAETrainer(cfg, dense, planted_data(48, 64))),
        ("ours", FusedSAETrainer(cfg, fused, planted_data(48, 64), candidates=candidates)),
    ):
        trainer.n_forward_passes_since_fired[::3] = 5
        keep = {}
        trainer.optimizer.register_step_pre_hook(
            lambda o, a, k, keep=keep: keep.update(
                {i: p.grad.clone() for i, p in enumerate(o.param_groups[0]["params"])}
            )
        )
        torch.nn.utils.clip_grad_norm_, clip = lambda p, n: None, torch.nn.utils.clip_grad_norm_
        try:
            run(trainer, 1)
        finally:
            torch.nn.utils.clip_grad_norm_ = clip
        gradients[name] = keep
    assert len(gradients["theirs"]) == len(gradients["ours"]) >= 3
    for index, expected in gradients["theirs"].items():
        assert float((gradients["ours"][index] - expected).norm() / expected.norm()) < 1e-6


def test_two_hundred_steps_give_the_same_curve_and_an_equal_sae(dense_and_fused, make_config, planted_data):
    """float32: loss curves within 1e-4, explained variance of the results within 1e-3."""
    dense, fused = dense_and_fused("saelens", d_in=32, d_sae=128, matryoshka_widths=[16, 48, 128])
    cfg = make_config(200, batch=128, lr=1e-2, dead_feature_window=20, lr_warm_up_steps=20, lr_decay_steps=40)
    theirs = SAETrainer(cfg, dense, planted_data(32, 128))
    ours = FusedSAETrainer(cfg, fused, planted_data(32, 128))
    curves = [torch.stack([o.loss.detach() for o in run(t, 200)]) for t in (theirs, ours)]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)
    assert curves[0][-1] < 0.5 * curves[0][0]
    held_out = next(planted_data(32, 512, start=10_000))
    left = [
        float((sae(held_out) - held_out).detach().square().sum() / held_out.var(0).sum() / 512)
        for sae in (dense, fused)
    ]
    assert abs(left[0] - left[1]) < 1e-3


def test_logs_are_those_of_saelens(dense_and_fused, make_config, planted_data):
    dense, fused = dense_and_fused("saelens")
    cfg = make_config(3)
    theirs, ours = (
        SAETrainer(cfg, dense, planted_data(24, 64)),
        FusedSAETrainer(cfg, fused, planted_data(24, 64)),
    )
    logs = [t.build_train_step_log_dict(run(t, 3)[-1], t.n_training_samples) for t in (theirs, ours)]
    assert list(logs[0]) == list(logs[1])
    for name, value in logs[0].items():
        assert logs[1][name] == pytest.approx(value, rel=1e-4), name


def test_fit_runs_whole_and_folds_the_scaling(dense_and_fused, make_config, planted_data, tmp_path):
    dense, fused = dense_and_fused("saelens", normalize_activations="expected_average_only_in")
    cfg = make_config(20, n_batches_for_norm_estimate=3)
    theirs = SAETrainer(cfg, dense, planted_data(24, 64)).fit()
    ours = FusedSAETrainer(cfg, fused, planted_data(24, 64)).fit()
    assert ours.W_enc.is_contiguous()
    torch.testing.assert_close(ours.W_dec, theirs.W_dec, rtol=1e-3, atol=1e-5)
    ours.save_inference_model(tmp_path)  # safetensors refuses anything but contiguous tensors
    torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, rtol=1e-4, atol=0)


def test_autocast_stays_near_the_dense_autocast(dense_and_fused, make_config, planted_data):
    dense, fused = dense_and_fused("saelens")
    cfg = make_config(10, autocast=True)
    theirs, ours = (
        SAETrainer(cfg, dense, planted_data(24, 64)),
        FusedSAETrainer(cfg, fused, planted_data(24, 64)),
    )
    for a, b in zip(run(theirs, 10), run(ours, 10), strict=True):
        torch.testing.assert_close(b.loss, a.loss.detach(), rtol=2e-2, atol=0)


def test_hooks_fall_back_to_the_dense_step_and_say_so_once(dense_and_fused, make_config, planted_data):
    dense, fused = dense_and_fused("saelens")
    cfg = make_config(4)
    theirs, ours = (
        SAETrainer(cfg, dense, planted_data(24, 64)),
        FusedSAETrainer(cfg, fused, planted_data(24, 64)),
    )
    run(ours, 1)
    run(theirs, 4)
    seen = []
    fused.hook_sae_acts_post.add_hook(lambda acts, hook: seen.append(acts.shape))
    with pytest.warns(UserWarning, match="hooks are attached to hook_sae_acts_post") as warned:
        run(ours, 2)
    assert len(warned) == 1
    assert seen == [(64, 64)] * 2
    assert ours.dense_reason is not None
    fused.reset_hooks()
    run(ours, 1)
    assert ours.dense_reason is None
    torch.testing.assert_close(fused.W_dec, dense.W_dec, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.W_enc, dense.W_enc, rtol=1e-4, atol=1e-6)


def test_a_subclass_runs_densely(make_sae, make_config, planted_data):
    sae = make_sae("saelens")
    sae.__class__ = type("Mine", (type(sae),), {})
    trainer = FusedSAETrainer(make_config(1), sae, planted_data(24, 64))
    with pytest.warns(UserWarning, match="the SAE is a Mine"):
        run(trainer, 1)


@pytest.mark.parametrize("change", ["bfloat16", "three_dimensions", "activation", "forward", "normalisation"])
def test_whatever_the_fused_step_would_ignore_runs_densely(change, make_sae, make_config, planted_data):
    options = {"normalize_activations": "layer_norm"} if change == "normalisation" else {}
    sae = make_sae("batchtopk", **options)
    data = planted_data(24, 64)
    batch = next(data)
    if change == "bfloat16":
        sae.to(torch.bfloat16)
    elif change == "three_dimensions":
        batch = batch.view(8, 8, 24)
    elif change == "activation":
        sae.activation_fn = torch.nn.ReLU()
    elif change == "forward":
        original = sae.training_forward_pass
        sae.training_forward_pass = lambda step_input: original(step_input)
    trainer = FusedSAETrainer(make_config(1), sae, data)
    # SAELens' own statistics do not take three dimensions either.
    outcome = pytest.raises(IndexError) if change == "three_dimensions" else nullcontext()
    with pytest.warns(UserWarning, match="The fused step does not apply"), outcome:
        trainer.step(batch)
    assert trainer.dense_reason


def test_nested_levels_with_row_normalisation_are_refused(make_sae, make_config, planted_data):
    sae = make_sae("saelens", normalize_activations="layer_norm")
    with pytest.raises(SAEError, match="does not work with nested reconstructions"):
        FusedSAETrainer(make_config(1), sae, planted_data(24, 64))


@pytest.mark.parametrize("kind", ["saelens", "dictionary_learning"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_batch_stops_before_any_weight_changes(kind, value, make_sae, make_config, planted_data):
    trainer = FusedSAETrainer(make_config(3), make_sae(kind), planted_data(24, 64))
    if kind == "saelens":
        run(trainer, 1)
    before = {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}
    samples, fired = trainer.n_training_samples, trainer.n_forward_passes_since_fired.clone()
    batch = next(trainer.data_provider)
    batch[3, 5] = value
    with pytest.raises(SAEError, match="1 of 64 rows"):
        trainer.step(batch)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.sae.state_dict().items())
    assert trainer.n_training_samples == samples
    assert torch.equal(trainer.n_forward_passes_since_fired, fired)
    run(trainer, 1)  # a good batch goes on


def test_damaged_weights_are_named(make_sae, make_config, planted_data):
    trainer = FusedSAETrainer(make_config(1), make_sae("saelens"), planted_data(24, 64))
    trainer.sae.b_enc.data[7] = torch.nan
    with pytest.raises(SAEError, match="b_enc"):
        run(trainer, 1)


def test_backends_are_explicit(make_sae, make_config, planted_data):
    trainer = FusedSAETrainer(make_config(1), make_sae("saelens"), planted_data(24, 64), backend="reference")
    assert trainer.backend == "reference"
    run(trainer, 1)
    with pytest.raises(BackendError, match="'triton' was requested"):
        FusedSAETrainer(make_config(1), make_sae("saelens"), planted_data(24, 64), backend="triton")
    with pytest.raises(BackendError, match="the backend is sparse"):
        FusedSAETrainer(make_config(1), make_sae("saelens"), planted_data(24, 64), sole_writer=True)


def test_a_quiet_run_warns_of_nothing(make_sae, make_config, planted_data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(FusedSAETrainer(make_config(2), make_sae("ours"), planted_data(24, 64)), 2)

"""SAELens on MAIRA-2: its runner trains on our rows, its evaluations are replaced, its metadata is filled."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, BatchTopKTrainingSAEConfig, StandardSAE, StandardSAEConfig
from sae_lens.training.prefetch import PrefetchingIterator

from sae_lens_maira.activations import RowSettings
from sae_lens_maira.errors import HookError, PromptError
from sae_lens_maira.hooks import HookedMaira2, Maira2ActivationsStore, Maira2Evaluator, maira2_runner
from sae_lens_maira.maira2 import TokenRole, role_mask
from sae_lens_maira.maira2.versions import has_transformer_bridge
from sae_lens_maira.phantom import generate_studies

pytestmark = [
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:All samples in the training dataset:UserWarning"),
]

RESID = "blocks.1.hook_resid_post"
SMALL: dict[str, Any] = {
    "train_batch_size_tokens": 64,
    "context_size": 128,
    "n_batches_in_buffer": 4,
    "store_batch_size_prompts": 2,
}


def make_runner(hooked: HookedMaira2, studies: Any, steps: int = 2, **more: Any) -> Any:
    sae = BatchTopKTrainingSAEConfig(d_in=64, d_sae=128, k=4)
    arguments = {"hook_name": "blocks.1.hook_out", "training_tokens": steps * 64, **SMALL, **more}
    return maira2_runner(hooked, studies, sae, **arguments)


def test_saelens_runner_trains_on_studies(
    hooked: HookedMaira2, studies: Any, encoding: Any, tmp_path: Path
) -> None:
    """200 steps through SAELens' own runner; the saved SAE loads in SAELens and keeps the error-term identity."""
    assert torch.is_grad_enabled()
    runner = make_runner(
        hooked, studies, steps=200, eval_studies=studies[:1], output_path=str(tmp_path / "out"), lr=3e-3
    )
    runner.run()
    assert torch.is_grad_enabled(), "the provider must not yield under no_grad"
    sae = SAE.load_from_disk(tmp_path / "out")
    metadata = sae.cfg.metadata
    assert metadata.hook_name == RESID
    assert metadata.model_name == "microsoft/maira-2"
    assert metadata.model_class_name == "HookedMaira2"
    assert "IMAGE" in metadata.token_roles
    assert "PAD" not in metadata.token_roles
    evaluator: Any = runner.evaluator
    metrics = evaluator(sae)
    assert metrics["maira2/explained_variance"] > 0.05
    hosts: list[Any] = [hooked]
    if has_transformer_bridge():
        from sae_lens_maira.hooks import to_bridge

        assert hooked.processor is not None
        hosts.append(to_bridge(hooked.model, hooked.processor))  # pyright: ignore[reportArgumentType]
    for host in hosts:
        with torch.no_grad():
            plain = host(encoding)
            difference = (host.run_with_saes(encoding, saes=sae, use_error_term=True) - plain).abs().max()
        assert difference <= 1e-5 * plain.abs().max()


def test_saelens_runner_trains_on_the_phantom_by_its_name(tmp_path: Path) -> None:
    """The name that the runner records is the name that loads the model; plain SAELens reads the SAE."""
    hooked = HookedMaira2.from_pretrained("phantom")
    sae = BatchTopKTrainingSAEConfig(d_in=128, d_sae=64, k=4)
    out = str(tmp_path / "out")
    runner = maira2_runner(hooked, generate_studies(4, seed=7), sae, RESID, 4 * 64, output_path=out, **SMALL)
    trained = runner.run()
    metadata = SAE.load_from_disk(out).cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("phantom", RESID)
    again = HookedMaira2.from_pretrained(metadata.model_name)
    study = generate_studies(1, seed=8)[0]
    with torch.no_grad():
        logits = again.run_with_saes(study, saes=trained, use_error_term=True)
        assert torch.allclose(logits, hooked(study), atol=1e-4)


@pytest.mark.parametrize("roles", ["image_only", "paper", TokenRole.REPORT])
def test_rows_are_the_values_at_the_wanted_roles(hooked: HookedMaira2, studies: Any, roles: Any) -> None:
    assert hooked.processor is not None
    cfg = make_runner(hooked, studies).cfg
    store = Maira2ActivationsStore.over(studies, hooked, cfg, RowSettings(roles=roles), shuffle_seed=None)
    rows, ids = store.get_raw_llm_batch()
    batch = hooked.processor.encode(studies[:2], report="teacher")
    mask = role_mask(batch, roles)
    _, cache = hooked.run_with_cache(batch, names_filter=RESID)
    torch.testing.assert_close(rows, cache[RESID][mask], rtol=1e-4, atol=1e-4)
    assert torch.equal(ids, batch.input_ids[mask])  # pyright: ignore[reportArgumentType]
    assert not rows.requires_grad


def test_an_epoch_is_every_study_once_in_a_new_order(hooked: HookedMaira2, studies: Any) -> None:
    cfg = make_runner(hooked, studies).cfg
    store = Maira2ActivationsStore.over(studies * 3, hooked, cfg, RowSettings(roles=[TokenRole.BOS]))
    rows = [len(store.get_raw_llm_batch(raise_on_epoch_end=True)[0]) for _ in range(5)]
    assert rows == [2, 2, 2, 2, 1]
    with pytest.raises(StopIteration, match="All 9 studies"):
        store.get_raw_llm_batch(raise_on_epoch_end=True)
    store.get_raw_llm_batch(raise_on_epoch_end=True)  # printed once, the next epoch runs


def test_a_store_goes_on_where_its_checkpoint_stood(
    hooked: HookedMaira2, studies: Any, tmp_path: Path
) -> None:
    cfg = make_runner(hooked, studies).cfg
    first = Maira2ActivationsStore.over(studies * 2, hooked, cfg)
    first.get_raw_llm_batch()
    first.save_to_checkpoint(tmp_path)
    expected = first.get_raw_llm_batch()[0]
    second = Maira2ActivationsStore.over(studies * 2, hooked, cfg)
    second.load_from_checkpoint(tmp_path)
    assert torch.equal(second.get_raw_llm_batch()[0], expected)


def test_encodings_and_vision_points_are_sources_too(hooked: HookedMaira2, encoding: Any) -> None:
    sae = BatchTopKTrainingSAEConfig(d_in=32, d_sae=64, k=4)
    name = "vision_encoder.blocks.2.hook_resid_post"
    runner = maira2_runner(hooked, [encoding], sae, name, 128, eval_studies=[encoding], **SMALL)
    trained = runner.run()
    assert trained.cfg.metadata.hook_name == name
    assert trained.cfg.metadata.token_roles is None
    rows, ids = runner.activations_store.get_raw_llm_batch()
    assert rows.shape == (6 * 17, 32)
    assert ids is None
    evaluator: Any = runner.evaluator
    assert set(evaluator(trained)) >= {"maira2/ce_loss_score", "maira2/l0"}


def test_heads_are_rows_of_their_own_width(hooked: HookedMaira2, encoding: Any) -> None:
    sae = BatchTopKTrainingSAEConfig(d_in=64, d_sae=64, k=4)
    runner = maira2_runner(hooked, [encoding], sae, "blocks.1.attn.hook_z", 64, **SMALL)
    assert runner.activations_store.get_raw_llm_batch()[0].shape[1] == 64


def assert_score(metrics: dict[str, float], expected: float) -> None:
    """The share of the loss recovered, or NaN where zeros do not raise this untrained model's loss."""
    score = metrics["maira2/ce_loss_score"]
    if metrics["maira2/ce_loss_with_ablation"] > metrics["maira2/ce_loss"]:
        assert score == pytest.approx(expected, abs=1e-3)
    else:
        assert math.isnan(score)


def test_the_evaluator_counts_what_it_says(hooked: HookedMaira2, encoding: Any) -> None:
    """A perfect SAE costs nothing; the clean loss is the model's own over report tokens."""
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128))
    with torch.no_grad():
        eye = torch.eye(64)
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye], dim=0))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.cfg.metadata.hook_name = "blocks.1.hook_out"
    metrics = Maira2Evaluator(hooked, [encoding])(sae)
    with torch.no_grad():
        loss = hooked(encoding, return_type="loss", loss_roles="generated_only")
    assert metrics["maira2/ce_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["maira2/ce_loss_with_sae"] == pytest.approx(float(loss), rel=1e-4)
    assert metrics["maira2/kl_div_with_sae"] == pytest.approx(0, abs=1e-5)
    assert metrics["maira2/explained_variance"] == pytest.approx(1, abs=1e-6)
    assert metrics["maira2/l0"] == pytest.approx(64, abs=0.5)
    assert_score(metrics, 1)


def test_only_the_wanted_roles_are_replaced(hooked: HookedMaira2, encoding: Any) -> None:
    """An SAE of zeros on images alone is the ablation on images alone, and not that on everything."""
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=64))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
    sae.cfg.metadata.hook_name = RESID
    images = Maira2Evaluator(hooked, [encoding], roles="image_only")(sae)
    everything = Maira2Evaluator(hooked, [encoding], roles="all")(sae)
    for metrics in (images, everything):
        assert metrics["maira2/ce_loss_with_sae"] == pytest.approx(
            metrics["maira2/ce_loss_with_ablation"], rel=1e-5
        )
        assert_score(metrics, 0)
    assert images["maira2/ce_loss_with_sae"] != pytest.approx(everything["maira2/ce_loss_with_sae"], rel=1e-3)


def test_what_cannot_be_meant_is_refused(hooked: HookedMaira2, studies: Any, prompt: Any) -> None:
    cfg = make_runner(hooked, studies).cfg
    with pytest.raises(HookError, match="no studies"):
        Maira2ActivationsStore.over([], hooked, cfg)
    with pytest.raises(HookError, match="Unknown hook point"):
        make_runner(hooked, studies, hook_name="blocks.1.resid")
    with pytest.raises(HookError, match="Set d_in=32"):
        make_runner(hooked, studies, hook_name="vision_encoder.hook_out")
    with pytest.raises(HookError, match="No position of any study"):
        Maira2ActivationsStore.over(
            [prompt], hooked, cfg, RowSettings(roles=[TokenRole.REPORT])
        ).get_raw_llm_batch()
    with pytest.raises(HookError, match="no encodings"):
        Maira2Evaluator(hooked, [])
    store = Maira2ActivationsStore.over(studies, hooked, cfg)
    with pytest.raises(HookError, match="without images"):
        store.get_batch_tokens(2)


def test_prefetching_and_normalisation(hooked: HookedMaira2, studies: Any) -> None:
    """Rows made in another thread, evaluated between, with the norm estimated from the same store."""
    sae_config = BatchTopKTrainingSAEConfig(
        d_in=64, d_sae=128, k=4, normalize_activations="expected_average_only_in"
    )
    runner = maira2_runner(
        hooked,
        studies,
        sae_config,
        RESID,
        training_tokens=20 * 64,
        eval_studies=studies[:1],
        prefetch_llm_batches=True,
        n_batches_for_norm_estimate=3,
        **SMALL,
    )
    before = hooked(studies[0])
    trained = runner.run()
    evaluator: Any = runner.evaluator
    provider = PrefetchingIterator(iter(runner.activations_store))
    try:
        assert next(provider).shape == (64, 64)
        assert evaluator(trained, provider) == evaluator(trained)
    finally:
        provider.close()
    assert trained.cfg.metadata.hook_name == RESID
    assert torch.equal(hooked(studies[0]), before)
    assert not any(live.active for live in hooked.live.values())


def test_saelens_proxy_cannot_drop_the_images(tiny: Any, prompt: Any) -> None:
    """HookedProxyLM silently drops pixel_values; the model itself refuses to run without them."""
    from sae_lens.load_model import HookedProxyLM

    proxy = HookedProxyLM(tiny.model, tiny.processor.tokenizer, hook_names=["model.language_model.layers.1"])
    try:
        with pytest.raises(PromptError, match="no pixel_values"):
            proxy(prompt.input_ids, pixel_values=prompt.pixel_values)
    finally:
        for module in tiny.model.modules():
            for key in [k for k, f in module._forward_hooks.items() if "get_hook_fn" in repr(f)]:
                del module._forward_hooks[key]


def test_saelens_own_evaluation_runs_on_text(hooked: HookedMaira2) -> None:
    """run_evals takes the hooked model as it takes its own, for text alone."""
    from datasets import Dataset
    from sae_lens import ActivationsStore, LanguageModelSAERunnerConfig, LoggingConfig
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    dataset = Dataset.from_list([{"tokens": torch.randint(3, 300, (16,)).tolist()} for _ in range(16)])
    cfg = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(d_in=64, d_sae=128, k=4),
        model_class_name="HookedMaira2",
        hook_name=RESID,
        context_size=16,
        training_tokens=8,
        prepend_bos=False,
        store_batch_size_prompts=2,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    store = ActivationsStore.from_config(hooked, cfg, override_dataset=dataset)
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128))
    sae.cfg.metadata.hook_name = RESID
    metrics, _ = run_evals(
        sae,
        store,
        hooked,
        ActivationScaler(),
        get_eval_everything_config(2, 1, 1),
        exclude_special_tokens=False,
    )
    assert "model_performance_preservation" in metrics

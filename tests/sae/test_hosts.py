"""The SAEs inside SAELens' hosts: hooked models with and without error terms, and the training runner."""

import importlib.util

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, HookedSAETransformer, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_maira.sae import MatryoshkaTrainingSAE, load_matryoshka

pytestmark = pytest.mark.compat

HOOK = "blocks.0.hook_resid_post"
TOKENS = torch.arange(14).reshape(2, 7)


@pytest.fixture
def tiny_config():
    return HookedTransformerConfig(
        n_layers=2, d_model=12, n_ctx=16, d_head=6, n_heads=2, d_vocab=20, act_fn="gelu", device="cpu", seed=0
    )


@pytest.fixture
def sae(make_config, make_trainer):
    training = MatryoshkaTrainingSAE(make_config(metadata=SAEMetadata(model_name="tiny", hook_name=HOOK)))
    make_trainer(training, steps=20).fit()
    return load_matryoshka(training)


def check_host(model, sae, hook):
    """With the error term logits stay equal; without it they are those of a model whose stream was replaced."""
    clean = model(TOKENS)
    parts = [sae.truncate(0), sae]
    # Hooks run before any SAE is attached: SAELens' bridge does not fire them at a point an SAE has left.
    replaced = [model.run_with_hooks(TOKENS, fwd_hooks=[(hook, lambda h, hook, p=p: p(h))]) for p in parts]
    for part, expected in zip(parts, replaced, strict=True):
        with_error = model.run_with_saes(TOKENS, saes=[part], use_error_term=True)
        torch.testing.assert_close(with_error, clean, rtol=1e-4, atol=1e-5)
        got = model.run_with_saes(TOKENS, saes=[part], use_error_term=False)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert (got - clean).abs().max() > 1e-2
    torch.testing.assert_close(model(TOKENS), clean)


def test_hooked_sae_transformer(tiny_config, sae):
    model = HookedSAETransformer(tiny_config)
    check_host(model, sae, HOOK)
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=True)
    _, clean = model.run_with_cache(TOKENS)
    torch.testing.assert_close(cache[f"{HOOK}.hook_sae_acts_post"], sae.encode(clean[HOOK]))


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_lens.model_bridge") is None,
    reason="TransformerLens 2 has no bridge",
)
def test_sae_transformer_bridge(sae):
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=12, n_head=2, n_positions=16, vocab_size=20)).eval()
    bridge = build_bridge_from_module(gpt2, "GPT2LMHeadModel", hf_config=gpt2.config)
    bridge.__class__ = SAETransformerBridge
    for name in ("_acts_to_saes", "_transcoder_output_hooks"):
        object.__setattr__(bridge, name, {})
    check_host(bridge, sae, "blocks.0.hook_out")


@pytest.mark.parametrize("convention", ["saelens", "dictionary_learning"])
def test_saelens_runner_trains_and_saves(convention, tiny_config, make_config, tmp_path):
    """SAELens' runner rebuilds our SAE from the configuration's dictionary, trains it and saves a JumpReLU SAE."""
    rows = torch.randint(0, 20, (64, 16), generator=torch.Generator().manual_seed(0)).tolist()
    config = LanguageModelSAERunnerConfig(
        sae=make_config(
            loss_convention=convention,
            threshold_start_step=2,
            matryoshka_widths=[],
            group_fractions=[0.25, 0.75],
        ),
        model_name="tiny",
        hook_name=HOOK,
        dataset_path="none",
        is_dataset_tokenized=True,
        context_size=16,
        prepend_bos=False,
        training_tokens=640,
        train_batch_size_tokens=64,
        n_batches_in_buffer=4,
        store_batch_size_prompts=4,
        output_path=str(tmp_path),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        device="cpu",
    )
    runner = LanguageModelSAETrainingRunner(
        config,
        override_dataset=Dataset.from_dict({"input_ids": rows}),
        override_model=HookedTransformer(tiny_config),
    )
    assert isinstance(runner.sae, MatryoshkaTrainingSAE)
    trained = runner.run()
    loaded = load_matryoshka(SAE.load_from_disk(tmp_path))
    assert loaded.level_widths == (12, 48)
    assert loaded.cfg.metadata.hook_name == HOOK
    assert loaded.cfg.metadata.model_name == "tiny"
    rows = torch.randn(5, 12)
    assert torch.equal(loaded.encode(rows), load_matryoshka(trained).encode(rows))

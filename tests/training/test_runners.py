"""SAELens' runners use the fused trainer inside `fused_training()` and give the same SAE as without it."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    llm_sae_training_runner,
)
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.training import multi_sae_trainer, sae_trainer
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.prefetch import PrefetchingIterator
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_maira.checksums import SUMS
from sae_lens_maira.errors import BackendError
from sae_lens_maira.training import (
    FusedLanguageModelSAETrainingRunner,
    FusedSAETrainer,
    fused_training,
)
from sae_lens_maira.training.checkpoints import PROVIDER_FILENAME, RUN_FILENAME

CONTEXT, VOCABULARY = 16, 50


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=16,
        n_ctx=CONTEXT,
        d_head=8,
        n_heads=2,
        d_vocab=VOCABULARY,
        act_fn="relu",
        device="cpu",
    )
    return HookedTransformer(cfg)


def run(cls: type[LanguageModelSAETrainingRunner], model: HookedTransformer, checkpoints: Any) -> Any:
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (400, CONTEXT), generator=torch.Generator().manual_seed(0))
    cfg = LanguageModelSAERunnerConfig(
        sae=MatryoshkaBatchTopKTrainingSAEConfig(d_in=16, d_sae=64, k=4, matryoshka_widths=[8, 64]),
        model_name="tiny",
        hook_name="blocks.0.hook_resid_post",
        dataset_path="none",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=CONTEXT,
        training_tokens=2048,
        train_batch_size_tokens=128,
        store_batch_size_prompts=8,
        n_batches_in_buffer=16,
        n_checkpoints=1,
        checkpoint_path=str(checkpoints),
        output_path=str(checkpoints / "output"),
        save_final_checkpoint=True,
        exclude_special_tokens=False,
        logger=LoggingConfig(log_to_wandb=False),
        device="cpu",
        seed=0,
    )
    data = Dataset.from_dict({"tokens": tokens.tolist()})
    return cls(cfg, override_dataset=data, override_model=model).run()


def test_the_runner_subclass_equals_the_runner(model, tmp_path):
    dense = run(LanguageModelSAETrainingRunner, model, tmp_path / "dense")
    fused = run(FusedLanguageModelSAETrainingRunner, model, tmp_path / "fused")
    assert fused._state_dict_hooks  # the fused trainer leaves this mark
    assert not dense._state_dict_hooks
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    written = []
    for kind in ("dense", "fused"):
        names = {path.name for path in (tmp_path / kind).rglob("*.*")}
        written.append(names - {RUN_FILENAME, SUMS, PROVIDER_FILENAME})
    assert written[0] == written[1]
    assert "trainer_state.pt" in written[0]


def test_the_name_is_put_back(make_sae, make_config):
    def fail_inside() -> None:
        with fused_training(candidates="bf16"):
            made = llm_sae_training_runner.SAETrainer(
                make_config(1), make_sae("saelens"), data_provider=iter(())
            )
            assert isinstance(made, FusedSAETrainer)
            assert made.candidates == "bf16"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert llm_sae_training_runner.SAETrainer is sae_trainer.SAETrainer
    assert multi_sae_trainer.SAETrainer is sae_trainer.SAETrainer


def test_several_saes_train_fused_in_lockstep(make_sae, make_config, planted_data, tmp_path):
    saes = {name: make_sae(name) for name in ("batchtopk", "saelens")}
    data = planted_data(24, 64)
    batches = ({"here": batch} for batch in data)
    with fused_training():
        trainer = MultiSAETrainer(make_config(4), saes, dict.fromkeys(saes, "here"), batches)
        done = trainer.fit()
    assert set(done) == set(saes)
    for name, sae in done.items():
        assert isinstance(trainer.trainers[name], FusedSAETrainer)
        sae.save_inference_model(tmp_path / name)


def test_a_sae_lens_without_the_name_is_noticed(monkeypatch):
    monkeypatch.delattr(multi_sae_trainer, "SAETrainer")
    with pytest.raises(BackendError, match="multi_sae_trainer no longer names SAETrainer"), fused_training():
        pass


def test_a_runner_over_ranks_trains_on_shares(one_rank, model, tmp_path):
    dense = run(LanguageModelSAETrainingRunner, model, tmp_path / "dense")
    with fused_training(comm=one_rank):
        shared = run(LanguageModelSAETrainingRunner, model, tmp_path / "shared")
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_prefetching_over_ranks_is_refused(one_rank, make_sae, make_config, planted_data):
    data = PrefetchingIterator(planted_data(24, 64))
    try:
        with fused_training(comm=one_rank), pytest.raises(BackendError, match="prefetch_llm_batches=False"):
            llm_sae_training_runner.SAETrainer(make_config(1), make_sae("saelens"), data_provider=data)
    finally:
        data.close()


@pytest.mark.parametrize("kind", ["expected_average_only_in", "covariance_whitening"])
def test_scaling_of_one_rank_is_that_of_saelens(kind, one_rank, make_sae, make_config, planted_data):
    """The sums over ranks end in the weights that SAELens' own estimate ends in."""
    cfg = make_config(4, n_batches_for_norm_estimate=2)
    alone = FusedSAETrainer(cfg, make_sae("saelens", normalize_activations=kind), planted_data(24, 64)).fit()
    sae = make_sae("saelens", normalize_activations=kind)
    shared = FusedSAETrainer(cfg, sae, planted_data(24, 64), comm=one_rank).fit()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], tensor, msg=name)

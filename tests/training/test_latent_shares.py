"""An SAE divided over ranks: what is refused, saved and put together again; with two ranks in test_distributed.py."""

import pytest
import torch

from sae_lens_maira.errors import BackendError, SAEError
from sae_lens_maira.training import FusedSAETrainer

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("kind", ["batchtopk", "saelens", "ours", "dictionary_learning"])
def test_one_rank_has_the_whole(kind, one_rank, make_sae, make_config, planted_data):
    """Every class; the SAE is divided during the training and whole after it."""
    cfg = make_config(8, dead_feature_window=3)
    expected = FusedSAETrainer(cfg, make_sae(kind), planted_data(24, 64)).fit().state_dict()
    sae = make_sae(kind)
    trainer = FusedSAETrainer(cfg, sae, planted_data(24, 64), comm=one_rank, shard_latents=True)
    with pytest.raises(SAEError, match="latents of rank 0 of 1 only"):
        sae.state_dict()
    trained = trainer.fit()
    assert trained is sae
    assert isinstance(sae.W_enc, torch.nn.Parameter)
    for name, tensor in expected.items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_logged_l0_is_that_of_all_ranks(make_sae, make_config, planted_data):
    trainer = FusedSAETrainer(make_config(2), make_sae("ours"), planted_data(24, 64))
    output = trainer.step(next(trainer.data_provider))
    alone = trainer.build_train_step_log_dict(output, 64)["metrics/l0"]
    trainer.comm.size = 2
    trainer._tokens, trainer._fired = (
        128,
        3 * trainer._fired,
    )  # the other rank: as many rows, twice the activations
    assert trainer.build_train_step_log_dict(output, 64)["metrics/l0"] == pytest.approx(1.5 * alone)


def test_a_softly_frozen_decoder_is_divided_with_its_first_directions(
    one_rank, make_sae, make_config, planted_data
):
    cfg = make_config(8, lr=3e-2)
    shared = {"control": "soft_frozen_decoder"}
    expected = FusedSAETrainer(cfg, make_sae("ours", **shared), planted_data(24, 64)).fit().state_dict()
    ours = FusedSAETrainer(
        cfg, make_sae("ours", **shared), planted_data(24, 64), comm=one_rank, shard_latents=True
    )
    for name, tensor in ours.fit().state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_what_cannot_be_divided_is_refused_with_every_reason(one_rank, make_sae, make_config, planted_data):
    sae = make_sae("saelens", normalize_activations="none")
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts)
    with pytest.raises(BackendError) as refused:
        FusedSAETrainer(
            make_config(1),
            sae,
            planted_data(24, 64),
            evaluator=lambda *_: {},
            backend="reference",
            comm=one_rank,
            shard_optimizer=True,
            shard_latents=True,
        )
    for reason in ("shard_optimizer is set too", '"reference"', "an evaluator", "hooks are attached"):
        assert reason in str(refused.value)
    assert sae.W_enc.shape == (24, 64)  # nothing was changed


def test_graphs_of_divided_latents_are_left_out_with_a_reason(one_rank, make_sae, make_config, planted_data):
    with pytest.warns(UserWarning, match="Steps run without CUDA graphs"):
        FusedSAETrainer(
            make_config(1),
            make_sae("ours"),
            planted_data(24, 64),
            comm=one_rank,
            shard_latents=True,
            cuda_graph=True,
        )

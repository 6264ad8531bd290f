"""A checkpoint holds where the data provider stood: a resumed run ends bit-equal to one that was never stopped."""

import json
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training._interruption import InterruptedException

from sae_lens_maira.activations import ActivationStore, StoreProvider, StoreSpec
from sae_lens_maira.errors import StoreError
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_maira.training import FusedSAETrainer, latest_checkpoint, resume
from sae_lens_maira.training.checkpoints import PROVIDER_FILENAME

pytestmark = pytest.mark.compat

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three shards of 1,000 rows of 16 numbers."""
    spec = StoreSpec(
        hooks={HOOK: 16},
        dtype="float32",
        shard_studies=1,
        n_studies=3,
        rates={},
        settings={},
        model="",
        processor="",
        versions={},
    )
    made = ActivationStore.create(tmp_path_factory.mktemp("made"), spec, ["a", "b", "c"])
    for shard in range(3):
        numbers = np.arange(1000)
        columns = dict.fromkeys(
            ("study", "position", "token", "view", "patch_row", "patch_col", "source"), numbers
        )
        index = pd.DataFrame(columns | {"role": np.full(1000, 10, np.int8)})
        made.commit(
            shard, {HOOK: torch.randn(1000, 16, generator=torch.Generator().manual_seed(shard))}, index
        )
    return ActivationStore(made.folder)


class StopsAt:
    """A store's provider that sends SIGTERM to its own process while drawing one of its batches."""

    def __init__(self, provider, batch):
        self.provider, self.left = provider, batch

    def __iter__(self):
        return self

    def __next__(self):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)
        return next(self.provider)

    def state_dict(self):
        return self.provider.state_dict()

    def load_state_dict(self, state):
        self.provider.load_state_dict(state)


def trainer(store, checkpoints, stop_at=0, seed=5):
    torch.manual_seed(0)
    sae = MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(
            d_in=16,
            d_sae=32,
            k=4,
            matryoshka_widths=[8, 32],
            device="cpu",
            normalize_activations="expected_average_only_in",
        )
    )
    cfg = SAETrainerConfig(
        total_training_samples=70 * 64,
        train_batch_size_samples=64,
        device="cpu",
        lr=1e-3,
        lr_end=0.0,
        lr_scheduler_name="constant",
        lr_warm_up_steps=5,
        lr_decay_steps=10,
        n_checkpoints=2,
        checkpoint_path=str(checkpoints),
        n_batches_for_norm_estimate=7,
        logger=LoggingConfig(log_to_wandb=False),
    )
    provider = StoreProvider(store, HOOK, 64, seed=seed, buffer_rows=1000)
    return FusedSAETrainer(
        cfg=cfg, sae=sae, data_provider=StopsAt(provider, stop_at) if stop_at else provider
    )


def same_weights(one, other):
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_resumed_run_ends_as_one_that_was_not_stopped(store, tmp_path):
    """From the last checkpoint of a run, in the middle of an epoch (70 batches over epochs of 46.9)."""
    whole = trainer(store, tmp_path / "whole")
    whole.fit()
    checkpoint = latest_checkpoint(tmp_path / "whole")
    assert checkpoint is not None
    place = json.loads((checkpoint / PROVIDER_FILENAME).read_text())
    assert place["offset"] > 0
    again = trainer(store, tmp_path / "again")
    resume(again, checkpoint)
    again.fit()
    same_weights(whole.sae, again.sae)


def test_an_interrupted_step_draws_its_batch_again(store, tmp_path):
    """SIGTERM while a step is under way: its batch was drawn but not used, and the resumed run uses it."""
    whole = trainer(store, tmp_path / "whole")
    whole.fit()
    with pytest.raises((InterruptedException, KeyboardInterrupt)):
        trainer(store, tmp_path / "stopped", stop_at=40).fit()
    checkpoint = latest_checkpoint(tmp_path / "stopped")
    assert checkpoint is not None
    assert checkpoint.name == str((40 - 7 - 1) * 64)  # seven batches went into the norm
    again = trainer(store, tmp_path / "again")
    resume(again, checkpoint)
    again.fit()
    same_weights(whole.sae, again.sae)


def test_another_shuffle_is_refused(store, tmp_path):
    """A checkpoint's place means nothing to a provider with another seed, and that is said."""
    trainer(store, tmp_path / "whole").fit()
    checkpoint = latest_checkpoint(tmp_path / "whole")
    assert checkpoint is not None
    with pytest.raises(StoreError, match="seed is 5 there and 6 here"):
        resume(trainer(store, tmp_path / "other", seed=6), checkpoint)

"""The provider: every row once an epoch, the same again from its seed or state, a mixture, SAELens' trainer."""

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.activations import ActivationStore, StoreProvider, StoreSpec
from sae_lens_maira.activations.mixing import Mixing
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import TokenRole

pytestmark = pytest.mark.compat

HOOK = "blocks.0.hook_resid_post"
ROWS = (9000, 0, 5000, 70)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Shards of 9,000, no, 5,000 and 70 rows whose first number is the row's own; every third row is an image's."""
    spec = StoreSpec(
        hooks={HOOK: 8},
        dtype="float32",
        shard_studies=1,
        n_studies=len(ROWS),
        rates={},
        settings={},
        model="",
        processor="",
        versions={},
    )
    made = ActivationStore.create(tmp_path_factory.mktemp("made"), spec, [f"s{i}" for i in range(len(ROWS))])
    first = 0
    for shard, rows in enumerate(ROWS):
        number = np.arange(first, first + rows)
        values = torch.randn(rows, 8, generator=torch.Generator().manual_seed(shard))
        values[:, 0] = torch.from_numpy(number).float()
        index = pd.DataFrame(
            {
                "study": np.full(rows, shard),
                "position": number,
                "role": np.where(number % 3, TokenRole.REPORT, TokenRole.IMAGE).astype(np.int8),
                **dict.fromkeys(("token", "view", "patch_row", "patch_col", "source"), number),
            }
        )
        made.commit(shard, {HOOK: values}, index)
        first += rows
    return ActivationStore(made.folder)


def numbers(provider, batches):
    return torch.cat([next(provider)[:, 0] for _ in range(batches)]).long()


def test_every_row_once_an_epoch(store):
    """Batches that divide nothing, buffers smaller than the store: two epochs use each row exactly twice."""
    total = sum(ROWS)
    provider = StoreProvider(store, HOOK, batch_size=67, buffer_rows=5000)
    seen = numbers(provider, -(-2 * total // 67))
    for epoch in range(2):
        assert torch.equal(seen[epoch * total : (epoch + 1) * total].sort().values, torch.arange(total))
    assert not torch.equal(seen[:total], seen[total : 2 * total])
    assert provider.epoch == 2


def test_threads_change_nothing(store):
    """One thread or four, buffers of one segment or of all: the same batches where the buffers are the same."""
    for buffer_rows in (1024, 100_000):
        one = StoreProvider(store, HOOK, 67, seed=3, buffer_rows=buffer_rows, workers=1, rates={"image": 0.5})
        many = StoreProvider(
            store, HOOK, 67, seed=3, buffer_rows=buffer_rows, workers=4, rates={"image": 0.5}
        )
        for _ in range(400):
            assert torch.equal(next(one), next(many))


def test_shares_of_ranks_are_the_batch_of_one_process(store, monkeypatch):
    """Three ranks yield the same rows in all, batch by batch; each reads its own segments only."""
    read: list[tuple[int, int]] = []
    plain = ActivationStore.read_into

    def counted(self, place, hook, shard, start):
        read.append((shard, start))
        plain(self, place, hook, shard, start)

    whole = StoreProvider(store, HOOK, 67, seed=3, buffer_rows=13_000, rates={"image": 0.5})
    batches = [next(whole) for _ in range(300)]
    monkeypatch.setattr(ActivationStore, "read_into", counted)
    shares = [
        StoreProvider(store, HOOK, 67, seed=3, buffer_rows=13_000, rates={"image": 0.5}, rank=r, world_size=3)
        for r in range(3)
    ]
    for batch in batches:
        together = torch.cat([next(share) for share in shares])
        assert torch.equal(together[together[:, 0].argsort()], batch[batch[:, 0].argsort()])
    assert shares[1].state_dict() == whole.state_dict()
    read.clear()
    alone = StoreProvider(store, HOOK, 67, buffer_rows=100_000, rank=1, world_size=3)
    next(alone)
    alone._pool.shutdown()
    assert 0 < len(read) <= 10  # of 15 segments, five in this buffer and five in the next


def test_a_thread_that_works_ahead_changes_nothing(store):
    """Batches and states are those without the thread; loading a state drops what was prepared."""
    plain, ahead = (StoreProvider(store, HOOK, 67, seed=3, buffer_rows=5000, ahead=n) for n in (0, 3))
    states, batches = [], []
    for _ in range(150):
        states.append(ahead.state_dict())
        assert states[-1] == plain.state_dict()
        batches.append(next(ahead))
        assert torch.equal(batches[-1], next(plain))
    ahead.load_state_dict(states[40])
    assert torch.equal(next(ahead), batches[40])
    assert ahead.state_dict() == states[41]
    assert ahead.epoch == states[41]["epoch"]


def test_mixing_counts_studies_per_batch(store):
    """The ideal is what a buffer of all rows gives, with unequal studies and one role thinned."""
    provider = StoreProvider(store, HOOK, 512, buffer_rows=100_000, rates={"image": 0.2})
    edges = np.cumsum(ROWS)
    squares = []
    for _ in range(19):  # one buffer
        study = np.searchsorted(edges, next(provider)[:, 0].numpy(), side="right")
        squares.append(((np.bincount(study, minlength=len(ROWS)) / 512) ** 2).sum())
    assert provider.mixing.ideal == pytest.approx(1 / np.mean(squares), rel=0.02)
    assert provider.mixing.effective(4) < provider.mixing.effective(15) == provider.mixing.ideal


def test_the_default_buffer_mixes_enough_or_takes_a_quarter_of_the_free_memory():
    """Stores of 200,000 studies at 4,096 numbers per row: `paper` with 512 studies per shard, all tokens with 41."""
    row, free = 2 * 4096, 64e9
    for rows_per_study, per_shard, share, most in ((237, 512, 0.92, 1.6e9), (2938, 41, 0.9, 16e9)):
        mixing = Mixing(4096, 200_000 * rows_per_study // 1024, 1 / per_shard, 1 / 200_000)
        segments = mixing.default_segments(1024 * row, free)
        assert mixing.effective(segments) >= share * mixing.ideal
        assert 2 * segments * 1024 * row <= most
        poor = mixing.default_segments(1024 * row, 8e9)  # two buffers of 1 GB
        assert 2 * poor * 1024 * row <= 2e9
        assert mixing.effective(poor) >= 0.5 * mixing.ideal


def test_a_provider_that_chose_its_buffer_takes_the_size_of_the_state(store):
    """Free memory differs between machines; the batches of a continued run do not."""
    one = StoreProvider(store, HOOK, 67, seed=3, buffer_rows=2048)
    for _ in range(50):
        next(one)
    other = StoreProvider(store, HOOK, 67, seed=3, ahead=2)
    assert other.buffer_rows == 15 * 1024
    next(other)
    other.load_state_dict(one.state_dict())
    for _ in range(100):
        assert torch.equal(next(one), next(other))
    with pytest.raises(StoreError, match="Give all of them the same buffer_rows"):
        StoreProvider(store, HOOK, 67, rank=0, world_size=2)


def test_batches_are_the_callers_own(store):
    """A batch keeps its rows when later ones are drawn, though buffers are used again."""
    provider = StoreProvider(store, HOOK, 512, buffer_rows=1024)
    first = next(provider)
    copy = first.clone()
    for _ in range(40):
        next(provider)
    assert torch.equal(first, copy)


def test_a_state_from_elsewhere_drops_what_was_read_ahead(store):
    """Going back to the start of an epoch in the middle of another gives that epoch's first batches."""
    provider = StoreProvider(store, HOOK, 67, buffer_rows=1024)
    start = provider.state_dict()
    first = [next(provider) for _ in range(3)]
    for _ in range(150):
        next(provider)
    provider.load_state_dict(start)
    for batch in first:
        assert torch.equal(next(provider), batch)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"workers": 0}])
def test_sizes_below_one_are_refused(store, wrong):
    with pytest.raises(StoreError, match="at least 1"):
        StoreProvider(store, HOOK, **({"batch_size": 8} | wrong))


def test_shards_are_mixed(store):
    """Within one buffer rows of two shards meet in one batch."""
    batch = numbers(StoreProvider(store, HOOK, batch_size=512), 1)
    assert (batch < 9000).any()
    assert (batch >= 9000).any()


@pytest.mark.parametrize("taken", [0, 3, 40, 215])
def test_state_continues_in_the_middle(store, taken):
    """A provider that loads the state of another yields exactly what that one would have yielded next."""
    one = StoreProvider(store, HOOK, 67, seed=3, buffer_rows=5000, rates={"image": 0.5})
    for _ in range(taken):
        next(one)
    other = StoreProvider(store, HOOK, 67, seed=3, buffer_rows=5000, rates={"image": 0.5})
    other.load_state_dict(one.state_dict())
    for _ in range(100):
        assert torch.equal(next(one), next(other))


def test_state_of_another_provider_is_refused(store):
    state = StoreProvider(store, HOOK, 67, seed=3).state_dict()
    with pytest.raises(StoreError, match="other batches"):
        StoreProvider(store, HOOK, 67, seed=4).load_state_dict(state)


def test_mixture_thins_one_role(store):
    """A tenth of the image rows an epoch, another tenth the next; all report rows each time."""
    provider = StoreProvider(store, HOOK, 10, rates={"image": 0.1})
    report = sum(ROWS) * 2 // 3
    epochs = []
    for epoch in range(2):
        rows = []
        while provider.epoch == epoch:
            rows.append(numbers(provider, 1))
        epochs.append(torch.cat(rows))
    for seen in epochs:
        assert abs(int((seen % 3 != 0).sum()) - report) <= 10
        assert 0.07 < int((seen % 3 == 0).sum()) / (sum(ROWS) / 3) < 0.13
    images = [set(seen[seen % 3 == 0].tolist()) for seen in epochs]
    assert len(images[0] & images[1]) < len(images[0]) / 2


def test_nothing_of_the_wanted_role(store):
    with pytest.raises(StoreError, match=r"image 4,690, report 9,380"):
        StoreProvider(store, HOOK, 10, roles=["phrase"])


def test_saelens_trainer_takes_it(store):
    """SAELens' own trainer runs on the provider and the loss stays finite."""
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=8, d_sae=16, k=2, device="cpu"))
    cfg = SAETrainerConfig(
        total_training_samples=640,
        train_batch_size_samples=64,
        device="cpu",
        lr=1e-3,
        lr_end=1e-3,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        logger=LoggingConfig(log_to_wandb=False),
    )
    provider = StoreProvider(store, HOOK, 64)
    SAETrainer(cfg=cfg, sae=sae, data_provider=provider).fit()
    assert all(torch.isfinite(p).all() for p in sae.parameters())

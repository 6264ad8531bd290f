"""Training straight from the model: the harvest's rows, SAELens' buffer, the same again from the same seed."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig

from sae_lens_maira.activations import DirectProvider, RowSettings, harvest
from sae_lens_maira.errors import StoreError
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_maira.training import FusedSAETrainer

pytestmark = pytest.mark.compat

HOOK = "blocks.1.hook_resid_post"
SETTINGS = RowSettings(roles="paper", rates={"image": 0.1}, batch_size=4)


@pytest.fixture(scope="module")
def studies():
    return generate_studies(12, seed=31)


def provider(phantom, studies, **more):
    given = {"settings": SETTINGS, "buffer_rows": 400, "group": 5} | more
    return DirectProvider(phantom, studies, HOOK, 64, **given)


def test_rows_are_those_of_the_harvest(phantom, studies, tmp_path):
    """Each row drawn is a row of the store with the same filter, none more often than there were epochs."""
    store = harvest(
        phantom,
        studies,
        tmp_path,
        [HOOK],
        SETTINGS,
        dtype="float32",
        progress=False,
    )
    rows = store.read(HOOK, 0)
    batches = provider(phantom, studies)
    drawn = torch.cat([next(batches) for _ in range(len(rows) // 64 + 4)])
    distance, number = torch.cdist(drawn, rows, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert float(distance.max()) < 1e-3
    assert int(number.bincount().max()) <= -(-batches.state_dict()["group"] // 3)
    assert len(number.unique()) > len(rows) // 2


def test_the_seed_decides_and_nobody_elses_numbers_change(phantom, studies):
    """Equal seeds give equal batches whatever torch's generator and the threads do, and leave the generator alone."""
    one, two, other = (
        provider(phantom, studies, seed=seed, workers=workers) for seed, workers in ((3, 0), (3, 2), (4, 1))
    )
    torch.manual_seed(1)
    first = [next(one) for _ in range(8)]
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(99)
    assert all(torch.equal(batch, next(two)) for batch in first)
    assert not torch.equal(first[0], next(other))


def test_a_state_goes_on_with_the_next_studies(phantom, studies):
    """Two providers given one state draw the same; the state of other settings is refused."""
    one = provider(phantom, studies)
    for _ in range(6):
        next(one)
    state = one.state_dict()
    assert state["group"] > 0
    two, three = provider(phantom, studies), provider(phantom, studies)
    two.load_state_dict(state)
    three.load_state_dict(state)
    for _ in range(4):
        assert torch.equal(next(two), next(three))
    with pytest.raises(StoreError, match="seed is 0 there and 1 here"):
        provider(phantom, studies, seed=1).load_state_dict(state)


def test_nothing_to_keep_and_too_small_a_buffer_are_errors(phantom, studies):
    with pytest.raises(StoreError, match="nothing to train on"):
        next(provider(phantom, studies, settings=RowSettings(roles=["phrase"])))
    with pytest.raises(StoreError, match="must hold a batch"):
        provider(phantom, studies, buffer_rows=63)


def test_the_fused_trainer_takes_it(phantom, studies, tmp_path):
    """A few steps from the model give an SAE that plain SAELens loads; gradients are on although rows have none."""
    sae = MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(d_in=128, d_sae=64, k=4, matryoshka_widths=[16, 64], device="cpu")
    )
    before = sae.W_dec.detach().clone()
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
    FusedSAETrainer(cfg=cfg, sae=sae, data_provider=provider(phantom, studies)).fit()
    assert not torch.equal(sae.W_dec, before)
    sae.save_inference_model(tmp_path)
    assert SAE.load_from_disk(tmp_path).cfg.d_in == 128

"""One seed keeps the same rows wherever studies are read: in memory, on disk, straight from the model, in SAELens."""

import numpy as np
import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig

from sae_lens_maira.activations import DirectProvider, RowSettings, harvest, joined, read_rows
from sae_lens_maira.hooks import HookedMaira2, Maira2ActivationsStore
from sae_lens_maira.latents.source import ModelSource, StoreSource
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.quickstart import QuickstartConfig
from sae_lens_maira.quickstart.run import stored_rows

pytestmark = pytest.mark.compat
HOOK = "blocks.3.hook_resid_post"
SAMPLED = RowSettings(rates={"image": 0.25}, batch_size=1, seed=7)


@pytest.fixture(scope="module")
def studies():
    return generate_studies(6, seed=55)


@pytest.fixture(scope="module")
def wanted(phantom, studies):
    return read_rows(phantom, studies, HOOK, SAMPLED, progress=False)


def ordered(values: torch.Tensor) -> torch.Tensor:
    """Rows in an order of their own, so that collections of rows can be compared."""
    return values[torch.from_numpy(np.lexsort(values.numpy().T[:8]))]


def test_a_store_holds_the_rows_that_are_read_into_memory(phantom, studies, wanted, tmp_path):
    """Values, studies, positions, tokens and patches, bit for bit."""
    store = harvest(
        phantom, studies, tmp_path, [HOOK], SAMPLED, dtype="float32", shard_studies=4, progress=False
    )
    found = joined(list(store.blocks(HOOK)))
    assert torch.equal(found.values, wanted.values)
    for name in ("study", "position", "role", "token", "view", "patch_row", "patch_col"):
        assert (getattr(found, name) == getattr(wanted, name)).all(), name


def test_training_straight_from_the_model_uses_them(phantom, studies, wanted):
    """`train --direct`: the rows of one epoch."""
    provider = DirectProvider(phantom, studies, HOOK, 16, SAMPLED, buffer_rows=4096, group=len(studies))
    assert torch.equal(ordered(next(provider._groups())), ordered(wanted.values))


def test_saelens_store_uses_them(phantom, studies, wanted):
    """SAELens' ActivationsStore over studies: the rows of one epoch, whatever the order of studies."""
    hooked = HookedMaira2(phantom)
    config = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=128, d_sae=8), hook_name=HOOK, training_tokens=64,
        store_batch_size_prompts=1, device="cpu", logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    store = Maira2ActivationsStore.over(studies, hooked, config, SAMPLED, shuffle_seed=3)
    found = torch.cat([store.get_raw_llm_batch()[0] for _ in studies])
    assert torch.equal(ordered(found.float()), ordered(wanted.values))


def test_latents_read_them_from_the_model_and_from_a_store(phantom, studies, tmp_path):
    """All positions of the default roles: the model as a source, a store, and the quickstart's rows."""
    plain = read_rows(phantom, studies, HOOK, RowSettings(batch_size=1), progress=False)
    source = ModelSource(phantom, studies, HOOK, studies_per_block=1)
    live = joined([block for unit in range(len(source)) for block in source[unit]])
    assert torch.equal(live.values, plain.values)
    assert (live.position == plain.position).all()
    harvest(
        phantom, studies, tmp_path / "s", [HOOK], RowSettings(batch_size=1), dtype="float32", progress=False
    )
    stored = StoreSource(tmp_path / "s", HOOK)
    kept = joined([block for unit in range(len(stored)) for block in stored[unit]])
    assert torch.equal(kept.values, plain.values)
    config = QuickstartConfig(out=tmp_path / "q", studies=40, progress=False)
    quick = stored_rows(phantom, studies, HOOK, config)
    for name in ("study", "position", "role", "token"):
        assert (getattr(quick, name) == getattr(plain, name)).all(), name
    torch.testing.assert_close(quick.values, plain.values, rtol=1e-4, atol=1e-4)

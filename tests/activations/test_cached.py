"""SAELens' cached activations: its own classes read what is exported, and what they wrote is imported."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_maira.activations import RowSettings, export_cached, harvest, import_cached
from sae_lens_maira.errors import StoreError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.phantom import generate_studies

pytestmark = pytest.mark.compat

HOOK = "blocks.1.hook_resid_post"
CONTEXT = 16


@pytest.fixture(scope="module")
def store(phantom, tmp_path_factory):
    """Eleven studies in three shards, one row in twenty of the patches in addition to the paper's roles."""
    studies = generate_studies(11, seed=41)
    folder = tmp_path_factory.mktemp("store")
    settings = RowSettings(roles="paper", rates={"image": 0.05})
    return harvest(phantom, studies, folder, [HOOK], settings, shard_studies=4, progress=False)


def rows_of(store):
    """All values and index rows, in study order."""
    parts = [store.in_study_order(HOOK, shard) for shard in store.committed()]
    values = torch.cat([read(0, len(index)) for read, index in parts])
    return values, pd.concat([index for _, index in parts], ignore_index=True)


def config(folder, **more):
    given = {
        "dataset_path": "",
        "model_name": "phantom",
        "model_batch_size": 4,
        "hook_name": HOOK,
        "d_in": 128,
        "training_tokens": 192,
        "context_size": CONTEXT,
        "new_cached_activations_path": str(folder),
        "shuffle": False,
        "device": "cpu",
        "prepend_bos": False,
    }
    return CacheActivationsRunnerConfig(**(given | more))


def test_saelens_reads_the_export(phantom, store, tmp_path, monkeypatch):
    """SAELens' ActivationsStore yields the store's rows and token ids in study order; the rest is counted."""
    monkeypatch.setattr("sae_lens_maira.activations.cached.GATHERED", 64)
    count, left = export_cached(store, tmp_path / "cached", context_size=CONTEXT)
    values, index = rows_of(store)
    assert count * CONTEXT + left == len(values)
    assert left == len(values) % CONTEXT
    assert len(list((tmp_path / "cached").glob("*.arrow"))) > 3
    theirs = ActivationsStore.from_cache_activations(HookedMaira2(phantom), config(tmp_path / "cached"))
    rows, tokens = zip(*(theirs.get_raw_llm_batch() for _ in range(count // 4)), strict=True)
    seen = count // 4 * 4 * CONTEXT
    assert torch.equal(torch.cat(rows), values[:seen].float())
    assert (torch.cat(tokens).long().numpy() == index["token"].to_numpy()[:seen]).all()


def test_export_and_import_give_the_store_back(store, tmp_path, monkeypatch):
    """With rows one by one nothing is left out: values, index, sizes of shards and settings are the store's own."""
    monkeypatch.setattr("sae_lens_maira.activations.cached.GATHERED", 100)
    assert export_cached(store, tmp_path / "cached", HOOK, context_size=1)[1] == 0
    back = import_cached(tmp_path / "cached", tmp_path / "back")
    assert back.complete
    assert back.spec == store.spec
    assert back.study_ids == store.study_ids
    (ours, index), (theirs, other) = rows_of(back), rows_of(store)
    assert torch.equal(ours, theirs)
    pd.testing.assert_frame_equal(index, other, check_dtype=False)
    assert back.rows == store.rows
    back.validate()


def test_what_saelens_wrote_is_imported(phantom, tmp_path, monkeypatch):
    """CacheActivationsRunner caches twelve sequences of text; the store has them row by row, and continues a kill."""
    tokens = np.random.default_rng(0).integers(5, 900, (12, CONTEXT))
    # The runner loads models by name from a hub; this one is at hand.
    monkeypatch.setattr("sae_lens.cache_activations_runner.load_model", lambda **_: HookedMaira2(phantom))
    cfg = config(tmp_path / "cached", buffer_size_gb=4 * CONTEXT * 128 * 4 / 1e9)
    CacheActivationsRunner(cfg, override_dataset=Dataset.from_dict({"tokens": tokens})).run()
    store = import_cached(tmp_path / "cached", tmp_path / "store", shard_rows=5 * CONTEXT)
    assert store.spec.n_studies == 12
    assert store.committed() == [0, 1, 2]
    values, index = rows_of(store)
    assert (index["token"].to_numpy() == tokens.reshape(-1)).all()
    assert (index["position"].to_numpy() == np.tile(np.arange(CONTEXT), 12)).all()
    assert set(index["role"]) == {TokenRole.REPORT}
    with torch.no_grad():
        ids = torch.from_numpy(tokens[:4])
        states = phantom.model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(values[: 4 * CONTEXT], states.reshape(-1, 128), rtol=1e-4, atol=1e-4)
    (tmp_path / "store" / "shard-000001.json").unlink()
    again = import_cached(tmp_path / "cached", tmp_path / "store", shard_rows=5 * CONTEXT)
    assert torch.equal(rows_of(again)[0], values)


def test_what_cannot_be_exported_or_imported_says_why(store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(StoreError, match="not empty"):
        export_cached(store, tmp_path / "full")
    with pytest.raises(StoreError, match="from 1 to that number"):
        export_cached(store, tmp_path / "new", context_size=10**6)
    with pytest.raises(StoreError, match="name one of these"):
        export_cached(store, tmp_path / "new", "blocks.7.hook_resid_post")
    with pytest.raises(StoreError, match="cannot be read as a data set"):
        import_cached(tmp_path / "full", tmp_path / "store")
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(StoreError, match="of no hook"):
        import_cached(tmp_path / "text", tmp_path / "store")
    assert not (tmp_path / "store").exists()

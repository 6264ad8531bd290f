"""Stores: rows equal transformers' hidden states, damage is named, a full disk leaves the store whole."""

import resource
import shutil
import subprocess
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lens_maira.activations import ActivationStore, RowSettings, StoreProvider, harvest
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import ROLE_PRESETS, TokenRole
from sae_lens_maira.phantom import generate_studies

pytestmark = pytest.mark.compat

ALL = RowSettings(roles="all")
HOOKS = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]


@pytest.fixture(scope="module")
def studies():
    return generate_studies(10, seed=5)


@pytest.fixture(scope="module")
def store(phantom, studies, tmp_path_factory):
    return harvest(
        phantom,
        studies,
        tmp_path_factory.mktemp("store"),
        HOOKS,
        ALL,
        shard_studies=4,
        progress=False,
    )


def copy(store, folder):
    """The same store elsewhere, to damage."""
    for path in store.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return ActivationStore(folder)


def table(store, hook):
    """Every row with its values, in study order."""
    blocks = list(store.blocks(hook))
    names = [f.name for f in fields(blocks[0]) if f.name not in ("values", "hook_name")]
    return torch.cat([b.values for b in blocks]), {
        n: np.concatenate([getattr(b, n) for b in blocks]) for n in names
    }


@pytest.mark.parametrize("hook", HOOKS)
def test_rows_are_the_hidden_states_of_transformers(phantom, studies, store, hook):
    """For every role, to bfloat16 rounding (2^-8 relative), and each row has its own id and position."""
    layer = int(hook.split(".")[1])
    values, columns = table(store, hook)
    assert set(columns["role"]) >= {1, 2, 3, 4, 9, 10}
    for number, study in enumerate(studies):
        encoding = phantom.processor.encode(study, report="teacher")
        with torch.no_grad():
            states = phantom.model(**encoding.model_inputs(), output_hidden_states=True).hidden_states
        mine = columns["study"] == number
        assert (columns["position"][mine] == np.arange(encoding.input_ids.shape[1])).all()
        for name, source in (("token", "input_ids"), ("role", "roles"), ("patch_row", "patch_row")):
            assert (columns[name][mine] == getattr(encoding, source)[0].numpy()).all()
        torch.testing.assert_close(
            values[torch.from_numpy(mine)], states[layer + 1][0], rtol=2**-8 * 1.01, atol=1e-3
        )


@pytest.mark.parametrize("preset", ["paper", "image_only", "generated_only"])
def test_presets_keep_exactly_their_roles(phantom, studies, tmp_path, preset):
    store = harvest(phantom, studies[:4], tmp_path, HOOKS[:1], RowSettings(roles=preset), progress=False)
    kept = set(store.index(0)["role"])
    assert kept <= set(ROLE_PRESETS[preset])
    assert {TokenRole.IMAGE} == kept if preset == "image_only" else TokenRole.REPORT in kept


def test_blocks_keep_studies_whole(store):
    """Blocks of at most 500 rows come in study order, and no study is in two of them."""
    blocks = list(store.blocks(HOOKS[0], max_rows=500))
    seen = [number for block in blocks for number in np.unique(block.study)]
    assert seen == list(range(10))
    assert len(blocks) > 3
    assert sum(map(len, blocks)) == len(store)


def test_flipped_byte_is_named_and_training_refuses(store, tmp_path):
    damaged = copy(store, tmp_path)
    damaged.validate()
    path = tmp_path / f"shard-000001.{HOOKS[1]}.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"shard 1: segment \d+ of"):
        damaged.validate()
    provider = StoreProvider(damaged, HOOKS[1], 256)
    with pytest.raises(StoreError, match=r"Shard 1 .* damaged"):
        _ = [next(provider) for _ in range(len(store) // 256)]
    next(StoreProvider(damaged, HOOKS[0], 256))


def test_missing_and_cut_files_are_named(store, tmp_path):
    damaged = copy(store, tmp_path)
    (tmp_path / "shard-000000.parquet").unlink()
    path = tmp_path / f"shard-000002.{HOOKS[0]}.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StoreError, match=r"shard 0: .* missing; shard 2: .* bytes"):
        damaged.validate()


def test_an_entry_of_an_earlier_version_is_named(store, tmp_path):
    """Neither validation nor reading ends in a KeyError."""
    old = copy(store, tmp_path)
    path = tmp_path / "shard-000000.json"
    path.write_text(path.read_text().replace('"xxh3"', '"crc32"'))
    with pytest.raises(StoreError, match=r"shard 0 .* has no xxh3; an earlier version"):
        old.read(HOOKS[0], 0)


def test_no_room_leaves_the_store_whole(phantom, studies, store, tmp_path):
    """With a limit on file sizes (which writes hit as they hit a full disk) a clear error; then it continues."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(StoreError, match="No space"):
            harvest(phantom, studies, tmp_path, HOOKS, ALL, shard_studies=4, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store.json", "studies.json"]
    again = harvest(phantom, studies, tmp_path, HOOKS, ALL, shard_studies=4, progress=False)
    again.validate()
    assert again.entry(1) == store.entry(1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB of its own; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_store_whole(phantom, studies, store, small_disk):
    """On a file system that really fills up: a clear error, whole shards stay, and with room the harvest goes on."""
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_400_000))
    with pytest.raises(StoreError, match="No space to write"):
        harvest(phantom, studies, small_disk, HOOKS, ALL, shard_studies=4, progress=False)
    half = ActivationStore(small_disk)
    half.validate(complete=False)
    with pytest.raises(StoreError, match="shards are missing"):
        half.validate()
    assert not half.complete
    assert not list(small_disk.glob("*.partial"))
    assert {p.name.split(".")[0] for p in small_disk.glob("shard-*")} == {
        f"shard-{s:06d}" for s in half.committed()
    }
    filler.unlink()
    again = harvest(phantom, studies, small_disk, HOOKS, ALL, shard_studies=4, progress=False)
    again.validate()
    assert again.complete
    for shard in store.committed():
        assert again.entry(shard) == store.entry(shard)


def test_another_harvest_in_the_folder_is_refused(phantom, studies, store):
    with pytest.raises(StoreError, match="another harvest: settings"):
        harvest(
            phantom,
            studies,
            store.folder,
            HOOKS,
            RowSettings(roles="all", seed=3),
            shard_studies=4,
            progress=False,
        )


def test_commit_refuses_what_does_not_fit(store, tmp_path):
    damaged = copy(store, tmp_path)
    with pytest.raises(StoreError, match="expected"):
        damaged.commit(7, {h: torch.zeros(3, 5) for h in HOOKS}, pd.DataFrame({"study": [0]}))
    assert not list(tmp_path.glob("shard-000007*"))


def test_generated_reports_are_harvested_from_their_own_ids(phantom, studies, tmp_path):
    """`both` gives two sets of rows per study; generated rows equal hidden states of prompt + generated ids."""
    store = harvest(
        phantom,
        studies[:3],
        tmp_path,
        HOOKS[1:],
        RowSettings(roles="all", reports="both", max_new_tokens=24),
        progress=False,
    )
    for number, study in enumerate(studies[:3]):
        read, index = store.in_study_order(HOOKS[1], 0)
        mine = ((index["study"] == number) & (index["source"] == 1)).to_numpy()
        ids = torch.from_numpy(index["token"].to_numpy()[mine])[None].long()
        pixels = phantom.processor.encode(study).pixel_values
        with torch.no_grad():
            states = phantom.model(ids, pixel_values=pixels, output_hidden_states=True).hidden_states
        values = read(0, len(index))[torch.from_numpy(mine)].float()
        torch.testing.assert_close(values, states[4][0], rtol=2**-8 * 1.01, atol=1e-3)
    taught = list(store.blocks(HOOKS[1], source="teacher"))
    assert sum(map(len, taught)) == int((store.index(0)["source"] == 0).sum())

"""A collection stopped anywhere and continued, or shared by processes, gives the records of one that was left alone."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from torch._C._distributed_c10d import HashStore

from sae_lens_maira.activations import RowSettings, harvest
from sae_lens_maira.distributed import Ranks
from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.collect import CollectConfig, collect_records
from sae_lens_maira.latents.source import StoreSource
from sae_lens_maira.latents.workdir import NAME

CONFIG = CollectConfig(top=4, zero=3, per_interval=2, intervals=3, sample_rows=64, save_seconds=0.0, salt="s")


@pytest.fixture(scope="module")
def units(rows):
    return [[rows.where((rows.study >= start) & (rows.study < start + 8))] for start in range(0, 40, 8)]


@pytest.fixture(scope="module")
def alone(units, studies, sae, phantom, tmp_path_factory):
    return collect_records(units, studies, sae, phantom, tmp_path_factory.mktemp("alone"), CONFIG)


class Stopping:
    """Units of which the n-th one read stops the process."""

    def __init__(self, units, after):
        self.units, self.left = units, after

    def __len__(self):
        return len(self.units)

    def __getitem__(self, unit):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.units[unit]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_stopped_in_either_pass_and_continued(units, studies, sae, phantom, alone, tmp_path):
    """Ten units are read in all, wherever it was stopped; the files are byte for byte the same."""
    reads = 0
    for after in (2, 4, 1, 2):
        stopping = Stopping(units, after)
        with pytest.raises(KeyboardInterrupt):
            collect_records(stopping, studies, sae, phantom, tmp_path, CONFIG)
        reads += after
    assert (tmp_path / NAME).is_dir()
    other = dataclasses.replace(CONFIG, top=5)
    with pytest.raises(RecordError, match="settings differ"):
        collect_records(units, studies, sae, phantom, tmp_path, other)
    last = Stopping(units, 10 - reads)
    done = collect_records(last, studies, sae, phantom, tmp_path, CONFIG)
    assert last.left == 0
    assert not (tmp_path / NAME).exists()
    assert files_of(done.folder) == files_of(alone.folder)


def test_three_processes_give_the_records_of_one(units, studies, sae, phantom, alone, tmp_path):
    """Every number of every record; sums of float32 maps to their rounding."""

    store = HashStore()

    def work(rank):
        ranks = Ranks(rank, 3, lambda: store, timeout_s=60)
        done = collect_records(units, studies, sae, phantom, tmp_path, CONFIG, ranks=ranks)
        ranks.close()
        return done

    with ThreadPoolExecutor(3) as pool:
        shared = list(pool.map(work, range(3)))[2]
    assert len(shared) == len(alone) == 96
    for ours, theirs in zip(shared.stream(), alone.stream(), strict=True):
        for mine, other in zip(ours.maps, theirs.maps, strict=True):
            assert (mine.view, mine.studies) == (other.view, other.studies)
            np.testing.assert_allclose(mine.values, other.values, rtol=2e-3, atol=1e-6)
        plain = [dataclasses.replace(record, maps=(), firing=()) for record in (ours, theirs)]
        assert plain[0] == plain[1]
        assert [f.fired for f in ours.firing] == [f.fired for f in theirs.firing]
        assert [f.mean for f in ours.firing] == pytest.approx([f.mean for f in theirs.firing], rel=1e-12)
    assert shared.studies == alone.studies


def test_records_from_a_store(phantom, studies, sae, rows, tmp_path):
    """A store of the same rows in float32 gives the records of those rows; roles narrow it."""
    few = studies[:12]
    harvest(
        phantom,
        few,
        tmp_path / "store",
        [rows.hook_name],
        RowSettings(roles=["image", "report"]),
        shard_studies=5,
        dtype="float32",
        progress=False,
    )
    blocks = StoreSource(tmp_path / "store", rows.hook_name, roles="image_only", max_rows=500)
    assert len(blocks) == 3
    stored = collect_records(blocks, few, sae, phantom, tmp_path / "a", CONFIG)
    direct = rows.where(rows.is_image & (rows.study < 12))
    other = collect_records([[direct]], few, sae, phantom, tmp_path / "b", CONFIG)
    assert stored.meta.rows_text == 0
    assert stored.meta.rows_image == len(direct)
    for ours, theirs in zip(stored.stream(), other.stream(), strict=True):
        # Batches of another size round otherwise; a latent at its threshold may fire in one and not in the other.
        assert ours.density == pytest.approx(theirs.density, abs=3 / len(direct))
        assert ours.max == pytest.approx(theirs.max, rel=1e-3)
    with pytest.raises(RecordError, match="not 'blocks"):
        StoreSource(tmp_path / "store", "blocks.1.hook_resid_post")

"""Killed and restarted harvests, and other numbers of ranks, give the rows of an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lens_maira.activations import ActivationStore, RowSettings, harvest
from sae_lens_maira.phantom import generate_studies

WORKER = Path(__file__).with_name("harvest_worker.py")
HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
SETTINGS = RowSettings(roles="all", rates={"image": 0.2}, batch_size=3)
ARGUMENTS = {"settings": SETTINGS, "shard_studies": 3, "progress": False}


@pytest.fixture(scope="module")
def studies():
    return generate_studies(60, seed=8)


@pytest.fixture(scope="module")
def whole(phantom, studies, tmp_path_factory):
    """The uninterrupted harvest, on one thread as the workers run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    store = harvest(phantom, studies, tmp_path_factory.mktemp("whole"), HOOKS, **ARGUMENTS)
    torch.set_num_threads(before)
    return store


def same_rows(one: ActivationStore, other: ActivationStore) -> None:
    """Equal index and bit-equal values, shard by shard."""
    assert one.committed() == other.committed()
    for shard in one.committed():
        pd.testing.assert_frame_equal(one.index(shard), other.index(shard))
        for hook in one.spec.hooks:
            assert torch.equal(one.read(hook, shard), other.read(hook, shard))


class Worker:
    """The process of `harvest_worker.py`, whose children are killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run_until(self, folder: Path, seconds: float | None) -> bool:
        """Harvest in a child; SIGKILL it `seconds` after it started. True if it had finished."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{folder} 0 1\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it had finished
                os.kill(child, signal.SIGKILL)
        code = int(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code == 0

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def worker():
    started = Worker()
    yield started
    started.close()


def killed_and_resumed(
    worker: Worker, folder: Path, whole: ActivationStore, kills: int, longest: float
) -> int:
    """Kill at random points, check the store after each, finish; returns the kills that hit a running harvest."""
    rng = np.random.default_rng(kills)
    hits = 0
    before: list[int] = []
    for seconds in rng.uniform(0, longest, kills):
        hits += not worker.run_until(folder, float(seconds))
        if (folder / "store.json").exists():
            store = ActivationStore(folder)
            store.validate(complete=False)
            assert set(before) <= set(store.committed())
            before = store.committed()
    assert worker.run_until(folder, None)
    same_rows(whole, ActivationStore(folder))
    assert not list(folder.glob("shard-*.partial"))
    assert not set(folder.glob("*.safetensors")) - {
        folder / f"shard-{s:06d}.{h}.safetensors" for s in whole.committed() for h in HOOKS
    }
    return hits


def test_kill_and_resume_gives_the_same_rows(worker, whole, tmp_path):
    """Two kills -9; what was committed stays, the end is bit-equal to the uninterrupted harvest."""
    assert killed_and_resumed(worker, tmp_path, whole, kills=2, longest=0.6) > 0


@pytest.mark.slow
def test_twenty_kills(worker, whole, tmp_path):
    """Twenty kills -9 at random points of short runs."""
    assert killed_and_resumed(worker, tmp_path, whole, kills=20, longest=0.35) >= 10


def test_two_ranks_then_three(phantom, studies, whole, tmp_path):
    """Rank 0 of 2 finishes and rank 1 never starts; three ranks complete the store to the same rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    harvest(phantom, studies, tmp_path, HOOKS, rank=0, world_size=2, **ARGUMENTS)
    half = ActivationStore(tmp_path)
    assert half.committed() == list(range(0, 20, 2))
    assert not half.complete
    written = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*")}
    for rank in range(3):
        harvest(phantom, studies, tmp_path, HOOKS, rank=rank, world_size=3, **ARGUMENTS)
    torch.set_num_threads(before)
    assert ActivationStore(tmp_path).complete
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in written} == written
    same_rows(whole, ActivationStore(tmp_path))

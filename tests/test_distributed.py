"""Ranks: where their numbers come from, waiting for the others, and errors that name the rank that is missing."""

import threading
import time

import pytest
from torch._C._distributed_c10d import HashStore

from sae_lens_maira.distributed import Ranks, distributed
from sae_lens_maira.errors import ConfigError, RankError
from sae_lens_maira.ranks import RankInfo, check_single_process, local_rank, rank_info

TORCHRUN = {
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
STEP = {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[03-05,09]",
    "SLURM_JOB_ID": "81",
    "SLURM_STEP_ID": "0",
    "SLURM_LOCALID": "1",
}
ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}


def test_ranks_of_torchrun_and_slurm_and_by_hand():
    assert rank_info({}) == RankInfo()
    found = rank_info(TORCHRUN)
    assert (found.rank, found.size, found.address, found.hosted) == (2, 4, ("node7", 29500), True)
    assert local_rank(TORCHRUN) == 1
    found = rank_info(STEP)
    assert (found.rank, found.size, found.hosted) == (1, 2, False)
    assert found.address is not None
    assert found.address[0] == "gpu03"
    assert 20_000 <= found.address[1] < 40_000
    assert found.address == rank_info(STEP | {"SLURM_PROCID": "0"}).address
    assert local_rank(STEP) == 1
    by_hand = rank_info(STEP, rank=3, world=5)
    assert (by_hand.rank, by_hand.size, by_hand.address) == (3, 5, None)


def test_a_task_of_a_slurm_array_is_no_rank(monkeypatch, capsys):
    """Such a task does all of the work, and the output says how to share it."""
    assert rank_info(ARRAY).size == 1
    for name, value in ARRAY.items():
        monkeypatch.setenv(name, value)
    with distributed() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
    assert "--rank $SLURM_ARRAY_TASK_ID" in capsys.readouterr().err


def test_a_task_of_a_slurm_step_may_run_a_command_of_its_own(monkeypatch, capsys):
    """A command that shares no work runs in each task, and the first one says so."""
    for name, value in (STEP | {"SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    check_single_process("evaluate")
    assert "each process does all of it, and this is rank 0 of 2" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "world"), [(1, None), (None, 2), (2, 2), (-1, 2)])
def test_impossible_ranks_are_refused(rank, world):
    with pytest.raises(ConfigError):
        rank_info({}, rank, world)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 'x'; expected a whole number"):
        rank_info(TORCHRUN | {name: "x"})


def test_ranks_without_an_address_work_apart(capsys):
    with distributed(1, 3) as ranks:
        assert not ranks.connected
        ranks.barrier("nothing to wait for")
        with pytest.raises(ConfigError, match="MASTER_ADDR"):
            ranks.join_group()
    assert "Rank 1 of 3, from --rank and --world" in capsys.readouterr().err


def test_a_barrier_waits_for_a_slow_rank_and_names_a_dead_one():
    """A rank that is slow but alive is waited for beyond the time-out; one whose heartbeat ends is named."""
    store = HashStore()
    one, two = (Ranks(rank, 2, lambda: store, timeout_s=1.2) for rank in (0, 1))
    late = threading.Timer(2.0, two.barrier, ["work"])
    began = time.monotonic()
    late.start()
    one.barrier("work")
    assert time.monotonic() - began > 1.8
    late.join()
    other = threading.Thread(target=two.least, args=("rows", 3))
    other.start()
    assert one.least("rows", 5) == 3
    other.join()
    two._ended.set()  # as if the process had been killed
    with pytest.raises(RankError, match=r"Rank 1 of 2 has sent no heartbeat for \d+ s"):
        one.barrier("more work")
    assert time.monotonic() - began < 8
    one.close()


def test_a_failure_is_passed_on_at_once():
    """The others get the failed rank's message without waiting for the time-out."""
    store = HashStore()
    one, two = (Ranks(rank, 2, lambda: store, timeout_s=60) for rank in (0, 1))
    two.close(ConfigError("study 7 has no report"))
    with pytest.raises(RankError, match="Rank 1 of 2 failed: study 7 has no report"):
        one.barrier("work")
    assert str(one.explain(RuntimeError("connection closed"))).startswith("Rank 1 of 2 failed")
    one.close()

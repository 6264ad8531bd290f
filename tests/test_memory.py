"""Free memory is the least of what the system has and what control groups and `ulimit` allow."""

import multiprocessing
import resource
from pathlib import Path

import pytest
import torch

from sae_lens_maira.memory import free_bytes, group_limits

CPU = torch.device("cpu")


def group(folder: Path, version: int, limit: int | str, used: int, inactive: int) -> None:
    """Files of one memory control group, as the kernel writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    total = "" if version == 2 else f"total_inactive_file {inactive}\n"
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n{total}")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups(tmp_path, version):
    """Limit - use + file pages that can be dropped, for the process's group and those above it."""
    base = tmp_path / "cgroup" / ("" if version == 2 else "memory")
    group(base / "slurm" / "job_7", version, 8_000, 5_000, 1_000)
    group(base / "slurm", version, 100_000, 99_000, 0)
    group(base, version, "max" if version == 2 else 9_223_372_036_854_771_712, 99_000, 0)
    proc = tmp_path / "proc"
    proc.write_text(
        "0::/slurm/job_7\n" if version == 2 else "9:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n0::/\n"
    )
    assert list(group_limits(proc, tmp_path / "cgroup")) == [4_000, 1_000]


def test_a_system_without_control_groups_has_no_limits(tmp_path):
    assert list(group_limits(tmp_path / "missing", tmp_path)) == []
    (tmp_path / "proc").write_text("0::/\n")
    assert list(group_limits(tmp_path / "proc", tmp_path)) == []


def limited(answer, name: str, spare: int) -> None:
    field = {"RLIMIT_DATA": "VmData", "RLIMIT_AS": "VmSize"}[name]
    used = 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])
    resource.setrlimit(getattr(resource, name), (used + spare, resource.RLIM_INFINITY))
    answer.put(free_bytes(CPU))


@pytest.mark.parametrize("name", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_a_process_limit_counts(name):
    """With `ulimit` 300 MB above what a process has, it may take about 300 MB."""
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=limited, args=(answer, name, 300_000_000))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answer.get() == pytest.approx(300_000_000, rel=0.1)


def test_free_memory_is_not_more_than_the_machine_has():
    assert 0 < free_bytes(CPU) <= 1024 * int(Path("/proc/meminfo").read_text().split()[1])

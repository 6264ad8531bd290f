"""Free memory: the amount that the system reports, limited by container, batch job and `ulimit`.

    CPU   the smallest of MemAvailable, limits of the control groups (version 1 and 2), RLIMIT_DATA and RLIMIT_AS
    CUDA  free memory of the device, and memory that PyTorch has reserved but does not use

A job under SLURM or in a container may use much less than the machine's free memory, and is killed if it uses more.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

_UNLIMITED = 1 << 60
"""Version 1 of control groups writes a number near 2**63 for "no limit"."""


def free_bytes(device: torch.device) -> int:
    """Free memory of a device in bytes; for the CPU, the memory that this process may still allocate."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min([_available(), *group_limits(), *_process_limits()]))


def _available() -> int:
    """Bytes that the system can provide without swapping."""
    fields = _fields(Path("/proc/meminfo"))
    if "MemAvailable" in fields:
        return 1024 * fields["MemAvailable"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # not Linux


def group_limits(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yield the free bytes of each memory control group of this process, and of the groups above it.

    Args:
        proc: File that names the groups, one line "number:controllers:path" per group.
        root: Mount point of the groups.

    Yields:
        Limit minus use; file pages that can be dropped do not count as used.
    """
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(base) and (free := _left(folder, limit, used)) is not None:
                yield free


def _left(folder: Path, limit: str, used: str) -> int | None:
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
    except (OSError, ValueError):
        return None
    if not most.isdigit() or int(most) >= _UNLIMITED:  # version 2 writes "max"
        return None
    fields = _fields(folder / "memory.stat")
    return int(most) - now + fields.get("total_inactive_file", fields.get("inactive_file", 0))


def _process_limits() -> Iterator[int]:
    status = _fields(Path("/proc/self/status"))
    for kind, field in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY and field in status:
            yield soft - 1024 * status[field]


def _fields(path: Path) -> dict[str, int]:
    """Read a file of lines "name number" or "name: number kB"."""
    try:
        rows = [line.replace(":", " ").split() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError):
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}

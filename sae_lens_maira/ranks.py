"""Which of several processes this one is.

    torchrun           RANK, WORLD_SIZE                      address from MASTER_ADDR, MASTER_PORT
    srun               SLURM_PROCID, SLURM_STEP_NUM_TASKS    address from the step's first node and the job number
    --rank, --world    given by hand                         address from MASTER_ADDR, MASTER_PORT, if they are set

A SLURM array is never split into ranks by itself.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from sae_lens_maira.errors import ConfigError


@dataclass(frozen=True)
class RankInfo:
    """Position of a process.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        source: Origin of the numbers, in words; empty for a single process.
        address: Host and port where the ranks meet; None if they cannot.
        hosted: Whether another process (torchrun's agent) serves that address, instead of rank 0.
    """

    rank: int = 0
    size: int = 1
    source: str = ""
    address: tuple[str, int] | None = None
    hosted: bool = False


def rank_info(
    environment: Mapping[str, str] | None = None, rank: int | None = None, world: int | None = None
) -> RankInfo:
    """Position of this process.

    Args:
        environment: Environment variables; those of the process if not given.
        rank: Replaces the rank of the environment; needs `world`.
        world: Number of ranks.

    Raises:
        ConfigError: Only one of the two was given, or the rank does not exist.
    """
    env = os.environ if environment is None else environment
    if (rank is None) != (world is None):
        raise ConfigError("Only one of --rank and --world was given; expected both, or neither.")
    source = ""
    if rank is not None and world is not None:
        source = "--rank and --world"
    elif "RANK" in env and "WORLD_SIZE" in env:
        rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        source = "torchrun (RANK, WORLD_SIZE)"
    elif "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        rank, world = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
        source = "a SLURM step (SLURM_PROCID, SLURM_STEP_NUM_TASKS)"
    if rank is None or world is None:
        return RankInfo()
    if not 0 <= rank < world:
        raise ConfigError(f"Rank {rank} of {world} does not exist; ranks count from 0.")
    hosted = env.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    return RankInfo(rank, world, source, _address(env, source.startswith("a SLURM step")), hosted)


def check_single_process(command: str) -> None:
    """Refuse several ranks for a command that does not share its work.

    Under torchrun that is an error. Tasks of a SLURM step may run different commands, so there it is a line on stderr.

    Args:
        command: Name of the command.

    Raises:
        ConfigError: This process is one of several that torchrun started.
    """
    info = rank_info()
    if info.size == 1:
        return
    seen = f"this is rank {info.rank} of {info.size}, from {info.source}"
    if "SLURM" not in info.source:
        raise ConfigError(
            f"{command} works in one process, and {seen}. Start it without torchrun; harvest, train and latents share "
            "their work over processes."
        )
    if info.rank == 0:
        sys.stderr.write(f"{command} does not share its work: each process does all of it, and {seen}.\n")


def _address(env: Mapping[str, str], of_step: bool) -> tuple[str, int] | None:
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return env["MASTER_ADDR"], _number(env, "MASTER_PORT")
    if not of_step:
        return None
    nodes = re.match(
        r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", env.get("SLURM_STEP_NODELIST", "")
    )  # "gpu[03-05,09]-x" -> "gpu03-x"
    if nodes is None or "SLURM_JOB_ID" not in env:
        return None
    job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID", 0)
    return "".join(part or "" for part in nodes.groups()), 20_000 + (7 * job + step) % 20_000


def local_rank(environment: Mapping[str, str] | None = None) -> int:
    """Number of this process on its machine, by which a GPU is chosen."""
    env = os.environ if environment is None else environment
    if "LOCAL_RANK" not in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _number(env, "SLURM_LOCALID", 0)
    return _number(env, "LOCAL_RANK", 0)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The number that a launcher put into a variable; an unset or empty variable has the default."""
    text = env.get(name) or ("" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"The environment variable {name} is {text!r}; expected a whole number. Start the command with torchrun or "
            "srun, which set it, or unset it."
        )
    return int(text)


def announce(info: RankInfo) -> None:
    """Say once where the ranks come from, and what was not taken for a rank."""
    if info.size > 1 and (info.rank == 0 or info.address is None):
        apart = "" if info.address is not None else " The ranks have no address to meet at and work apart."
        sys.stderr.write(f"Rank {info.rank} of {info.size}, from {info.source}.{apart}\n")
    if not info.source and "SLURM_ARRAY_TASK_ID" in os.environ:
        task, count = os.environ["SLURM_ARRAY_TASK_ID"], os.environ.get("SLURM_ARRAY_TASK_COUNT", "N")
        sys.stderr.write(
            f"This is task {task} of a SLURM array of {count}. A task is not taken for a rank: it does all of the "
            "work. To share the work of harvest, number the array from 0 and pass --rank $SLURM_ARRAY_TASK_ID "
            "--world $SLURM_ARRAY_TASK_COUNT.\n"
        )
    elif not info.source and _number(os.environ, "SLURM_NTASKS", 1) > 1:
        sys.stderr.write(
            f"SLURM_NTASKS is {os.environ['SLURM_NTASKS']}, but this process was not started by srun: it does all of "
            "the work. Put srun in front of the command to share it.\n"
        )


__all__ = ["RankInfo", "announce", "check_single_process", "local_rank", "rank_info"]

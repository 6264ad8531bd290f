"""A harvesting process that is killed and restarted by the tests.

It imports and loads once. Every line `FOLDER RANK WORLD_SIZE` on its standard input forks a child that harvests;
the child's process id is written when it starts, its exit code (negative: the signal) when it has ended.
"""

import os
import sys

import torch

from sae_lens_maira.activations import RowSettings, harvest
from sae_lens_maira.phantom import generate_studies, load_phantom

HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
SETTINGS = RowSettings(roles="all", rates={"image": 0.2}, batch_size=3)
ARGUMENTS = {"settings": SETTINGS, "shard_studies": 3, "progress": False}


def say(number: int) -> None:
    """One line on standard output."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    """Harvest what is asked for, until standard input ends."""
    torch.set_num_threads(1)  # a forked process has no more of torch's threads than its parent had
    maira, studies = load_phantom(), generate_studies(60, seed=8)
    for line in sys.stdin:
        folder, rank, size = line.split()
        child = os.fork()
        if child == 0:
            say(os.getpid())
            harvest(maira, studies, folder, HOOKS, rank=int(rank), world_size=int(size), **ARGUMENTS)
            os._exit(0)
        say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()

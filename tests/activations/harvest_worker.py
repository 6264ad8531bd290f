"""One harvesting process: `python harvest_worker.py FOLDER RANK WORLD_SIZE`; killed and restarted by the tests."""

import sys

import torch

from sae_lens_maira.activations import harvest
from sae_lens_maira.phantom import generate_studies, load_phantom

HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
ARGUMENTS = {"roles": "all", "rates": {"image": 0.2}, "shard_studies": 3, "batch_size": 3, "progress": False}


def main(folder: str, rank: str, size: str) -> None:
    """Harvest this rank's share, saying when it starts."""
    torch.set_num_threads(1)
    maira, studies = load_phantom(), generate_studies(60, seed=8)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    harvest(maira, studies, folder, HOOKS, rank=int(rank), world_size=int(size), **ARGUMENTS)


if __name__ == "__main__":
    main(*sys.argv[1:])

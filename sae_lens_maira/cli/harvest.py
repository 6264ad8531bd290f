"""The command `harvest`: activations of studies into a store, over any number of processes.

Ranks come from torchrun (RANK, WORLD_SIZE), a SLURM array or a SLURM step. It knows nothing about SAEs; a recipe's
other parts are read by `train`.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from sae_lens_maira.cli.options import HarvestOptions
from sae_lens_maira.cli.parser import accepts_parts_of

RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE", None),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", None),
)


@accepts_parts_of("train", "sae", "trainer", "out", "provider", "direct")
def harvest(
    options: HarvestOptions,
    as_json: bool = False,
) -> None:
    """Run studies through the model and keep activations on disk; killed at any time, the same command continues.

    Example: sae-lens-maira harvest --config recipes/phantom.yaml

    Args:
        options: what is read, and what is kept of it.
        as_json: print JSON instead of text.
    """
    made = harvest_store(options)
    facts = {
        "store": str(options.store),
        "rows": len(made),
        "shards": len(made.committed()),
        "of": made.spec.n_shards,
        "complete": made.complete,
    }
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    sys.stdout.write(
        f"{options.store}: {facts['rows']:,} rows in {facts['shards']} of {facts['of']} shards\n"
    )


def harvest_store(options: HarvestOptions) -> Any:
    """Load what the options name and harvest this process's share; returns the store.

    Raises:
        ConfigError: no store was named.
    """
    from sae_lens_maira.activations import harvest as run
    from sae_lens_maira.errors import ConfigError

    if options.store is None:
        raise ConfigError("No store was named; say where rows are kept with --store FOLDER.")
    rank, size = rank_of(os.environ)
    maira, studies, _ = options.load()
    return run(
        maira,
        studies,
        options.store,
        options.hook_names,
        options.row_settings(),
        rank=rank,
        world_size=size,
        shard_studies=options.shard_studies,
        dtype=options.dtype,
        workers=options.workers,
    )


def rank_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world size) from torchrun's or SLURM's variables; (0, 1) without."""
    for rank, size, first in RANK_VARIABLES:
        if rank in environment and size in environment:
            start = int(environment.get(first, 0)) if first else 0
            return int(environment[rank]) - start, int(environment[size])
    return 0, 1

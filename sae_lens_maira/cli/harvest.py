"""The command `harvest`: write activations of studies to a store, with any number of processes.

A recipe's parts about training are accepted and read by `train` only.
"""

import json
import sys
from typing import Any

from sae_lens_maira.cli.options import HarvestOptions
from sae_lens_maira.cli.parser import accepts_parts_of
from sae_lens_maira.distributed import Ranks


@accepts_parts_of("train", "sae", "trainer", "out", "provider", "direct")
def harvest(
    options: HarvestOptions,
    estimate: bool = False,
    as_json: bool = False,
) -> None:
    """Run studies through the model and keep activations on disk; killed at any time, the same command continues.

    Under torchrun or srun every process harvests its share of the studies.

    Example: sae-lens-maira harvest --config recipes/phantom.yaml

    Args:
        options: what is read, and what is kept of it.
        estimate: print memory, disk and time for these options and stop; nothing is loaded but configuration and table.
        as_json: print JSON instead of text.
    """
    if estimate:
        from sae_lens_maira.cli.estimate import of_harvest, write_estimate

        return write_estimate(of_harvest(options), as_json)
    with options.ranks() as ranks:
        made = harvest_store(options, ranks)
    if ranks.rank and ranks.connected:
        return
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


def harvest_store(options: HarvestOptions, ranks: Ranks) -> Any:
    """Load what the options name, harvest this rank's share, wait for the others and return the store.

    Raises:
        ConfigError: No store was named.
    """
    from sae_lens_maira.activations import ActivationStore
    from sae_lens_maira.activations import harvest as run
    from sae_lens_maira.errors import ConfigError

    if options.store is None:
        raise ConfigError("No store was named; say where rows are kept with --store FOLDER.")
    maira, studies, _ = options.load()
    run(
        maira,
        studies,
        options.store,
        options.hook_names,
        options.row_settings(),
        rank=ranks.rank,
        world_size=ranks.size,
        shard_studies=options.shard_studies,
        shard_bytes=options.shard_bytes,
        source=options.source(),
        dtype=options.dtype,
        workers=options.workers,
    )
    ranks.barrier("harvest")
    return ActivationStore(options.store)

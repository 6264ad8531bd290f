"""The commands `harvest` and `store show|validate|export|import`: write an activation store, inspect it, convert it.

`harvest` accepts the parts of a recipe about training, but only `train` reads them.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from sae_lens_maira.cli.options import HarvestOptions
from sae_lens_maira.cli.parser import accepts_parts_of, works_in
from sae_lens_maira.cli.train import train
from sae_lens_maira.distributed import Ranks


@accepts_parts_of("train", train)
def harvest(
    options: HarvestOptions,
    estimate: bool = False,
    as_json: bool = False,
) -> None:
    """Run studies through the model and store activations on disk. After a kill, run the same command again.

    Under torchrun or srun every process harvests its share of the studies.

    Example: sae-lens-maira harvest --config recipes/phantom.yaml

    Args:
        options: What is read, and what is kept of it.
        estimate: Print memory, disk and time for these options and stop; only the configuration and the table are read.
        as_json: Print JSON instead of text.
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
    """Load model and studies, harvest this rank's share, wait for the other ranks, and return the store.

    Raises:
        ConfigError: No store was named.
    """
    from sae_lens_maira.activations import ActivationStore
    from sae_lens_maira.activations import harvest as run
    from sae_lens_maira.errors import ConfigError

    if options.store is None:
        raise ConfigError("No store was named; give the folder of the rows with --store FOLDER.")
    maira, studies = options.load()
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


def show(store: Path, as_json: bool = False) -> None:
    """Show the contents of a store: hook points, rows by role, size, settings, and progress of its harvest.

    Example: sae-lens-maira store show --store runs/phantom_store

    Args:
        store: Folder of the store.
        as_json: Print JSON instead of text.
    """
    from dataclasses import asdict

    from sae_lens_maira.activations.manifest import Manifest

    opened = Manifest(store)
    rows = len(opened)
    files = [file for shard in opened.rows for file in opened.entry(shard)["files"]]
    size = sum(file["bytes"] for file in files)
    facts = {
        "store": str(store),
        "rows": rows,
        "bytes": size,
        "bytes_per_row": size / rows if rows else None,
        "shards": len(opened.rows),
        "of": opened.spec.n_shards,
        "complete": opened.complete,
        "roles": {role.name.lower(): n for role, n in opened.role_counts().items()},
        **asdict(opened.spec),
    }
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    hooks = ", ".join(f"{hook} ({width})" for hook, width in opened.spec.hooks.items())
    sys.stdout.write(
        f"{store}: {rows:,} rows of {opened.spec.n_studies:,} studies, {size / 1e9:.3f} GB in {facts['shards']} of "
        f"{facts['of']} shards\n  {opened.spec.dtype} at {hooks}\n"
    )
    for role, n in facts["roles"].items():
        sys.stdout.write(f"  {role:14} {n:,}\n")


def validate(store: Path, sums: Path | None = None, as_json: bool = False) -> None:
    """Read every file of a store and compare it with the manifest; report damaged shards.

    Example: sae-lens-maira store validate --store runs/phantom_store

    Args:
        store: Folder of the store.
        sums: File to write with the SHA-256 of every file; `sha256sum -c` in a copy of the folder compares them.
        as_json: Print JSON instead of text.
    """
    from sae_lens_maira.activations import ActivationStore
    from sae_lens_maira.io import atomic_write, sha256_of

    opened = ActivationStore(store)
    opened.validate()
    if sums is not None:
        files = [file["name"] for shard in opened.rows for file in opened.entry(shard)["files"]]
        files += ["store.json", "studies.json", *(f"shard-{shard:06d}.json" for shard in opened.rows)]
        atomic_write(sums, "".join(f"{sha256_of(store / name)}  {name}\n" for name in sorted(files)))
    if as_json:
        facts = {"store": str(store), "shards": len(opened.rows), "of": opened.spec.n_shards, "whole": True}
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    sys.stdout.write(f"{store}: {len(opened.rows)} of {opened.spec.n_shards} shards, all complete\n")


@works_in("out")
def export(
    store: Path, out: Path, hook: str | None = None, context_size: int = 128, as_json: bool = False
) -> None:
    """Write a store as SAELens' cached activations, which its ActivationsStore reads.

    Example: sae-lens-maira store export --store runs/phantom_store --out runs/cached

    Args:
        store: Folder of the store.
        out: New folder; float32, so about twice the size of a bfloat16 store.
        hook: Hook point; the store's first if not given.
        context_size: Number of activation rows per row of the data set; give SAELens the same number.
        as_json: Print JSON instead of text.
    """
    from sae_lens_maira.activations import ActivationStore, export_cached

    opened = ActivationStore(store)
    count, left = export_cached(opened, out, hook, context_size)
    name = hook or next(iter(opened.spec.hooks))
    if as_json:
        facts = {
            "out": str(out),
            "rows": count,
            "left_out": left,
            "hook_name": name,
            "context_size": context_size,
        }
        sys.stdout.write(json.dumps(facts | {"d_in": opened.spec.hooks[name]}) + "\n")
        return
    sys.stdout.write(
        f"{out}: {count:,} times {context_size} rows, {left} rows left out; in SAELens hook_name={name!r}, "
        f"context_size={context_size}, d_in={opened.spec.hooks[name]}\n"
    )


@works_in("store")
def bring(
    cached: Path,
    store: Path,
    hook: str | None = None,
    role: str = "report",
    dtype: Literal["bfloat16", "float32"] | None = None,
    as_json: bool = False,
) -> None:
    """Make a store from SAELens' cached activations.

    Example: sae-lens-maira store import --cached activations/data --store runs/imported

    Args:
        cached: Folder that SAELens' CacheActivationsRunner or store export wrote.
        store: Folder of the new store.
        hook: Column to read, if there are several.
        role: Role of every token, if the data set contains none.
        dtype: Precision of the stored rows; that of the exported store, else float32, if not given.
        as_json: Print JSON instead of text.
    """
    from sae_lens_maira.activations import import_cached
    from sae_lens_maira.maira2 import resolve_roles

    (kind,) = resolve_roles([role])
    made = import_cached(cached, store, hook, kind, dtype)
    if as_json:
        sys.stdout.write(
            json.dumps({"store": str(store), "rows": len(made), "shards": len(made.rows)}) + "\n"
        )
        return
    sys.stdout.write(f"{store}: {len(made):,} rows in {len(made.rows)} shards\n")

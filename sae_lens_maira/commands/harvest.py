"""The command `harvest`: activations of studies into a store, over any number of processes.

Ranks come from torchrun (RANK, WORLD_SIZE), a SLURM array or a SLURM step. It knows nothing about SAEs; a recipe's
`sae` and `trainer` parts are read by `train`.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens_maira.studies import Study

RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE", None),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", None),
)


def harvest(
    store: Path,
    hooks: list[str],
    model: str = "phantom",
    studies: int = 2000,
    study_seed: int = 0,
    table: Path | None = None,
    root: Path | None = None,
    roles: str | list[str] = "paper",
    rates: dict[str, float] | None = None,
    reports: str = "teacher",
    shard_studies: int = 256,
    batch_size: int = 8,
    dtype: str = "bfloat16",
    model_dtype: str = "auto",
    max_norm: float | None = None,
    seed: int = 0,
    device: str = "auto",
    sae: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    out: Path | None = None,
    provider: dict[str, Any] | None = None,
    as_json: bool = False,
) -> None:
    """Run studies through the model and keep activations on disk; killed at any time, the same command continues.

    Example: sae-lens-maira harvest --config recipes/phantom.yaml

    Args:
        store: folder of the store.
        hooks: hook points, for example "[blocks.15.hook_resid_post]"; all of them in one pass.
        model: "phantom", a folder or a hub id.
        studies: phantom studies to read, unless a table is given.
        study_seed: of the phantom studies.
        table: Parquet or CSV with one study a row and columns named as the fields of `Study`.
        root: folder that the table's image paths are relative to; the table's own if not given.
        roles: tokens to keep: paper, text_only, image_only, generated_only, all, or a list of roles.
        rates: share to keep by role, for example "{image: 0.05}".
        reports: teacher (the studies' own), generated, or both.
        shard_studies: studies a shard, which is what a kill can lose.
        batch_size: studies a forward.
        dtype: of the stored rows, bfloat16 or float32.
        model_dtype: of the model's weights; auto is float32 for the phantom and bfloat16 for others.
        max_norm: drop rows with a larger norm.
        seed: of the sample of rows.
        device: auto, cpu, cuda, ...
        sae: not used here; so that a recipe of `train` can be given.
        trainer: not used here.
        out: not used here.
        provider: not used here.
        as_json: print JSON instead of text.
    """
    made = harvest_store(
        store=store,
        hooks=hooks,
        model=model,
        studies=studies,
        study_seed=study_seed,
        table=table,
        root=root,
        roles=roles,
        rates=rates,
        reports=reports,
        shard_studies=shard_studies,
        batch_size=batch_size,
        dtype=dtype,
        model_dtype=model_dtype,
        max_norm=max_norm,
        seed=seed,
        device=device,
    )
    facts = {
        "store": str(store),
        "rows": len(made),
        "shards": len(made.committed()),
        "of": made.spec.n_shards,
        "complete": made.complete,
    }
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    sys.stdout.write(f"{store}: {facts['rows']:,} rows in {facts['shards']} of {facts['of']} shards\n")


def harvest_store(
    *,
    store: Path,
    hooks: list[str],
    model: str,
    studies: int,
    study_seed: int,
    table: Path | None,
    root: Path | None,
    model_dtype: str,
    device: str,
    **settings: Any,
) -> Any:
    """Load what the words name and harvest this process's share; returns the store."""
    import torch

    from sae_lens_maira.activations import harvest as run
    from sae_lens_maira.maira2 import load_maira2
    from sae_lens_maira.phantom import generate_studies, load_phantom

    rank, size = rank_of(os.environ)
    if device == "auto":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if torch.cuda.is_available() else "cpu"
    if model == "phantom":
        maira = load_phantom(device=device)
    else:
        kind = torch.bfloat16 if model_dtype == "auto" else getattr(torch, model_dtype)
        maira = load_maira2(model, dtype=kind, device=device)
    if table is None:
        chosen = generate_studies(studies, seed=study_seed, size=maira.processor.recipe.crop)
    else:
        chosen = studies_of(table, root or table.parent)
    return run(maira, chosen, store, hooks, rank=rank, world_size=size, **settings)


def rank_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world size) from torchrun's or SLURM's variables; (0, 1) without."""
    for rank, size, first in RANK_VARIABLES:
        if rank in environment and size in environment:
            start = int(environment.get(first, 0)) if first else 0
            return int(environment[rank]) - start, int(environment[size])
    return 0, 1


def studies_of(table: Path, root: Path) -> "list[Study]":
    """Studies of a Parquet or CSV table; image paths are relative to `root`.

    Raises:
        StudyError: a column is missing or a record is not valid.
    """
    import pandas as pd

    from sae_lens_maira.errors import StudyError
    from sae_lens_maira.studies import Licence, StudyTable
    from sae_lens_maira.studies.table import COLUMNS

    if not table.exists():
        raise StudyError(f"There is no table {table}; give a Parquet or CSV file with one study a row.")
    frame = pd.read_csv(table, dtype=str) if table.suffix == ".csv" else pd.read_parquet(table)
    lacking = {"study_id", "patient_id", "frontal"} - set(frame.columns)
    if lacking:
        raise StudyError(
            f"{table} has no column {', '.join(sorted(lacking))}; name columns as the fields of Study."
        )
    if "licence" not in frame:
        frame["licence"] = Licence.CREDENTIALED.value
    frame = frame[[column for column in COLUMNS if column in frame]].astype("string").astype(object)
    rows = frame.where(frame.notna(), None).to_dict("records")
    return list(StudyTable.from_rows(rows, root).to_studies())  # pyright: ignore[reportArgumentType]: text keys


COMMANDS: dict[str, Callable[..., None]] = {"harvest": harvest}

"""The command `evaluate`: tables of an SAE's quality, computed by `evaluation`."""

import json
import sys
from pathlib import Path


def evaluate(
    sae: str,
    model: str = "phantom",
    studies: int = 100,
    study_seed: int = 10_000,
    table: Path | None = None,
    root: Path | None = None,
    split: str | None = None,
    hook: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    workers: int = 1,
    as_json: bool = False,
) -> None:
    """Evaluate an SAE: explained variance, L0, dead latents and loss recovered, per level and role.

    Example: sae-lens-maira evaluate --sae quickstart_out/sae_text --studies 100

    Args:
        sae: folder of the SAE, or a release.
        model: the model it was trained on: "phantom", a folder or a hub id.
        studies: phantom studies to read, or the first so many of a table.
        study_seed: of the phantom studies; the phantom itself was trained on 0.
        table: Parquet or CSV with one study per row, see studies import.
        root: folder that the table's relative image paths are below; the table's own if not given.
        split: read only the table's studies of this split, for example test.
        hook: hook point, if the SAE does not name its own.
        batch_size: studies per forward pass while rows are read; 1 or 2 at MAIRA-2's size on a small GPU.
        device: auto, cpu, cuda, ...; the SAE goes to the same one.
        workers: threads that read and encode images ahead of the model.
        as_json: print JSON instead of text.
    """
    from sae_lens_maira.cli.evaluation import evaluate as run
    from sae_lens_maira.errors import StudyError
    from sae_lens_maira.interface import load_sae, named_model
    from sae_lens_maira.phantom import generate_studies
    from sae_lens_maira.studies import read_table

    dictionary = load_sae(sae, hook_name=hook, device=device)
    maira = named_model(model, device=device)
    if table is None:
        chosen = generate_studies(studies, seed=study_seed, size=maira.processor.recipe.crop)
    else:
        opened = read_table(table, root)
        chosen = list((opened if split is None else opened.where(split=split)).studies[:studies])
        if not chosen:
            raise StudyError(
                f"{table} has no study in the split {split}; `studies show` counts studies by split."
            )
    tables = run(maira, dictionary, chosen, batch_size=batch_size, workers=workers)
    if as_json:
        rows, splice = (frame.to_dict("records") for frame in (tables.rows, tables.splice))
        sys.stdout.write(json.dumps({"rows": rows, "splice": splice}) + "\n")
        return
    for name, frame in (("reconstruction", tables.rows), ("spliced into the model", tables.splice)):
        sys.stdout.write(f"{name} at {tables.hook_name}, {tables.n_studies} studies\n")
        sys.stdout.write(frame.to_string(index=False, float_format=lambda x: f"{x:.4g}") + "\n")

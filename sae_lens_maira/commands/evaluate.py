"""The command `evaluate`: tables that judge an SAE, made by `evaluation`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path


def evaluate(
    sae: Path,
    model: str = "phantom",
    studies: int = 100,
    seed: int = 10_000,
    hook: str | None = None,
    device: str = "auto",
    as_json: bool = False,
) -> None:
    """Judge an SAE: explained variance, L0, dead latents and loss recovered, per level and role.

    Example: sae-lens-maira evaluate --sae quickstart_out/sae_text --studies 100

    Args:
        sae: folder of the SAE.
        model: the model it was trained on: "phantom", a folder or a hub id.
        studies: phantom studies to read.
        seed: of the studies; the phantom was trained on seed 0.
        hook: hook point, if the SAE does not name its own.
        device: auto, cpu, cuda, ...
        as_json: print JSON instead of text.
    """
    from sae_lens_maira.commands.evaluation import evaluate as run
    from sae_lens_maira.commands.models import named_model
    from sae_lens_maira.phantom import generate_studies

    maira = named_model(model, device=device)
    tables = run(maira, sae, generate_studies(studies, seed=seed, size=maira.processor.recipe.crop), hook)
    if as_json:
        rows, splice = (table.to_dict("records") for table in (tables.rows, tables.splice))
        sys.stdout.write(json.dumps({"rows": rows, "splice": splice}) + "\n")
        return
    for name, table in (("reconstruction", tables.rows), ("spliced into the model", tables.splice)):
        sys.stdout.write(f"{name} at {tables.hook_name}, {tables.n_studies} studies\n")
        sys.stdout.write(table.to_string(index=False, float_format=lambda x: f"{x:.4g}") + "\n")


COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate}

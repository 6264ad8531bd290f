"""The command `latents`: records of an SAE's latents on phantom studies."""

import json
import sys
from collections.abc import Callable
from pathlib import Path


def latents(
    sae: Path,
    out: Path,
    model: str = "phantom",
    studies: int = 200,
    seed: int = 10_000,
    hook: str | None = None,
    top: int = 20,
    control: str = "trained",
    as_json: bool = False,
) -> None:
    """Record what every latent of an SAE fires on: contexts, findings, tokens, neighbours, maps.

    Example: sae-lens-maira latents --sae quickstart_out/sae_image --out records --studies 200

    Args:
        sae: folder of the SAE.
        out: folder of the record set; made if missing.
        model: the model it was trained on: "phantom", a folder or a hub id.
        studies: phantom studies to read.
        seed: of the studies and of every draw; the phantom was trained on seed 0.
        hook: hook point, if the SAE does not name its own.
        top: contexts of largest activation to keep per latent.
        control: "trained", or "untrained" to record an untrained SAE of the same shape and sparsity instead.
        as_json: print counts as JSON instead of a table.
    """
    import torch

    from sae_lens_maira.errors import ConfigError, SAEError
    from sae_lens_maira.latents.blocks import HarvestedBlocks
    from sae_lens_maira.latents.collect import CollectConfig, collect_records
    from sae_lens_maira.maira2 import load_maira2
    from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, load_phantom
    from sae_lens_maira.sae import load_matryoshka, untrained_like

    if control not in ("trained", "untrained"):
        raise ConfigError(f'control was {control!r}; use "trained" or "untrained".')
    maira = load_phantom() if model == "phantom" else load_maira2(model, dtype=torch.float32)
    dictionary = load_matryoshka(sae)
    hook_name = hook or dictionary.cfg.metadata.hook_name
    if not hook_name:
        raise SAEError(
            "The SAE's metadata name no hook point; give --hook, for example blocks.3.hook_resid_post."
        )
    chosen = generate_studies(studies, seed=seed, size=maira.processor.recipe.crop)
    blocks = HarvestedBlocks(maira, chosen, hook_name)
    if control == "untrained":
        dictionary = untrained_like(dictionary, blocks[0][0].values, seed=seed)
    config = CollectConfig(model=model, sae=str(sae), control=control, top=top, seed=seed)
    records = collect_records(blocks, chosen, dictionary, maira, out, config, findings=FINDING_KEYS)
    counts = records.table["status"].value_counts().to_dict()
    if as_json:
        sys.stdout.write(json.dumps({"folder": str(out), "latents": len(records), "status": counts}) + "\n")
        return
    table = records.table.sort_values("f1_image", ascending=False).head(10)
    columns = ["latent", "level", "status", "finding_image", "f1_image", "finding_text", "f1_text"]
    sys.stdout.write(table[columns].to_string(index=False, float_format=lambda x: f"{x:.3f}") + "\n")
    words = ", ".join(f"{n} {status}" for status, n in counts.items())
    sys.stdout.write(f"{len(records)} latents ({words}) of {records.meta.studies} studies in {out}\n")


COMMANDS: dict[str, Callable[..., None]] = {"latents": latents}

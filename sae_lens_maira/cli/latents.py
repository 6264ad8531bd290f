"""The command `latents`: records of an SAE's latents, over phantom studies or a table, from the model or a store.

Ranks come from torchrun or SLURM, as for `harvest`; a killed collection continues when the command is given again.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_lens_maira.interface import ModelDtype, named_model

if TYPE_CHECKING:
    from sae_lens_maira.latents.source import ActivationSource
    from sae_lens_maira.maira2 import Maira2
    from sae_lens_maira.studies import Study


def latents(
    sae: Path,
    out: Path,
    model: str = "phantom",
    studies: int = 200,
    table: Path | None = None,
    root: Path | None = None,
    store: Path | None = None,
    hook: str | None = None,
    roles: str | list[str] | None = None,
    control: Literal[
        "trained", "untrained", "untrained_whitened", "raw", "frozen_decoder", "frozen_encoder"
    ] = "trained",
    latents: str | None = None,
    top: int = 20,
    per_interval: int = 5,
    zero: int = 20,
    keep_images: bool | None = None,
    image_side: int = 256,
    studies_per_block: int | None = None,
    study_seed: int = 10_000,
    seed: int | None = None,
    model_dtype: ModelDtype = "auto",
    device: str = "auto",
    as_json: bool = False,
) -> None:
    """Record what every latent of an SAE fires on: contexts, findings, tokens, neighbours, maps.

    Killed at any time, the same command continues. Under torchrun every process reads its share of the studies; the
    records are those of one process.

    Example: sae-lens-maira latents --sae quickstart_out/sae_image --out records --roles image_only

    Args:
        sae: folder of the SAE.
        out: folder of the record set; made if missing.
        model: the model it was trained on: "phantom", a folder or a hub id.
        studies: phantom studies to read, unless a table is given; those of a store are as many as it holds.
        table: Parquet or CSV with one study a row; findings are its truth, or rule labels of the reports without one.
        root: folder that the table's image paths are relative to; the table's own if not given.
        store: activations that `harvest` wrote of the same studies, instead of running the model twice.
        hook: hook point, if the SAE does not name its own.
        roles: tokens to read: image_only, paper, text_only, generated_only, all, or a list of roles; sections, report
            and image if not given.
        control: record, instead of the trained SAE, an untrained one or the residual stream's own dimensions (raw)
            with the same sparsity; untrained_whitened beside untrained for an SAE trained on whitened rows. A frozen
            control is trained (`train --control`): pass its folder as --sae.
        latents: numbers and ranges such as "0-49,77" to write records of; all if not given.
        top: contexts of largest activation to keep per latent.
        per_interval: contexts to keep per octave of activation.
        zero: contexts to keep of studies in which the latent is silent.
        keep_images: copy images also of credentialed studies (true) or of none (false).
        image_side: largest side of a copied image in pixels.
        studies_per_block: studies through the model between two looks at the disk; 32 for the phantom, else 4.
        study_seed: of the phantom studies; the phantom itself was trained on 0.
        seed: of every other draw; the study seed if not given.
        model_dtype: of the model's weights; auto is float32 for the phantom and bfloat16 for others.
        device: auto, cpu, cuda, ...
        as_json: print counts as JSON instead of a table.
    """
    from sae_lens_maira.cli.harvest import rank_of
    from sae_lens_maira.cli.numbers import numbers
    from sae_lens_maira.errors import SAEError
    from sae_lens_maira.latents.collect import CollectConfig, collect_records
    from sae_lens_maira.phantom import FINDING_KEYS
    from sae_lens_maira.sae import control_kind

    seed, wanted = study_seed if seed is None else seed, numbers(latents, "--latents")
    rank, world = rank_of(os.environ)
    maira = named_model(model, dtype=model_dtype, device=device)
    dictionary = _load_sae(sae, str(maira.model.device))
    hook_name = hook or dictionary.cfg.metadata.hook_name
    if not hook_name:
        raise SAEError(
            "The SAE's metadata name no hook point; give --hook, for example blocks.3.hook_resid_post."
        )
    size = studies_per_block or (32 if model == "phantom" else 4)
    chosen, blocks = _rows(maira, hook_name, studies, table, root, store, roles, size, study_seed)
    if control == "trained":
        control = control_kind(dictionary) or control  # pyright: ignore[reportAssignmentType] - a name in metadata
    else:
        dictionary = _stand_in(control, dictionary, blocks, seed)
    config = CollectConfig(
        model=model,
        sae=str(sae),
        control=control,
        latents=wanted,
        top=top,
        per_interval=per_interval,
        zero=zero,
        keep_images=keep_images,
        image_side=image_side,
        seed=seed,
        progress=True,
    )
    records = collect_records(
        blocks,
        chosen,
        dictionary,
        maira,
        out,
        config,
        labels=None if table is None or _has_truth(chosen) else _rule_labels,
        findings=FINDING_KEYS if table is None else None,
        rank=rank,
        world_size=world,
    )
    if rank:
        return
    counts = records.table["status"].value_counts().to_dict()
    if as_json:
        sys.stdout.write(json.dumps({"folder": str(out), "latents": len(records), "status": counts}) + "\n")
        return
    table_shown = records.table.sort_values("f1_image", ascending=False).head(10)
    columns = ["latent", "level", "status", "finding_image", "f1_image", "finding_text", "f1_text"]
    sys.stdout.write(table_shown[columns].to_string(index=False, float_format=lambda x: f"{x:.3f}") + "\n")
    words = ", ".join(f"{n} {status}" for status, n in counts.items())
    sys.stdout.write(f"{len(records)} latents ({words}) of {records.meta.studies} studies in {out}\n")


def _rows(
    maira: "Maira2",
    hook_name: str,
    number: int,
    table: Path | None,
    root: Path | None,
    store: Path | None,
    roles: str | list[str] | None,
    size: int,
    seed: int,
) -> "tuple[Sequence[Study], ActivationSource]":
    """The studies and where their rows come from."""
    from sae_lens_maira.errors import ConfigError
    from sae_lens_maira.latents.source import ModelSource, StoreSource
    from sae_lens_maira.maira2 import DEFAULT_ROLES
    from sae_lens_maira.phantom import generate_studies
    from sae_lens_maira.studies import read_table

    if store is None:
        if table is None:
            chosen = generate_studies(number, seed=seed, size=maira.processor.recipe.crop)
        else:
            chosen = read_table(table, root).studies
        kept = DEFAULT_ROLES if roles is None else roles
        return chosen, ModelSource(maira, chosen, hook_name, kept, size)
    blocks = StoreSource(store, hook_name, roles)
    ids = blocks.study_ids
    if table is None:
        chosen = generate_studies(len(ids), seed=seed, size=maira.processor.recipe.crop)
        if [study.study_id for study in chosen] != ids:
            raise ConfigError(
                f"{store} does not hold the {len(ids)} phantom studies of seed {seed}; give the --study-seed or the "
                "--table that `harvest` had."
            )
        return chosen, blocks
    opened = read_table(table, root)
    at = {study_id: row for row, study_id in enumerate(opened.frame["study_id"])}
    lacking = [study_id for study_id in ids if study_id not in at]
    if lacking:
        raise ConfigError(
            f"{table} lacks {len(lacking)} of the {len(ids)} studies of {store}, the first is {lacking[0]}; give the "
            "table that was harvested."
        )
    from sae_lens_maira.studies import StudyTable

    frame = opened.frame.iloc[[at[study_id] for study_id in ids]]
    return StudyTable.from_frame(frame, opened.root).studies, blocks


def _stand_in(control: str, dictionary: Any, blocks: "ActivationSource", seed: int) -> Any:
    """The untrained SAE or the raw dimensions, as sparse as the trained one on the rows that they are set on."""
    from sae_lens_maira.errors import ConfigError
    from sae_lens_maira.sae import make_control

    if control == "untrained_whitened":
        rows = _spread_rows(blocks, 8 * dictionary.cfg.d_in)
    else:
        rows = next((block.values for unit in range(len(blocks)) for block in blocks[unit]), None)
    if rows is None:
        raise ConfigError("There are no rows to set the control's sparsity on; give studies with reports.")
    return make_control(control, dictionary, rows, seed)


def _spread_rows(blocks: "ActivationSource", wanted: int, most_units: int = 32) -> Any:
    """About `wanted` rows of many studies, for a covariance: an even share of the first block of units far apart."""
    import torch

    n_units = min(len(blocks), most_units)
    firsts = (next(iter(blocks[i * len(blocks) // n_units]), None) for i in range(n_units))
    share = -(-wanted // max(1, n_units))
    parts = [b.values[:: max(1, len(b) // share)] for b in firsts if b is not None]
    return torch.cat(parts) if parts else None


def _load_sae(folder: Path, device: str) -> Any:
    """An SAE with its levels, or a plain one where there are none."""
    from sae_lens import SAE

    from sae_lens_maira.errors import SAEError
    from sae_lens_maira.sae import load_matryoshka

    try:
        return load_matryoshka(folder, device=device)
    except SAEError:
        if not (folder / "cfg.json").is_file():
            raise
        return SAE.load_from_disk(folder, device=device)


def _has_truth(studies: "Sequence[Study]") -> bool:
    return len(studies) > 0 and studies[0].truth is not None


def _rule_labels(study: "Study") -> list[str] | None:
    """Observations that a report states to be present; None, which is left out of scores, where it cannot be read."""
    from sae_lens_maira.studies import RuleStatus, is_unknown, rule_labels

    labels = rule_labels(study.report or "")
    if not study.report or is_unknown(labels):
        return None
    return [name for name, label in labels.items() if label.status is RuleStatus.PRESENT]

"""The command `latents`: records of an SAE's latents, over phantom studies or a table, from the model or a store.

A killed collection continues when the command is run again.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_lens_maira.cli.options import StudyOptions, numbers
from sae_lens_maira.distributed import TIMEOUT_S, distributed
from sae_lens_maira.errors import RankError
from sae_lens_maira.interface import label, load_sae, output_head, phantom_studies

if TYPE_CHECKING:
    from sae_lens_maira.activations import ActivationStore
    from sae_lens_maira.latents.source import ActivationSource, StoreSource
    from sae_lens_maira.maira2 import Maira2, OutputHead
    from sae_lens_maira.studies import Study

PHANTOM_STUDIES = 200


def latents(
    sae: str,
    out: Path,
    options: StudyOptions,
    studies: int | None = None,
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
    batch_size: int = 8,
    workers: int = 2,
    seed: int | None = None,
    rank: int | None = None,
    world: int | None = None,
    rank_timeout: float = TIMEOUT_S,
    estimate: bool = False,
    as_json: bool = False,
) -> None:
    """Record what every latent of an SAE fires on: contexts, findings, tokens, neighbours, maps.

    After a kill, run the same command again to continue. Under torchrun or srun every process reads its share of the
    studies; the records are the same as those of one process.

    Example: sae-lens-maira latents --sae quickstart_out/sae_image --out records --roles image_only

    Args:
        sae: Folder of the SAE, a release, phantom-image or phantom-text.
        out: Folder of the record set; created if missing.
        options: The model that the SAE was trained on, and the studies. Findings come from the table's truth, or from
            rule labels of the reports.
        studies: Number of phantom studies to read, unless a table is given; 200, or as many as the store contains.
        store: Activation store of the same studies, to read instead of running the model twice. If not given, the store
            that the SAE was trained on is used if it contains exactly the requested studies.
        hook: Hook point, if the SAE does not name its own.
        roles: Tokens to read: content, image_only, paper, paper_last_image, text_only, generated_only, all, or a list
            of roles; if not given, those that the SAE was trained on, else content.
        control: Record a control of the same sparsity instead of the trained SAE: untrained, raw (the dimensions of the
            residual stream), or untrained_whitened for an SAE trained on whitened rows. A frozen control is trained
            (`train --control`); pass its folder as --sae.
        latents: Numbers and ranges such as "0-49,77" to write records of; all if not given.
        top: Number of contexts of largest activation per latent.
        per_interval: Number of contexts per octave of activation.
        zero: Number of contexts of studies in which the latent does not fire.
        keep_images: Copy images also of credentialed studies (true) or of no study (false); of other studies if not
            given.
        image_side: Largest side of a copied image in pixels.
        studies_per_block: Number of studies in memory when the model reads them; 32 for the phantom, else 16.
        batch_size: Number of studies per forward pass.
        workers: Number of threads that decode and preprocess images in advance.
        seed: Random seed of all sampling; the study seed if not given.
        rank: Number of this process, instead of torchrun's or SLURM's; needs --world.
        world: Number of processes that share the work.
        rank_timeout: Seconds without a heartbeat after which a rank counts as dead.
        estimate: Print memory, disk and time for these options and stop; only the configuration and the table are read.
        as_json: Print counts as JSON instead of a table.
    """
    from sae_lens_maira.latents.collect import CollectConfig, collect_records
    from sae_lens_maira.latents.source import ModelSource
    from sae_lens_maira.maira2 import DEFAULT_ROLES
    from sae_lens_maira.phantom import FINDING_KEYS
    from sae_lens_maira.sae import control_kind

    seed, wanted = options.study_seed if seed is None else seed, numbers(latents, "--latents")
    dictionary: Any = load_sae(sae, hook_name=hook, device=options.device)
    hook_name = str(dictionary.cfg.metadata.hook_name)
    table = options.table
    kept = roles if roles is not None else dictionary.cfg.metadata.get("token_roles")
    if estimate:
        from sae_lens_maira.cli.estimate import of_latents, write_estimate

        stored = (store or _store_of(dictionary, Path(sae))) is not None
        wanted_roles = DEFAULT_ROLES if kept is None else kept
        cost = of_latents(options, dictionary, studies or PHANTOM_STUDIES, wanted_roles, stored, batch_size)
        return write_estimate(cost, as_json)
    reader: Maira2 | OutputHead
    blocks: ActivationSource
    opened = _stored(options, studies, dictionary, Path(sae), store, hook_name, kept)
    if opened is None:
        reader = options.load_model([hook_name])
        chosen = options.all_studies(studies or PHANTOM_STUDIES, reader.processor)
        per_unit = studies_per_block or (32 if options.model == "phantom" else 16)
        wanted_roles = DEFAULT_ROLES if kept is None else kept
        blocks = ModelSource(reader, chosen, hook_name, wanted_roles, per_unit, batch_size, workers)
    else:
        reader, chosen, blocks = opened
    if control == "trained":
        control = control_kind(dictionary) or control  # pyright: ignore[reportAssignmentType] - a name in metadata
    else:
        dictionary = _stand_in(control, dictionary, blocks, seed)
    config = CollectConfig(
        model=label(options.model),
        sae=label(sae),
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
    labels = None if table is None or _has_truth(chosen) else _rule_labels
    keys = FINDING_KEYS if table is None else None
    try:
        with distributed(rank, world, rank_timeout) as ranks:
            records = collect_records(blocks, chosen, dictionary, reader, out, config, labels, keys, ranks)
    except RankError as error:
        raise _explained(error, out) from error
    if ranks.rank:
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


def _explained(error: RankError, out: Path) -> RankError:
    """The error of ranks that did not meet, with a sentence if the records are already complete."""
    from sae_lens_maira.latents.recordset import META
    from sae_lens_maira.latents.workdir import NAME

    if not (out / META).is_file() or (out / NAME).exists():
        return error
    return RankError(f"{error} {out} is already complete: it holds the records of an earlier run.")


def _stored(
    options: StudyOptions,
    number: int | None,
    dictionary: Any,
    sae: Path,
    store: Path | None,
    hook_name: str,
    roles: Any,
) -> "tuple[OutputHead, Sequence[Study], StoreSource] | None":
    """Output head, studies and rows of a store; None if the model has to read the studies.

    A store that is given with --store must match. The store that the SAE was trained on is used if it contains exactly
    the requested studies; the decision is printed to stderr.
    """
    from sae_lens_maira.activations.harvesting import check_inputs
    from sae_lens_maira.errors import ConfigError, RecordError, StoreError
    from sae_lens_maira.latents.source import StoreSource

    folder = store or _store_of(dictionary, sae)
    if folder is None:
        return None
    try:
        blocks = StoreSource(folder, hook_name, roles)
        _check_studies(options, number, folder, blocks.study_ids, exactly=store is None)
        _check_model(options, blocks.store)
        head = output_head(options.model, dtype=options.model_dtype, device=options.device)
        chosen = _studies_of_store(options, head, blocks.study_ids)
        if options.table is not None:
            check_inputs(blocks.store, chosen, blocks.store.committed())
    except (ConfigError, RecordError, StoreError) as error:
        if store is not None:
            raise
        sys.stderr.write(f"The model reads the studies, since {folder} does not match: {error}\n")
        return None
    if store is None:
        sys.stderr.write(f"Activations are read from {folder}, which the SAE was trained on.\n")
    return head, chosen, blocks


def _store_of(dictionary: Any, sae: Path) -> Path | None:
    """Store that an SAE's metadata name, relative to the SAE's folder; None if there is none."""
    named = dictionary.cfg.metadata.get("activation_store")
    folder = None if not named else Path(os.path.normpath(sae / named))
    return folder if folder is not None and (folder / "store.json").is_file() else None


def _check_studies(
    options: StudyOptions, number: int | None, store: Path, ids: list[str], exactly: bool
) -> None:
    """Raise ConfigError unless a store's studies are among the requested ones, or (if required) equal to them."""
    from sae_lens_maira.errors import ConfigError
    from sae_lens_maira.studies import read_table

    if options.table is None:
        number, first = number or len(ids), phantom_studies(1, options.study_seed)[0].study_id
        if number != len(ids) or first != ids[0]:
            raise ConfigError(
                f"{store} does not contain {number} phantom studies of seed {options.study_seed}; it contains "
                f"{len(ids)}, the first is {ids[0]}. Give the --study-seed and --studies, or the --table, of its "
                "`harvest`."
            )
        return
    opened = read_table(options.table, options.root)
    table = opened if options.split is None else opened.where(split=options.split)
    there = set(table.frame["study_id"])
    lacking = [study_id for study_id in ids if study_id not in there]
    where = f"{options.table}{'' if options.split is None else f' (split {options.split})'}"
    if lacking:
        raise ConfigError(
            f"{where} lacks {len(lacking)} of the {len(ids)} studies of {store}, the first is {lacking[0]}; "
            "give the table and the split that were harvested."
        )
    if exactly and len(there) != len(ids):
        raise ConfigError(
            f"{where} has {len(there)} studies and {store} contains {len(ids)} of them; give --store to read only "
            "those, or the --split that was harvested."
        )


def _check_model(options: StudyOptions, store: "ActivationStore") -> None:
    """Raise StoreError if a store was harvested with another checkpoint or dtype than the given model."""
    from sae_lens_maira.activations.store_spec import other_model
    from sae_lens_maira.errors import StoreError

    if not store.spec.source:
        sys.stderr.write(
            f"{store.folder} does not record which checkpoint it was made with, so that is not compared.\n"
        )
        return
    if differ := other_model(store.spec.source, options.model_source()):
        raise StoreError(
            f"{store.folder} was harvested with another model: {'; '.join(differ)}. Give the --model and "
            "--model-dtype of its harvest, or another --store."
        )


def _studies_of_store(options: StudyOptions, reader: "OutputHead", ids: list[str]) -> "Sequence[Study]":
    """Studies of a store, in its order."""
    from sae_lens_maira.studies import StudyTable, read_table

    if options.table is None:
        return options.first_studies(len(ids), reader.processor)
    opened = read_table(options.table, options.root)
    at = {study_id: row for row, study_id in enumerate(opened.frame["study_id"])}
    frame = opened.frame.iloc[[at[study_id] for study_id in ids]]
    return StudyTable.from_frame(frame, opened.root).studies


def _stand_in(control: str, dictionary: Any, blocks: "ActivationSource", seed: int) -> Any:
    """Make a control (untrained SAE or raw dimensions) that is as sparse as the trained SAE on a sample of rows."""
    from sae_lens_maira.errors import ConfigError
    from sae_lens_maira.sae import make_control

    if control == "untrained_whitened":
        rows = _spread_rows(blocks, 8 * dictionary.cfg.d_in)
    else:
        rows = next((block.values for unit in range(len(blocks)) for block in blocks[unit]), None)
    if rows is None:
        raise ConfigError("There are no rows to fit the control's sparsity to; give studies with reports.")
    return make_control(control, dictionary, rows, seed)


def _spread_rows(blocks: "ActivationSource", wanted: int, most_units: int = 32) -> Any:
    """Sample about `wanted` rows of many studies, for a covariance: equal shares of units that are far apart."""
    import torch

    n_units = min(len(blocks), most_units)
    firsts = (next(iter(blocks[i * len(blocks) // n_units]), None) for i in range(n_units))
    share = -(-wanted // max(1, n_units))
    parts = [b.values[:: max(1, len(b) // share)] for b in firsts if b is not None]
    return torch.cat(parts) if parts else None


def _has_truth(studies: "Sequence[Study]") -> bool:
    return len(studies) > 0 and studies[0].truth is not None


def _rule_labels(study: "Study") -> list[str] | None:
    """Observations that a report states as present; None (left out of scores) if it cannot be read."""
    from sae_lens_maira.studies import RuleStatus, is_unknown, rule_labels

    labels = rule_labels(study.report or "")
    if not study.report or is_unknown(labels):
        return None
    return [name for name, label in labels.items() if label.status is RuleStatus.PRESENT]

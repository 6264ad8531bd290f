"""Estimates of memory, disk and time for `--estimate` of harvest, train, latents and steer.

Only the configuration, the tokenizer and the table are read, but no weights and no images.
"""

import json
import sys
from typing import Any

from sae_lens_maira.activations.harvesting import studies_that_fit
from sae_lens_maira.activations.mixing import Mixing
from sae_lens_maira.activations.store_spec import SEGMENT
from sae_lens_maira.cli.options import HarvestOptions, StudyOptions
from sae_lens_maira.costs import Cost, harvest_cost, latents_cost, steer_cost, train_cost
from sae_lens_maira.maira2.loading import load_config, load_processor
from sae_lens_maira.ranks import rank_info
from sae_lens_maira.sizing import ModelSize, StudySizes

UNLIMITED = 1e18
"""Bytes of free memory that limit no buffer."""
METHODS = 4
"""Number of methods and controls that `steer` compares, each with its own reports; approximate."""


def write_estimate(cost: Cost, as_json: bool) -> None:
    """Print a cost as text or JSON; of several processes the first one prints."""
    if rank_info().rank:
        return
    sys.stdout.write(json.dumps(cost.as_dict()) + "\n" if as_json else cost.text())


def of_harvest(options: HarvestOptions) -> Cost:
    """Estimate the cost of `harvest` on one process.

    Args:
        options: The options of the command.
    """
    size, studies = _sizes(options, options.studies)
    return harvest_cost(
        size,
        studies,
        layers=_layers(size, options.hook_names),
        hooks=len(options.hook_names),
        roles=options.roles,
        rates=options.rates,
        batch_size=options.batch_size,
        shard_studies=options.shard_studies,
        shard_bytes=options.shard_bytes,
        row_bytes=4 if options.dtype == "float32" else 2,
        reports=options.reports,
        max_new_tokens=options.max_new_tokens,
    )


def of_train(
    options: HarvestOptions,
    sae: dict[str, Any],
    trainer: dict[str, Any],
    provider: dict[str, Any] | None = None,
    shard_optimizer: bool = False,
    shard_latents: bool = False,
) -> Cost:
    """Estimate the cost of `train` per process, without the harvest, for the ranks of torchrun, SLURM or --world.

    Args:
        options: The options of the command.
        sae: Fields of the SAE's configuration, of which d_sae is used.
        trainer: Fields of SAELens' trainer configuration, of which batch size and number of samples are used.
        provider: Settings of the provider, of which buffer_rows is used.
        shard_optimizer: Whether the optimizer's state is divided over the processes.
        shard_latents: Whether the latents are.
    """
    size, studies = _sizes(options, options.studies)
    sources = studies.sources(options.reports, options.max_new_tokens)
    batch, row_bytes = int(trainer["train_batch_size_samples"]), 4 if options.dtype == "float32" else 2
    rows = sum(source.rows(options.roles, options.rates) for source in sources.values())
    asked = (provider or {}).get("buffer_rows")
    return train_cost(
        size.width,
        int(sae["d_sae"]),
        int(trainer["total_training_samples"]),
        batch,
        rows,
        buffer_rows=float(
            asked or _buffer_rows(options, rows, studies.studies, batch, size.width * row_bytes)
        ),
        row_bytes=row_bytes,
        ranks=rank_info(rank=options.rank, world=options.world).size,
        shard_optimizer=shard_optimizer,
        shard_latents=shard_latents,
        levels=len(sae.get("matryoshka_widths") or sae.get("group_fractions") or [1]),
    )


def _buffer_rows(options: HarvestOptions, rows: float, studies: int, batch: int, row_bytes: int) -> int:
    """Rows of the buffer that mixes a store of so many rows, as `StoreProvider` sizes it with memory to spare."""
    per_study = max(1.0, rows / max(1, studies))
    shard = studies_that_fit(per_study * row_bytes * len(options.hook_names), options.shard_bytes)
    mixing = Mixing(
        batch,
        max(1, -(-int(rows) // SEGMENT)),
        within=1 / min(studies, options.shard_studies or shard),
        whole=1 / studies,
    )
    return mixing.default_segments(SEGMENT * row_bytes, UNLIMITED) * SEGMENT


def of_latents(
    options: StudyOptions, sae: Any, studies: int, roles: Any, stored: bool, batch_size: int
) -> Cost:
    """Estimate the cost of `latents`.

    Args:
        options: The model and its studies.
        sae: The SAE, with its hook point.
        studies: Number of phantom studies.
        roles: Roles of the tokens that are read.
        stored: Whether rows come from a store.
        batch_size: Studies per forward.
    """
    size, counted = _sizes(options, studies)
    hook = str(sae.cfg.metadata.hook_name)
    return latents_cost(
        size,
        counted,
        layers=_layers(size, [hook]),
        d_sae=int(sae.cfg.d_sae),
        roles=roles,
        stored=stored,
        batch_size=batch_size,
    )


def of_steer(
    options: StudyOptions,
    sae: Any,
    studies: int,
    steered: int,
    strengths: int,
    max_new_tokens: int,
    controls: int = 0,
) -> Cost:
    """Estimate the cost of `steer`: every strength on the first half, the best of each method on the second.

    Args:
        options: The model and its studies.
        sae: The SAE, with its hook point.
        studies: Number of studies to read.
        steered: Studies of each half.
        strengths: Strengths of the sweep.
        max_new_tokens: Length of a report.
        controls: Number of control SAEs, each of the SAE's size and with its own sweep.
    """
    size, counted = _sizes(options, studies, all_studies=False)
    return steer_cost(
        size,
        counted,
        layers=_layers(size, [str(sae.cfg.metadata.hook_name)]),
        d_sae=int(sae.cfg.d_sae) * (1 + controls),
        steered=2 * steered,
        reports=steered * (strengths + 1) * (METHODS + controls),
        max_new_tokens=max_new_tokens,
    )


def _sizes(options: StudyOptions, studies: int, all_studies: bool = True) -> tuple[ModelSize, StudySizes]:
    config, processor = load_config(options.model), load_processor(options.model)
    read = options.all_studies if all_studies else options.first_studies
    weight_bytes = 4 if options.model_source()["dtype"] == "float32" else 2
    return ModelSize(config, weight_bytes), StudySizes.count(processor, config, read(studies, processor))


def _layers(size: ModelSize, hooks: list[str]) -> int:
    from sae_lens_maira.hooks import PointTable

    stops = [PointTable(size.config).resolve(name).stop for name in hooks]
    return size.layers if None in stops else max(stop or 0 for stop in stops)

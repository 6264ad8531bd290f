"""The command `train`: a Matryoshka SAE from a store, or straight from the model.

A store that is not complete is harvested first; it is validated before the first step, and every read is checked
again. A run that was killed continues from its newest checkpoint. It composes the activations, sae and training rooms
and computes nothing itself.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sae_lens_maira.cli.options import HarvestOptions
from sae_lens_maira.distributed import Ranks


def train(
    options: HarvestOptions,
    out: Path,
    sae: dict[str, Any],
    trainer: dict[str, Any],
    provider: dict[str, Any] | None = None,
    direct: bool = False,
    control: Literal["frozen_decoder", "soft_frozen_decoder", "frozen_encoder"] | None = None,
    as_json: bool = False,
) -> None:
    """Train a Matryoshka SAE on a store, harvesting it first where it is not complete; or straight from the model.

    Under torchrun or srun all processes train one SAE: each reads its share of the store and of every batch.

    Example: sae-lens-maira train --config recipes/phantom.yaml

    Args:
        options: what is read, and what is kept of it.
        out: folder of the SAE, which plain SAELens loads.
        sae: fields of MatryoshkaTrainingSAEConfig without d_in, for example "{d_sae: 1024, k: 16, ...}".
        trainer: fields of SAELens' SAETrainerConfig; with checkpoint_path and n_checkpoints a killed run continues.
        provider: of a store: roles, rates, buffer_rows, workers; direct: buffer_rows, mix_fraction, group.
        direct: run the model while training and keep nothing on disk; the first hook point is trained on.
        control: train a control SAE instead, with a random decoder or encoder that stays fixed (soft: within a cosine
            of 0.8); everything else as given.
        as_json: print JSON instead of text.
    """
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    from sae_lens_maira.errors import ConfigError
    from sae_lens_maira.interface import device_of, label
    from sae_lens_maira.kernels import ProcessGroupCommunicator
    from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
    from sae_lens_maira.training import FusedSAETrainer, latest_checkpoint, resume

    place = device_of(options.device)
    with options.ranks() as ranks:
        comm = ProcessGroupCommunicator(ranks, place) if ranks.size > 1 else None
        try:
            steps = SAETrainerConfig(
                **({"device": place, "logger": LoggingConfig(log_to_wandb=False)} | trainer)
            )
            made = _direct if direct else _stored
            batches, width, rows, roles = made(
                options, ranks, steps.train_batch_size_samples, place, provider or {}
            )
            torch.manual_seed(options.seed)
            chosen: dict[str, Any] = {"control": control} | sae
            config = MatryoshkaTrainingSAEConfig(d_in=width, device=place, **chosen)
        except TypeError as error:
            raise ConfigError(
                f"The parts sae, trainer and provider do not fit their configurations: {error}. Use the field names of "
                "MatryoshkaTrainingSAEConfig, of SAELens' SAETrainerConfig and of the provider."
            ) from error
        config.metadata.hook_name = options.hook_names[0]
        config.metadata.model_name = "maira2-phantom" if options.model == "phantom" else label(options.model)
        config.metadata.token_roles = roles
        if not direct:
            config.metadata.activation_store = os.path.relpath(str(options.store), out)
        dictionary = MatryoshkaTrainingSAE(config)
        run = FusedSAETrainer(cfg=steps, sae=dictionary, data_provider=batches, comm=comm)
        newest = latest_checkpoint(steps.checkpoint_path) if steps.checkpoint_path else None
        ranks.barrier("checkpoint found")
        if newest is not None:
            if not ranks.rank:
                sys.stderr.write(f"continuing from {newest}\n")
            resume(run, newest)
        run.fit()
        if ranks.rank:
            return
        dictionary.save_inference_model(out)
    if as_json:
        facts = {"sae": str(out), "rows": rows, "epochs": batches.epoch, "samples": run.n_training_samples}
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    read = "straight from the model" if rows is None else f"of {rows:,} rows"
    sys.stdout.write(f"{out}: trained at {options.hook_names[0]}, {batches.epoch} whole epochs {read}\n")


def _stored(
    options: HarvestOptions, ranks: Ranks, batch: int, place: str, settings: dict[str, Any]
) -> tuple[Any, int, int | None, str | list[str]]:
    """A provider over the store, which is harvested first where it is not complete; d_in; its rows and their roles."""
    from sae_lens_maira.activations import ActivationStore, StoreProvider
    from sae_lens_maira.cli.harvest import harvest_store
    from sae_lens_maira.errors import ConfigError, StoreError

    store, hook = options.store, options.hook_names[0]
    if store is None:
        raise ConfigError(
            "No store was named; give --store FOLDER, or --direct true to keep nothing on disk."
        )
    if not (store / "store.json").exists() or not ActivationStore(store).complete:
        harvest_store(options, ranks)
    activations = ActivationStore(store)
    if not activations.complete:
        raise StoreError(
            f"{store} has {len(activations.committed())} of {activations.spec.n_shards} shards; the other ranks of "
            "the harvest have not finished. Train when they have."
        )
    activations.validate()
    given = {"seed": options.seed, "device": place} | settings
    batches = StoreProvider(activations, hook, batch, rank=ranks.rank, world_size=ranks.size, **given)
    spec = activations.spec
    roles = _role_names(spec.rates, bool(spec.settings.get("last_image")))
    return batches, spec.hooks[hook], len(activations), roles


def _direct(
    options: HarvestOptions, ranks: Ranks, batch: int, place: str, settings: dict[str, Any]
) -> tuple[Any, int, int | None, str | list[str]]:
    """A provider that runs the model; d_in; None for the rows, which nobody counted; their roles."""
    from sae_lens_maira.activations import DirectProvider
    from sae_lens_maira.errors import ConfigError

    if ranks.size > 1:
        raise ConfigError(
            f"--direct true works in one process, and this is rank {ranks.rank} of {ranks.size}. Harvest to a store "
            "with all ranks and train on it (leave --direct out and give --store FOLDER)."
        )
    maira, studies, _ = options.load()
    given = {"seed": options.seed, "device": place, "workers": options.workers} | settings
    rows = options.row_settings()
    batches = DirectProvider(maira, studies, options.hook_names[0], batch, settings=rows, **given)
    return batches, batches.d_in, None, _role_names(rows.rates_by_name, rows.last_image)


def _role_names(rates: Mapping[str, float], last_image: bool) -> str | list[str]:
    """Roles of the rows as the SAE's metadata name them: a list, or the preset that keeps the last image tokens."""
    if last_image:
        return "paper_last_image"
    return sorted(name.upper() for name, rate in rates.items() if rate > 0)

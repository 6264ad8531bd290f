"""The command `train`: a Matryoshka SAE from a store, which is harvested first where it is not complete.

The store is validated before the first step, and every read is checked again. It composes the activations, sae and
training rooms and computes nothing itself.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def train(
    store: Path,
    hooks: list[str],
    out: Path,
    sae: dict[str, Any],
    trainer: dict[str, Any],
    provider: dict[str, Any] | None = None,
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
    as_json: bool = False,
) -> None:
    """Train a Matryoshka SAE on a store, harvesting it first where it is not complete.

    Example: sae-lens-maira train --config recipes/phantom.yaml

    Args:
        store: folder of the store.
        hooks: hook points of the store; the first one is trained on.
        out: folder of the SAE, which plain SAELens loads.
        sae: fields of MatryoshkaTrainingSAEConfig without d_in, for example "{d_sae: 1024, k: 16, ...}".
        trainer: fields of SAELens' SAETrainerConfig, for example "{total_training_samples: 1000000, ...}".
        provider: rows to use: roles, rates, buffer_rows.
        model: as in harvest.
        studies: as in harvest.
        study_seed: as in harvest.
        table: as in harvest.
        root: as in harvest.
        roles: as in harvest.
        rates: as in harvest.
        reports: as in harvest.
        shard_studies: as in harvest.
        batch_size: as in harvest; the SAE's batch is trainer's train_batch_size_samples.
        dtype: as in harvest.
        model_dtype: as in harvest.
        max_norm: as in harvest.
        seed: of the sample of rows, the shuffle and the initial weights.
        device: auto, cpu, cuda, ...
        as_json: print JSON instead of text.
    """
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    from sae_lens_maira.activations import ActivationStore, StoreProvider
    from sae_lens_maira.commands.harvest import harvest_store
    from sae_lens_maira.errors import ConfigError, StoreError
    from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
    from sae_lens_maira.training import FusedSAETrainer

    if not (store / "store.json").exists() or not ActivationStore(store).complete:
        harvest_store(
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
    activations = ActivationStore(store)
    if not activations.complete:
        raise StoreError(
            f"{store} has {len(activations.committed())} of {activations.spec.n_shards} shards; the other ranks of "
            "the harvest have not finished. Train when they have."
        )
    activations.validate()
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    hook = hooks[0]
    if hook not in activations.spec.hooks:
        raise StoreError(f"{store} holds {', '.join(activations.spec.hooks)}, not {hook}; name one of these.")
    torch.manual_seed(seed)
    try:
        config = MatryoshkaTrainingSAEConfig(d_in=activations.spec.hooks[hook], device=place, **sae)
        steps = SAETrainerConfig(**({"device": place, "logger": LoggingConfig(log_to_wandb=False)} | trainer))
    except TypeError as error:
        raise ConfigError(
            f"The parts sae and trainer do not fit their configurations: {error}. Use the field names of "
            "MatryoshkaTrainingSAEConfig and of SAELens' SAETrainerConfig."
        ) from error
    config.metadata.hook_name = hook
    config.metadata.model_name = "maira2-phantom" if model == "phantom" else model
    dictionary = MatryoshkaTrainingSAE(config)
    batches = StoreProvider(
        activations, hook, steps.train_batch_size_samples, seed=seed, device=place, **(provider or {})
    )
    FusedSAETrainer(cfg=steps, sae=dictionary, data_provider=batches).fit()
    dictionary.save_inference_model(out)
    if as_json:
        facts = {"sae": str(out), "rows": len(activations), "epochs": batches.epoch}
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    sys.stdout.write(f"{out}: trained at {hook}, {batches.epoch} whole epochs of {len(activations):,} rows\n")


COMMANDS: dict[str, Callable[..., None]] = {"train": train}

"""The command `train`: a Matryoshka SAE from a store, or straight from the model.

An incomplete store is harvested first. A stopped run continues from its newest undamaged checkpoint if its settings are
the same.
"""

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_lens_maira.cli.options import HarvestOptions, checked_fields
from sae_lens_maira.distributed import Ranks
from sae_lens_maira.errors import ConfigError, MairaError
from sae_lens_maira.io import locked

if TYPE_CHECKING:
    from sae_lens.config import SAETrainerConfig

    from sae_lens_maira.activations import ActivationStore
    from sae_lens_maira.sae import MatryoshkaTrainingSAEConfig


def train(
    options: HarvestOptions,
    out: Path,
    sae: dict[str, Any],
    trainer: dict[str, Any],
    provider: dict[str, Any] | None = None,
    direct: bool = False,
    control: Literal["frozen_decoder", "soft_frozen_decoder", "frozen_encoder"] | None = None,
    init: str | None = None,
    backend: Literal["auto", "triton", "sparse", "reference"] = "auto",
    candidates: Literal["auto", "off", "bf16", "tf32"] = "off",
    autocast: bool = False,
    sole_writer: bool = True,
    shard_optimizer: bool = False,
    shard_latents: bool = False,
    cuda_graph: bool = False,
    resume: bool = True,
    estimate: bool = False,
    as_json: bool = False,
) -> None:
    """Train a Matryoshka SAE on a store, which is harvested first if it is not complete, or directly from the model.

    Under torchrun or srun all processes train one SAE: each reads its share of the store and of every batch.

    Example: sae-lens-maira train --config recipes/phantom.yaml

    Args:
        options: What is read, and what is kept of it.
        out: Folder of the SAE, which can be loaded with plain SAELens.
        sae: Fields of MatryoshkaTrainingSAEConfig without d_in, for example "{d_sae: 1024, k: 16, ...}".
        trainer: Fields of SAELens' SAETrainerConfig; with checkpoint_path and n_checkpoints a stopped run continues,
            with "logger: {wandb_project: NAME}" it is logged to Weights & Biases.
        provider: For a store: roles, rates, buffer_rows, workers; direct: buffer_rows, mix_fraction, group.
        direct: Run the model during training and store nothing on disk; the SAE is trained at the first hook point.
        control: Train a control SAE instead, with a random decoder or encoder that stays fixed (soft: within a cosine
            of 0.8) and otherwise the same settings.
        init: Start from the weights of this SAE, a folder or a published release, instead of random ones; d_sae,
            levels and k must be the same.
        backend: Implementation of the step: triton on CUDA, sparse elsewhere (auto), or the dense reference.
        candidates: Search the largest activations with a low-precision product first and score only these in float32;
            the result is exact. auto does this where it is faster.
        autocast: Round the operands of products to bfloat16, as trainer.autocast does. Faster, but not exact.
        sole_writer: Reuse norms and bfloat16 copies that the triton optimizer made; false if other code changes the
            weights during the training.
        shard_optimizer: With several processes, divide the optimizer's state over them: a quarter to a half less memory
            per process and a shorter update. A killed process then costs the steps since the last checkpoint.
        shard_latents: With several processes, divide the latents over them: weights, gradients and optimizer state per
            process are divided by their number, and every process reads all rows of a batch from the others. For very
            wide SAEs; the SAE is the same. Not together with shard_optimizer.
        cuda_graph: Record steps without dead latents in CUDA graphs, so that the CPU queues two launches per step. Not
            yet run on a GPU. Where it is not possible the reason is printed.
        resume: Continue from the newest checkpoint; false moves existing checkpoints away and starts again.
        estimate: Print memory, disk and time for these options and stop; only the configuration and the table are read.
        as_json: Print JSON instead of text.
    """
    if estimate:
        from sae_lens_maira.cli.estimate import of_train, write_estimate

        cost = of_train(options, sae, trainer, provider, shard_optimizer, shard_latents)
        return write_estimate(cost, as_json)
    import torch

    from sae_lens_maira.interface import device_of, label
    from sae_lens_maira.kernels import ProcessGroupCommunicator, resolve_backend
    from sae_lens_maira.sae import MatryoshkaTrainingSAE
    from sae_lens_maira.training import FusedSAETrainer
    from sae_lens_maira.training.checkpoints import resume_latest, set_aside
    from sae_lens_maira.training.initial import initial_sae, start_from

    sae = _with_control(sae, control)
    place = device_of(str(trainer.get("device") or options.device))
    with options.ranks() as ranks, ExitStack() as held:
        comm = ProcessGroupCommunicator(ranks, place) if ranks.size > 1 else None
        steps = _trainer_config({"autocast": autocast} | trainer, place)
        if ranks.rank == 0:
            held.enter_context(locked(out))
            if steps.checkpoint_path is not None and Path(steps.checkpoint_path).resolve() != out.resolve():
                held.enter_context(locked(steps.checkpoint_path))
        made = _direct if direct else _stored
        batches, width, rows, roles, data = made(
            options, ranks, steps.train_batch_size_samples, place, provider or {}
        )
        torch.manual_seed(options.seed)
        config = _sae_config(sae, width, place)
        config.metadata.hook_name = options.hook_names[0]
        config.metadata.model_name = label(options.model)
        config.metadata.token_roles = roles
        if not direct:
            config.metadata.activation_store = os.path.relpath(str(options.store), out)
        if (
            shard_latents and comm is not None
        ):  # each rank takes its share to its device; rank 0 has the whole
            config.device = "meta" if ranks.rank else "cpu"
        dictionary = MatryoshkaTrainingSAE(config)
        initial = None if init is None else initial_sae(init, config)
        settings = data | {"seed": options.seed, "init": init}
        with _said_once("The settings of the trainer"):
            run = FusedSAETrainer(
                cfg=steps,
                sae=dictionary,
                data_provider=batches,
                backend=backend,
                candidates=candidates,
                sole_writer=sole_writer and resolve_backend(backend, place) == "triton",
                comm=comm,
                shard_optimizer=shard_optimizer,
                shard_latents=shard_latents,
                cuda_graph=cuda_graph,
                run_settings=settings,
            )
        if steps.checkpoint_path is not None and not resume and not ranks.rank:
            moved = set_aside(steps.checkpoint_path)
            if moved is not None:
                sys.stderr.write(f"existing checkpoints were moved to {moved}\n")
        ranks.barrier("checkpoints listed")
        newest = None
        if steps.checkpoint_path is not None and resume:
            newest = resume_latest(run, steps.checkpoint_path)
        if newest is not None and not ranks.rank:
            sys.stderr.write(f"continuing from {newest}\n")
        if newest is None and initial is not None:
            start_from(run, initial)
        del initial
        with _logged(steps, run.settings(), ranks.rank):
            run.fit()
        if ranks.rank:
            return
        dictionary.save_inference_model(out)
    if as_json:
        facts = {"sae": str(out), "rows": rows, "epochs": batches.epoch, "samples": run.n_training_samples}
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    read = "straight from the model" if rows is None else f"on {rows:,} rows"
    sys.stdout.write(f"{out}: trained at {options.hook_names[0]} {read}, whole epochs: {batches.epoch}\n")


@contextmanager
def _said_once(what: str) -> Iterator[None]:
    """Convert errors and assertions of SAELens about settings to one message."""
    try:
        yield
    except MairaError:
        raise
    except (TypeError, ValueError, AssertionError, KeyError, AttributeError) as error:
        reason = str(error).strip() or f"{type(error).__name__} in {_where(error)}"
        raise ConfigError(
            f"{what} are refused: {reason}. Use the field names and values of MatryoshkaTrainingSAEConfig (sae), of "
            "SAELens' SAETrainerConfig (trainer) and of the provider (provider)."
        ) from error


def _where(error: BaseException) -> str:
    """File, line and text of the statement that raised."""
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}, line {last.lineno}: {last.line}"


def _trainer_config(given: dict[str, Any], place: str) -> "SAETrainerConfig":
    """Make SAELens' configuration; wandb is off unless a logger is given."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    logger = given.get("logger")
    with _said_once("The settings of the trainer"):
        if isinstance(logger, dict):
            logger = LoggingConfig(**checked_fields("trainer.logger", logger, LoggingConfig))
        elif logger is None:
            logger = LoggingConfig(log_to_wandb=False)
        elif not isinstance(logger, LoggingConfig):
            raise ConfigError(
                f"trainer.logger is {logger!r}; expected fields of SAELens' LoggingConfig, for example "
                '"{wandb_project: NAME}".'
            )
        settings = checked_fields("trainer", given | {"device": place, "logger": logger}, SAETrainerConfig)
        config = SAETrainerConfig(**settings)
        for name in ("total_training_samples", "train_batch_size_samples"):
            if getattr(config, name) < 1:
                raise ConfigError(
                    f"trainer.{name} is {getattr(config, name)!r}; expected a whole number of at least 1."
                )
        if not config.lr > 0:
            raise ConfigError(f"trainer.lr is {config.lr!r}; expected a number above 0, such as 0.0003.")
        return config


def _with_control(sae: dict[str, Any], control: str | None) -> dict[str, Any]:
    """Add the control of --control to the SAE's fields.

    Raises:
        ConfigError: Both name a control, but not the same one; null in the fields counts as a control.
    """
    if control is not None and sae.get("control", control) != control:
        raise ConfigError(
            f"--control is {control!r} and sae.control is {sae['control']!r}. Give one of the two, or the same in both."
        )
    return sae if control is None else sae | {"control": control}


def _sae_config(given: dict[str, Any], width: int, place: str) -> "MatryoshkaTrainingSAEConfig":
    from sae_lens.saes.sae import SAEMetadata

    from sae_lens_maira.sae import MatryoshkaTrainingSAEConfig

    with _said_once("The settings of the SAE"):
        settings = checked_fields(
            "sae", {"d_in": width, "device": place} | given, MatryoshkaTrainingSAEConfig
        )
        if isinstance(settings.get("metadata"), dict):
            settings["metadata"] = SAEMetadata(**settings["metadata"])
        return MatryoshkaTrainingSAEConfig(**settings)


@contextmanager
def _logged(steps: "SAETrainerConfig", settings: dict[str, Any], rank: int) -> Iterator[None]:
    """Context of a Weights & Biases run, as SAELens' runners start it; does nothing if logging is off."""
    log = steps.logger
    if not log.log_to_wandb or rank:
        yield
        return
    import wandb

    try:
        wandb.init(
            project=log.wandb_project,
            entity=log.wandb_entity,
            name=log.run_name,
            id=log.wandb_id,
            resume="allow" if log.wandb_id else None,
            config=settings,
        )
    except wandb.Error as error:
        raise ConfigError(
            f"Weights & Biases did not start: {error}. Log in with `wandb login`, set WANDB_MODE=offline, or leave "
            "trainer.logger out."
        ) from error
    try:
        yield
    finally:
        wandb.finish()


def _stored(
    options: HarvestOptions, ranks: Ranks, batch: int, place: str, settings: dict[str, Any]
) -> tuple[Any, int, int | None, str | list[str], dict[str, Any]]:
    """Make a provider over the store (harvested first if incomplete); also return d_in, rows, roles, fingerprint."""
    from sae_lens_maira.activations import ActivationStore, StoreProvider
    from sae_lens_maira.activations.mixing import describe_mixing
    from sae_lens_maira.cli.store import harvest_store
    from sae_lens_maira.errors import StoreError

    store, hook = options.store, options.hook_names[0]
    if store is None:
        raise ConfigError(
            "No store was named; give --store FOLDER, or --direct true to keep nothing on disk."
        )
    complete = (store / "store.json").exists() and ActivationStore(store).complete
    ranks.barrier("store looked up")
    if not complete:
        harvest_store(options, ranks)
        activations = ActivationStore(store)
        if not activations.complete:
            raise StoreError(
                f"{store} has {len(activations.committed())} of {activations.spec.n_shards} shards; the other ranks "
                "of the harvest have not finished. Train when they have."
            )
    else:
        activations = ActivationStore(store)
        for note in options.check_store(activations, inputs=not ranks.rank):
            if not ranks.rank:
                sys.stderr.write(f"{note}\n")
        ranks.barrier("store compared")
    activations.check()
    given = {"seed": options.seed, "device": place} | settings
    with _said_once("The settings of the provider"):
        given = checked_fields("provider", given, StoreProvider)
        batches = StoreProvider(
            activations,
            hook,
            batch,
            rank=ranks.rank,
            world_size=ranks.size,
            agree=lambda rows: ranks.least("rows of the buffer", rows),
            **given,
        )
    if not ranks.rank:
        sys.stderr.write(describe_mixing(batches.mixing, batches.buffer_rows))
    spec = activations.spec
    roles = _stored_roles(activations, settings.get("roles", "all"), batches.rates)
    return batches, spec.hooks[hook], len(activations), roles, {"store": activations.fingerprint}


def _direct(
    options: HarvestOptions, ranks: Ranks, batch: int, place: str, settings: dict[str, Any]
) -> tuple[Any, int, int | None, str | list[str], dict[str, Any]]:
    """Make a provider that runs the model; also return d_in, None for the rows, their roles, and their source."""
    from sae_lens_maira.activations import DirectProvider

    if ranks.size > 1:
        raise ConfigError(
            f"--direct true works in one process, and this is rank {ranks.rank} of {ranks.size}. Harvest to a store "
            "with all ranks and train on it (leave --direct out and give --store FOLDER)."
        )
    maira, studies = options.load()
    given = {"seed": options.seed, "device": place, "workers": options.workers} | settings
    rows = options.row_settings()
    with _said_once("The settings of the provider"):
        given = checked_fields("provider", given, DirectProvider)
        batches = DirectProvider(maira, studies, options.hook_names[0], batch, settings=rows, **given)
    data = {
        "rates": rows.rates_by_name,
        "rows": rows.recorded(),
        "checkpoint": options.source()["checkpoint"],
    }
    return batches, batches.d_in, None, _role_names(rows.rates_by_name, rows.last_image), data


def _stored_roles(
    store: "ActivationStore", asked: str | Collection[str], rates: Mapping[str, float]
) -> str | list[str]:
    """Roles of the rows that a provider reads from a store, as `_role_names`.

    Args:
        store: The store.
        asked: Roles of the provider.
        rates: Role name -> rate of the provider.
    """
    # An imported store has no rates, but its manifest counts its roles.
    stored = {name for name, rate in store.spec.rates.items() if rate > 0}
    stored = stored or {role.name.lower() for role in store.role_counts()}
    if store.spec.settings.get("last_image"):
        stored.add("image")
    whole = asked == "all" and stored <= rates.keys()
    used = {name: rate for name, rate in rates.items() if name in stored}
    return _role_names(used, whole and bool(store.spec.settings.get("last_image")))


def _role_names(rates: Mapping[str, float], last_image: bool) -> str | list[str]:
    """Roles of the rows for the SAE's metadata: a list, or the preset that keeps the last image tokens."""
    if last_image:
        return "paper_last_image"
    return sorted(name.upper() for name, rate in rates.items() if rate > 0)

"""Train control SAEs: the same configuration, data and steps as an SAE, with a random, fixed decoder or encoder.

A control is compared with an SAE only if nothing else differs: same seed, batches, selection rule, levels and schedule.
See `sae.controls` for what each kind means, and for the controls that need no training.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.types import DataProvider

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.sae import (
    MatryoshkaSAE,
    MatryoshkaTrainingSAE,
    MatryoshkaTrainingSAEConfig,
    load_matryoshka,
)
from sae_lens_maira.sae.config import Frozen
from sae_lens_maira.training.trainer import FusedSAETrainer


def train_control(
    kind: str,
    sae: MatryoshkaTrainingSAEConfig,
    trainer: SAETrainerConfig,
    data: Callable[[], DataProvider],
    seed: int = 0,
    **options: Any,
) -> MatryoshkaSAE:
    """Train a frozen control of an SAE.

    Args:
        kind: "frozen_decoder", "soft_frozen_decoder" or "frozen_encoder".
        sae: Configuration of the SAE that the control is compared with.
        trainer: Configuration of the trainer of this SAE.
        data: Function that returns a fresh data provider with the batches that the SAE was trained on.
        seed: Random seed of the initial weights; the seed of the SAE gives both the same initial weights.
        **options: Further arguments of `FusedSAETrainer`.

    Raises:
        ConfigError: The kind is not a control that is trained.
    """
    if kind not in get_args(Frozen):
        raise ConfigError(
            f"The control {kind!r} is not trained; expected one of {', '.join(get_args(Frozen))}. Use "
            "sae.make_control for the others."
        )
    torch.manual_seed(seed)
    config = replace(sae, control=kind, metadata=copy.deepcopy(sae.metadata))  # pyright: ignore[reportArgumentType]
    control = MatryoshkaTrainingSAE(config)
    FusedSAETrainer(cfg=trainer, sae=control, data_provider=data(), **options).fit()
    return load_matryoshka(control)

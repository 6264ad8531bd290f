"""Builders of SAEs, of data with known sparse structure, and of both trainers on equal copies."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE
from torch._C._distributed_c10d import HashStore

from sae_lens_maira.distributed import Ranks
from sae_lens_maira.kernels import ProcessGroupCommunicator
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig


class PlantedData:
    """Batches of sparse sums of fixed directions; batch i is a function of (seed, i), so a run can be resumed."""

    def __init__(self, d_in: int, batch: int, seed: int = 0, start: int = 0, n_directions: int = 96) -> None:
        self.batch, self.seed, self.place = batch, seed, start
        directions = torch.randn(n_directions, d_in, generator=torch.Generator().manual_seed(seed))
        self.directions = torch.nn.functional.normalize(directions, dim=1)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.place + 1)
        self.place += 1
        size = (self.batch, len(self.directions))
        on = torch.rand(size, generator=generator) < 4 / len(self.directions)
        return (on * (0.5 + torch.rand(size, generator=generator))) @ self.directions + 0.3


@pytest.fixture
def make_sae() -> Callable[..., TrainingSAE[Any]]:
    """An SAE of a named class: batchtopk, saelens, ours, dictionary_learning, explicit."""

    def make(kind: str, d_in: int = 24, d_sae: int = 64, seed: int = 0, **options: Any) -> TrainingSAE[Any]:
        torch.manual_seed(seed)
        shared = {"d_in": d_in, "d_sae": d_sae, "k": 4.5, **options}
        if kind == "batchtopk":
            return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shared))
        shared.setdefault("matryoshka_widths", [8, 24, d_sae])
        if kind == "saelens":
            return MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**shared))
        if kind == "explicit":
            shared["level_weights"] = [0.2, 0.3, 1.5]
        if kind == "dictionary_learning":
            shared = {"threshold_start_step": 3, "dead_after_tokens": 100, **shared}
        shared["loss_convention"] = "saelens" if kind == "ours" else kind
        return MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**shared))

    return make


@pytest.fixture
def dense_and_fused(
    make_sae: Callable[..., TrainingSAE[Any]],
) -> Callable[..., tuple[TrainingSAE[Any], TrainingSAE[Any]]]:
    """Two equal SAEs that share nothing."""

    def make(kind: str, **options: Any) -> tuple[TrainingSAE[Any], TrainingSAE[Any]]:
        return make_sae(kind, **copy.deepcopy(options)), make_sae(kind, **copy.deepcopy(options))

    return make


@pytest.fixture
def make_config() -> Callable[..., SAETrainerConfig]:
    """A trainer configuration for so many steps."""

    def make(steps: int, batch: int = 64, **options: Any) -> SAETrainerConfig:
        settings: dict[str, Any] = {"lr": 1e-3, "lr_end": 1e-4, "dead_feature_window": 5, **options}
        return SAETrainerConfig(
            total_training_samples=steps * batch, train_batch_size_samples=batch, **settings
        )

    return make


@pytest.fixture
def planted_data() -> type[PlantedData]:
    """The class of data providers."""
    return PlantedData


@pytest.fixture
def one_rank() -> Iterator[ProcessGroupCommunicator]:
    """A process group of this process alone."""
    ranks = Ranks(0, 1, HashStore)
    yield ProcessGroupCommunicator(ranks)
    ranks.close()

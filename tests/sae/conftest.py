"""Small SAEs and activation rows that the tests of this room share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig

D_IN, D_SAE = 12, 48


@pytest.fixture
def make_rows() -> Callable[..., torch.Tensor]:
    """Rows with a low-dimensional sparse structure, so that an SAE has something to learn."""

    def make(n: int, seed: int = 0, d_in: int = D_IN, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(20, d_in, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
        codes = torch.rand(n, 20, generator=generator, dtype=torch.float64)
        codes = codes * (torch.rand(n, 20, generator=generator, dtype=torch.float64) < 0.15)
        noise = 0.05 * torch.randn(n, d_in, generator=generator, dtype=torch.float64)
        return (codes @ directions + noise + 0.5).to(dtype)

    return make


@pytest.fixture
def make_config() -> Callable[..., MatryoshkaTrainingSAEConfig]:
    def make(**changes: object) -> MatryoshkaTrainingSAEConfig:
        fields = {"d_in": D_IN, "d_sae": D_SAE, "k": 4, "matryoshka_widths": [8, 20, 48]} | changes
        return MatryoshkaTrainingSAEConfig(**fields)  # pyright: ignore[reportArgumentType] - keywords of mixed types

    return make


@pytest.fixture
def step_input() -> Callable[..., TrainStepInput]:
    def make(rows: torch.Tensor, dead: torch.Tensor | None = None, step: int = 0) -> TrainStepInput:
        return TrainStepInput(
            sae_in=rows, coefficients={}, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False
        )

    return make


@pytest.fixture
def make_trainer(make_rows: Callable[..., torch.Tensor]) -> Callable[..., SAETrainer]:
    """A trainer of SAELens' own over an endless stream of rows that starts after `skip` batches."""

    def make(
        sae: MatryoshkaTrainingSAE, steps: int = 20, batch: int = 64, skip: int = 0, **changes: object
    ) -> SAETrainer:
        def rows() -> Iterator[torch.Tensor]:
            index = skip
            while True:
                yield make_rows(batch, seed=1000 + index, dtype=sae.dtype)
                index += 1

        fields = {
            "total_training_samples": steps * batch,
            "train_batch_size_samples": batch,
            "lr": 1e-3,
            "lr_end": 1e-3,
            "logger": LoggingConfig(log_to_wandb=False),
            "n_batches_for_norm_estimate": 3,
        } | changes
        return SAETrainer(
            cfg=SAETrainerConfig(**fields),  # pyright: ignore[reportArgumentType] - keywords of mixed types
            sae=sae,
            data_provider=rows(),
        )

    return make


@pytest.fixture
def trained(
    make_config: Callable[..., MatryoshkaTrainingSAEConfig], make_trainer: Callable[..., SAETrainer]
) -> MatryoshkaTrainingSAE:
    """A briefly trained SAE whose threshold and decoder norms are away from their first values."""
    sae = MatryoshkaTrainingSAE(make_config())
    make_trainer(sae, steps=60).fit()
    return sae.eval()

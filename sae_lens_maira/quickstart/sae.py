"""Train the quickstart's SAEs with SAELens' trainer in its fused form, and read them back as users will.

The training object is thrown away after it was saved: every figure of the quickstart comes from the SAE that lies in
the folder. This module knows nothing about findings.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig

from sae_lens_maira.activations import ActivationRows, RowProvider
from sae_lens_maira.sae import (
    MatryoshkaSAE,
    MatryoshkaTrainingSAE,
    MatryoshkaTrainingSAEConfig,
    load_matryoshka,
)
from sae_lens_maira.sae.config import Frozen
from sae_lens_maira.stats import explained_variance
from sae_lens_maira.training import FusedSAETrainer

BATCH = 1024
Normalization = Literal["expected_average_only_in", "covariance_whitening"]


@dataclass(frozen=True)
class TrainedSAE:
    """A trained SAE and its Matryoshka levels.

    Attributes:
        inference: the SAE, read back from the folder that plain SAELens loads too.
        widths: cumulative level widths.
        hook_name: where it was trained.
        seed: of its initial weights.
        whitened: whether it was trained on whitened rows; the whitening is part of its weights.
    """

    inference: MatryoshkaSAE
    widths: tuple[int, ...]
    hook_name: str
    seed: int
    whitened: bool

    def encode(self, values: torch.Tensor, /) -> torch.Tensor:
        """Latent activations (n, d_sae) of rows (n, d_in), without gradients."""
        with torch.no_grad():
            return self.inference.encode(values)

    @property
    def decoder(self) -> torch.Tensor:
        """(d_sae, d_in) decoder rows."""
        return self.inference.W_dec.detach()

    def explained_variance(self, values: torch.Tensor, chunk: int = 8192) -> float:
        """Explained variance of rows (n, d_in)."""
        return explained_variance(values, lambda x: self.inference.decode(self.inference.encode(x)), chunk)


def level_widths(d_sae: int) -> tuple[int, ...]:
    """Cumulative widths of four levels: 1/16, 3/16, 1/2 and all of the dictionary."""
    return (d_sae // 16, 3 * d_sae // 16, d_sae // 2, d_sae)


def train_sae(
    rows: ActivationRows,
    d_sae: int,
    k: float,
    steps: int,
    seed: int,
    folder: Path,
    lr: float = 1e-3,
    dead_after: int = 1000,
    normalize: Normalization = "expected_average_only_in",
    control: Frozen | None = None,
) -> TrainedSAE:
    """Train a Matryoshka BatchTopK SAE on rows and save it to `folder`.

    Args:
        rows: the training rows.
        d_sae: latents.
        k: mean active latents per row.
        steps: steps of 1,024 rows.
        seed: of the initial weights and of the shuffle.
        folder: where the inference SAE is saved; plain SAELens loads it from there.
        lr: learning rate; it falls to 0 over the last fifth of the steps.
        dead_after: steps without firing after which a latent counts as dead and helps with the residual.
        normalize: SAELens' `normalize_activations`, of the two kinds that it folds into the weights.
            "covariance_whitening" gives every direction of the rows the same variance, so that rare ones get latents.
        control: train a control instead, whose decoder or encoder stays random.
    """
    torch.manual_seed(seed)
    widths = level_widths(d_sae)
    config = MatryoshkaTrainingSAEConfig(
        d_in=rows.values.shape[1],
        d_sae=d_sae,
        k=k,
        matryoshka_widths=list(widths),
        normalize_activations=normalize,
        device="cpu",
        control=control,
    )
    config.metadata.hook_name = rows.hook_name
    config.metadata.model_name = "maira2-phantom"
    sae = MatryoshkaTrainingSAE(config)
    trainer = FusedSAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * BATCH,
            train_batch_size_samples=BATCH,
            device="cpu",
            lr=lr,
            lr_end=0.0,
            lr_scheduler_name="constant",
            lr_warm_up_steps=min(100, steps // 10),
            lr_decay_steps=steps // 5,
            dead_feature_window=dead_after,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=RowProvider(rows.values, BATCH, seed),
        evaluator=None,
    )
    trainer.fit()
    sae.save_inference_model(folder)
    whitened = normalize == "covariance_whitening"
    return TrainedSAE(load_matryoshka(folder), widths, rows.hook_name, seed, whitened)

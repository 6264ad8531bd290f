"""What the step benchmark compares: one problem size, and every way to train on it.

SAELens' trainer with its defaults, SAELens tuned by what torch offers, and ours. All arms start from equal weights, use
equal settings and see the same batches, a new one in every step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.training.trainer import FusedSAETrainer

MakeTrainer = Callable[["Shape", SAETrainerConfig], SAETrainer[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One problem size."""

    d_in: int
    d_sae: int
    batch: int
    k: float
    widths: tuple[int, ...]
    device: str
    autocast: bool
    zipf: bool = False
    """Whether a few latents fire on most tokens and most hardly ever, as in trained SAEs."""

    def sae(self) -> MatryoshkaBatchTopKTrainingSAE:
        """A fresh SAE with unequal decoder norms and non-zero biases, the same every time."""
        torch.manual_seed(0)
        cfg = MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=self.d_in,
            d_sae=self.d_sae,
            k=self.k,
            matryoshka_widths=list(self.widths),
            device=self.device,
        )
        sae = MatryoshkaBatchTopKTrainingSAE(cfg)
        with torch.no_grad():
            sae.W_dec.mul_(0.5 + torch.rand(self.d_sae, 1, device=self.device))
            sae.b_enc.normal_(0, 0.02)
            sae.b_dec.normal_(0, 0.02)
            if self.zipf:
                rank = 1 + torch.randperm(self.d_sae, device=self.device).float()
                sae.b_enc.add_(2.5 - 0.75 * rank.log())
        return sae

    def rows(self, number: int = 0) -> torch.Tensor:
        """One of the batches."""
        generator = torch.Generator().manual_seed(1 + number)
        return torch.randn(self.batch, self.d_in, generator=generator).to(self.device)


class Arm:
    """One way to train, with its own SAE; the same optimisation settings as the others."""

    def __init__(
        self, shape: Shape, make: MakeTrainer, autocast: bool | None = None, tf32: bool = False
    ) -> None:
        """Builds the trainer.

        Args:
            shape: Problem size.
            make: The trainer from the size and a configuration.
            autocast: None means as the shape says.
            tf32: Whether float32 products may use TF32 while this arm runs.
        """
        self.shape, self.tf32 = shape, tf32
        cfg = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=shape.batch,
            lr=1e-4,
            lr_end=1e-4,
            device=shape.device,
            autocast=shape.autocast if autocast is None else autocast,
            dead_feature_window=10**6,
        )
        # Arms differ in class: only ours has a backend.
        self.trainer: Any = make(shape, cfg)

    def step(self, x: torch.Tensor, n_dead: int) -> None:
        """One whole step; `n_dead` evenly spaced latents count as dead."""
        silent = self.trainer.n_forward_passes_since_fired
        silent.zero_()
        if n_dead:
            silent[:: max(1, self.shape.d_sae // n_dead)][:n_dead] = 2.0 * 10**6
        if self.tf32:
            torch.set_float32_matmul_precision("high")
        self.trainer._train_step(self.trainer.sae, x)
        if self.tf32:
            torch.set_float32_matmul_precision("highest")


def _saelens(shape: Shape, cfg: SAETrainerConfig) -> SAETrainer[Any, Any]:
    return SAETrainer(cfg, shape.sae(), iter(()))


def _saelens_fused_adam(shape: Shape, cfg: SAETrainerConfig) -> SAETrainer[Any, Any]:
    trainer = _saelens(shape, cfg)
    for group in trainer.optimizer.param_groups:
        group["fused"] = True
    return trainer


def _saelens_compiled(shape: Shape, cfg: SAETrainerConfig) -> SAETrainer[Any, Any]:
    trainer = _saelens_fused_adam(shape, cfg)
    vars(trainer.sae)["training_forward_pass"] = torch.compile(trainer.sae.training_forward_pass)
    return trainer


def _ours(shape: Shape, cfg: SAETrainerConfig) -> SAETrainer[Any, Any]:
    return FusedSAETrainer(cfg, shape.sae(), iter(()))


def _ours_candidates(shape: Shape, cfg: SAETrainerConfig) -> SAETrainer[Any, Any]:
    return FusedSAETrainer(
        cfg, shape.sae(), iter(()), candidates="tf32" if shape.device == "cuda" else "bf16"
    )


def _ours_sole_writer(shape: Shape, cfg: SAETrainerConfig) -> SAETrainer[Any, Any]:
    return FusedSAETrainer(cfg, shape.sae(), iter(()), sole_writer=True)


def arms_for(shape: Shape) -> dict[str, Arm]:
    """What is compared on this device; "saelens" and "fused" are always there."""
    arms = {"saelens": Arm(shape, _saelens), "saelens_fused_adam": Arm(shape, _saelens_fused_adam)}
    if shape.device == "cuda":
        arms["saelens_tf32"] = Arm(shape, _saelens_fused_adam, autocast=False, tf32=True)
        arms["saelens_autocast"] = Arm(shape, _saelens_fused_adam, autocast=True)
        arms["saelens_autocast_compiled"] = Arm(shape, _saelens_compiled, autocast=True)
    arms["fused"] = Arm(shape, _ours)
    if not shape.autocast:
        arms["fused_candidates"] = Arm(shape, _ours_candidates)
        if shape.device == "cuda":
            arms["fused_autocast"] = Arm(shape, _ours, autocast=True)
            arms["fused_autocast_sole_writer"] = Arm(shape, _ours_sole_writer, autocast=True)
    return arms

"""The problem of the step benchmark and the ways to train that it compares.

Every arm has its own SAE, equal weights at the start, the same optimisation settings and the same batches. Data are
Gaussian and every step has a new batch, so that no threshold is known beforehand; with `zipf` a few latents fire on
most tokens and most latents hardly ever, as in trained SAEs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.training import FusedSAETrainer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One problem size.

    Attributes:
        d_in: Width of the rows.
        d_sae: Number of latents.
        batch: Rows per batch.
        k: Active latents per row, on average.
        device: "cpu" or "cuda".
        widths: Cumulative widths of the levels; a sixteenth, three sixteenths, a half and all of d_sae if empty.
        zipf: Whether a few latents fire on most tokens: the most frequent 1/64 take 0.55 of the kept entries at
            (1024, 8192, 1024, 32), in trained SAEs 0.12 to 0.6.
    """

    d_in: int
    d_sae: int
    batch: int
    k: float
    device: str
    widths: tuple[int, ...] = ()
    zipf: bool = False

    @property
    def levels(self) -> list[int]:
        """Cumulative widths of the levels."""
        return list(self.widths) or [self.d_sae * share // 16 for share in (1, 3, 8, 16)]

    @property
    def dead(self) -> dict[str, int]:
        """Number of dead latents by setting: none, 2,048 and 8,192 at d_in 4,096 and d_sae 16,384."""
        return {"idle": 0, "on": self.d_in // 2, "many": self.d_sae // 2}

    def sae(self) -> MatryoshkaBatchTopKTrainingSAE:
        """A new SAE with unequal decoder norms and non-zero biases, the same every time."""
        torch.manual_seed(0)
        cfg = MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=self.d_in, d_sae=self.d_sae, k=self.k, matryoshka_widths=self.levels, device=self.device
        )
        sae = MatryoshkaBatchTopKTrainingSAE(cfg)
        with torch.no_grad():
            sae.W_dec.mul_(0.5 + torch.rand(self.d_sae, 1, device=self.device))
            sae.b_enc.normal_(0, 0.02)
            sae.b_dec.normal_(0, 0.02)
            if self.zipf:
                rank = 1 + torch.randperm(self.d_sae, device=self.device).float()
                spread = sae.W_enc.norm(dim=0).mean()  # standard deviation of a score without bias
                sae.b_enc.add_(spread * (1.65 - 0.5 * rank.log()))
        return sae

    def rows(self, number: int = 0) -> torch.Tensor:
        """Batch `number`, (batch, d_in)."""
        generator = torch.Generator(self.device).manual_seed(1 + number)
        return torch.randn(self.batch, self.d_in, generator=generator, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train.

    Attributes:
        label: Name in tables.
        ours: Whether `FusedSAETrainer` trains, instead of SAELens' trainer.
        devices: Devices on which it runs unless arms are named.
        adam: Whether SAELens' trainer uses torch's fused Adam.
        tf32: Whether products may use TF32.
        compiled: Whether torch.compile compiles SAELens' forward pass.
        autocast: Whether products run in bfloat16.
        candidates: Whether the largest activations are searched in low precision first.
        settings: Further arguments of `FusedSAETrainer`.
    """

    label: str
    ours: bool = False
    devices: tuple[str, ...] = ("cuda",)
    adam: bool = True
    tf32: bool = False
    compiled: bool = False
    autocast: bool = False
    candidates: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


_BOTH = ("cpu", "cuda")
_SOLE = {"sole_writer": True}
_GRAPH = {"sole_writer": True, "cuda_graph": True}
ARMS: dict[str, Way] = {
    "saelens": Way(label="SAELens, default", devices=_BOTH, adam=False),
    "saelens_fused_adam": Way(label="SAELens, fused Adam", devices=_BOTH),
    "saelens_compiled": Way(label="SAELens, fused Adam, compiled", devices=(), compiled=True),
    "saelens_tf32": Way(label="SAELens, fused Adam, TF32", tf32=True),
    "saelens_autocast": Way(label="SAELens, fused Adam, autocast", autocast=True),
    "saelens_autocast_compiled": Way(
        label="SAELens, fused Adam, autocast, compiled", autocast=True, compiled=True
    ),
    "fused": Way(label="this package", ours=True, devices=_BOTH),
    "fused_candidates": Way(
        label="this package, low-precision candidates (exact)", ours=True, devices=_BOTH, candidates=True
    ),
    "fused_candidates_sole_writer": Way(
        label="this package, candidates, sole writer", ours=True, candidates=True, settings=_SOLE
    ),
    "fused_candidates_graphs": Way(
        label="this package, candidates, CUDA graphs",
        ours=True,
        devices=(),
        candidates=True,
        settings=_GRAPH,
    ),
    "fused_autocast": Way(label="this package, autocast", ours=True, devices=(), autocast=True),
    "fused_autocast_sole_writer": Way(
        label="this package, autocast, sole writer", ours=True, autocast=True, settings=_SOLE
    ),
    "fused_autocast_graphs": Way(
        label="this package, autocast, CUDA graphs", ours=True, devices=(), autocast=True, settings=_GRAPH
    ),
}
"""Every way, by the name that `bench step --arms` takes."""
ONLY_CUDA = ("tf32", "sole_writer", "graphs")


class Arm:
    """A trainer of one way; `step` runs one whole step.

    Attributes:
        way: What it is.
        trainer: `SAETrainer` or `FusedSAETrainer`.
    """

    def __init__(self, shape: Shape, way: Way) -> None:
        self.way, self._d_sae = way, shape.d_sae
        cfg = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=shape.batch,
            lr=1e-4,
            lr_end=1e-4,
            device=shape.device,
            autocast=way.autocast,
            dead_feature_window=10**6,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer: Any
        if way.ours:
            candidates = "off" if not way.candidates else "tf32" if shape.device == "cuda" else "bf16"
            self.trainer = FusedSAETrainer(cfg, shape.sae(), iter(()), candidates=candidates, **way.settings)
            return
        self.trainer = SAETrainer(cfg, shape.sae(), iter(()))
        for group in self.trainer.optimizer.param_groups if way.adam else ():
            group["fused"] = True
        sae = self.trainer.sae
        if way.compiled:
            vars(sae)["training_forward_pass"] = torch.compile(sae.training_forward_pass)

    def step(self, x: torch.Tensor, n_dead: int = 0) -> None:
        """Forward, backward, clip, Adam, schedules, statistics; `n_dead` evenly spaced latents count as dead."""
        silent = self.trainer.n_forward_passes_since_fired
        silent.zero_()
        if n_dead:
            silent[:: max(1, self._d_sae // n_dead)][:n_dead] = 2.0 * 10**6
        torch.set_float32_matmul_precision("high" if self.way.tf32 else "highest")
        self.trainer._train_step(self.trainer.sae, x)
        torch.set_float32_matmul_precision("highest")


def chosen_arms(names: Sequence[str], device: str) -> dict[str, Way]:
    """The ways of some names, with "saelens" and "fused" always among them.

    Args:
        names: Names of `ARMS`, or "all"; those that `Way.devices` names for the device if empty.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: A way runs on CUDA only.
    """
    runs = {n: way for n, way in ARMS.items() if device == "cuda" or not any(word in n for word in ONLY_CUDA)}
    if not names:
        return {n: way for n, way in runs.items() if device in way.devices}
    if "all" in names:
        return runs
    if impossible := [n for n in names if n not in runs]:
        raise ConfigError(
            f"{', '.join(impossible)} cannot run on a CPU. Name others of {', '.join(runs)}, or use --device cuda."
        )
    return {n: way for n, way in runs.items() if n in ("saelens", "fused", *names)}


__all__ = ["ARMS", "Arm", "Shape", "Way", "chosen_arms"]

"""Train the quickstart's SAEs with the fused trainer of SAELens, and load them from their folders.

Every figure of the quickstart comes from the saved SAE, not from the object that was trained. `train_saes` trains
several SAEs in as many processes as there are cores; each uses one thread, so that the weights do not depend on the
number of cores.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from joblib import Parallel, delayed
from sae_lens.config import LoggingConfig, SAETrainerConfig
from tqdm.auto import tqdm

from sae_lens_maira.activations import ActivationRows, RowProvider
from sae_lens_maira.maira2.loading import PHANTOM
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
        inference: The SAE, loaded from its folder, which plain SAELens loads too.
        widths: Cumulative level widths.
        hook_name: Hook point at which it was trained.
        seed: Random seed of its initial weights.
        whitened: Whether it was trained on whitened rows; the whitening is part of its weights.
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


@dataclass(frozen=True)
class TrainingPlan:
    """How one SAE is trained.

    Attributes:
        folder: Folder of the inference SAE; plain SAELens loads it from there.
        d_sae: Number of latents.
        k: Mean number of active latents per row.
        steps: Training steps of 1,024 rows.
        seed: Random seed of the initial weights and of the shuffle.
        lr: Learning rate; it falls to 0 over the last fifth of the steps.
        dead_after: Steps without activation after which a latent counts as dead and is trained on the residual.
        normalize: SAELens' `normalize_activations`, of the two kinds that it folds into the weights.
            "covariance_whitening" gives every direction of the rows the same variance, so that rare ones get latents.
        control: Train a control instead, whose decoder or encoder stays random.
        data_decoder: Start the decoder at centred rows of the data instead of random directions; a frozen decoder then
            consists of data.
    """

    folder: Path
    d_sae: int
    k: float
    steps: int
    seed: int
    lr: float = 1e-3
    dead_after: int = 1000
    normalize: Normalization = "expected_average_only_in"
    control: Frozen | None = None
    data_decoder: bool = False


def train_saes(
    jobs: Sequence[tuple[ActivationRows, TrainingPlan]], workers: int | None = None, progress: bool = True
) -> list[TrainedSAE]:
    """Train SAEs in parallel processes.

    Args:
        jobs: Rows and the plan of each SAE.
        workers: Number of processes; by default one per core, and one for jobs of less than 1,000 steps in all, for
            which starting processes would take longer than training.
        progress: Show a progress bar over the SAEs.

    Returns:
        The SAEs, in the order of `jobs`, each loaded from its folder.
    """
    if workers is None:
        small = sum(plan.steps for _, plan in jobs) < 1000
        workers = 1 if small else min(os.cpu_count() or 1, len(jobs))
    arrays = {id(rows): rows.values.numpy() for rows, _ in jobs}  # shared by the processes
    # The processes read this at their start: their progress bars would overwrite each other.
    quiet = "TQDM_DISABLE" in os.environ
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        run = Parallel(n_jobs=workers, pre_dispatch="all", return_as="generator")
        done = run(delayed(_train)(arrays[id(rows)], rows.hook_name, plan) for rows, plan in jobs)
        for _ in tqdm(done, "training SAEs", len(jobs), unit="SAE", disable=not progress):
            pass
    finally:
        if not quiet:
            del os.environ["TQDM_DISABLE"]
    return [_load(rows.hook_name, plan) for rows, plan in jobs]


def train_sae(rows: ActivationRows, plan: TrainingPlan) -> TrainedSAE:
    """Train one Matryoshka BatchTopK SAE on rows, in this process, and load it from its folder."""
    return train_saes([(rows, plan)], workers=1, progress=False)[0]


def _load(hook_name: str, plan: TrainingPlan) -> TrainedSAE:
    whitened = plan.normalize == "covariance_whitening"
    return TrainedSAE(load_matryoshka(plan.folder), level_widths(plan.d_sae), hook_name, plan.seed, whitened)


def _train(values: np.ndarray, hook_name: str, plan: TrainingPlan) -> None:
    """Train on values (n, d_in) and save the inference SAE."""
    with _one_thread():
        torch.manual_seed(plan.seed)
        config = MatryoshkaTrainingSAEConfig(
            d_in=values.shape[1],
            d_sae=plan.d_sae,
            k=plan.k,
            matryoshka_widths=list(level_widths(plan.d_sae)),
            normalize_activations=plan.normalize,
            device="cpu",
            control=plan.control,
        )
        config.metadata.hook_name = hook_name
        config.metadata.model_name = PHANTOM
        sae = MatryoshkaTrainingSAE(config)
        if plan.data_decoder:
            _start_at_rows(sae, torch.tensor(values))
        trainer = FusedSAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=plan.steps * BATCH,
                train_batch_size_samples=BATCH,
                device="cpu",
                lr=plan.lr,
                lr_end=0.0,
                lr_scheduler_name="constant",
                lr_warm_up_steps=min(100, plan.steps // 10),
                lr_decay_steps=plan.steps // 5,
                dead_feature_window=plan.dead_after,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            sae=sae,
            data_provider=RowProvider(torch.tensor(values), BATCH, plan.seed),
            evaluator=None,
        )
        trainer.fit()
        sae.save_inference_model(plan.folder)


@torch.no_grad()
def _start_at_rows(sae: MatryoshkaTrainingSAE, values: torch.Tensor) -> None:
    """Set decoder rows to directions of randomly drawn, centred rows (n, d_in), and the encoder to the transpose."""
    drawn = values[torch.randperm(len(values))[: sae.cfg.d_sae]] - values.mean(0)
    norms = sae.W_dec.norm(dim=1, keepdim=True)[: len(drawn)]
    sae.W_dec[: len(drawn)] = norms * torch.nn.functional.normalize(drawn, dim=1)
    sae.W_enc.copy_(sae.W_dec.T)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""Checks of a trainer's input rows, and scaling factors that are equal on all ranks.

The cause of a loss that is not finite is reported before any weight changes. The norm or covariance by which inputs are
scaled is computed over the rows of all ranks.
"""

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationWhitening
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.errors import SAEError
from sae_lens_maira.kernels import Communicator, ProcessGroupCommunicator
from sae_lens_maira.sae.whitening import Moments, pca_whitening


def not_finite_error(sae: TrainingSAE[Any], x: torch.Tensor, step: int) -> SAEError:
    """Make the error for a loss that is not finite, which names the rows of x (rows, d_in) or weights that cause it."""
    bad_rows = int((~torch.isfinite(x)).any(dim=1).sum())
    bad = [name for name, p in sae.named_parameters() if not bool(torch.isfinite(p).all())]
    found = f"{bad_rows} of {len(x)} rows of the batch contain NaN or infinity"
    if bad:
        found += f", and so do {', '.join(bad)}"
    elif not bad_rows:
        found = "rows and weights here are finite, so a product overflowed or another rank's rows are bad"
    return SAEError(
        f"The loss of step {step} is not finite: {found}. No weight was changed by this step. Drop or repair such "
        "rows where activations are harvested, or resume from the last checkpoint."
    )


def agree_on_scaling(trainer: SAETrainer[Any, Any], comm: Communicator) -> None:
    """Estimate scaling or whitening over the rows of all ranks, before SAELens does so over this rank's rows only."""
    kind, d_in, scaler = (
        trainer.sae.cfg.normalize_activations,
        trainer.sae.cfg.d_in,
        trainer.activation_scaler,
    )
    if kind == "covariance_whitening" and scaler.whitening is None:
        scaler.whitening = _whitening_of_all_ranks(trainer, comm)
    if kind == "expected_average_only_in" and scaler.scaling_factor is None:
        batches = (next(trainer.data_provider) for _ in range(trainer.cfg.n_batches_for_norm_estimate))
        norms = (batch.reshape(-1, d_in).norm(dim=-1).double() for batch in batches)
        sums = torch.tensor([[float(norm.sum()), len(norm)] for norm in norms], dtype=torch.float64)
        total, count = comm.sum_(sums.sum(dim=0)).tolist()
        scaler.scaling_factor = d_in**0.5 * count / total


def _whitening_of_all_ranks(trainer: SAETrainer[Any, Any], comm: Communicator) -> ActivationWhitening:
    """Whitening by mean and covariance of `n_batches_for_norm_estimate` batches of every rank.

    Moments are summed over ranks in float64. Rank 0 sends its matrices to all ranks, since the signs of the axes are
    arbitrary.
    """
    d_in = trainer.sae.cfg.d_in
    moments = Moments.none(d_in, trainer.sae.device)
    for _ in range(trainer.cfg.n_batches_for_norm_estimate):
        moments.add(next(trainer.data_provider).reshape(-1, d_in))
    for part in (moments.count, moments.total, moments.outer):
        comm.sum_(part)
    whitening = pca_whitening(moments)
    if isinstance(comm, ProcessGroupCommunicator):
        for matrix in (whitening.mean, whitening.matrix, whitening.inverse_matrix):
            comm.broadcast_(matrix)
    return whitening

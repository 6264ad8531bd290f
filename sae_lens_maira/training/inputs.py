"""What can be wrong with the rows that a trainer is fed, and how ranks agree on their scale.

A loss that is not finite is traced to its cause before any weight changes. The norm that inputs are scaled by is the
mean over all ranks' rows. It knows nothing about kernels.
"""

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.errors import SAEError
from sae_lens_maira.training.distributed import ProcessGroupCommunicator


def not_finite_error(sae: TrainingSAE[Any], x: torch.Tensor, step: int) -> SAEError:
    """The error for a loss that is not finite: which rows (rows, d_in) or weights it comes from."""
    bad_rows = int((~torch.isfinite(x)).any(dim=1).sum())
    bad = [name for name, p in sae.named_parameters() if not bool(torch.isfinite(p).all())]
    found = f"{bad_rows} of {len(x)} rows of the batch hold NaN or infinity"
    if bad:
        found += f", and so do {', '.join(bad)}"
    elif not bad_rows:
        found = "rows and weights here are finite, so a product overflowed or another rank's rows are bad"
    return SAEError(
        f"The loss of step {step} is not finite: {found}. No weight was changed by this step. Drop or repair such "
        "rows where activations are harvested, or resume from the last checkpoint."
    )


def agree_on_scaling(trainer: SAETrainer[Any, Any], comm: ProcessGroupCommunicator) -> None:
    """Estimates the activation scaling over the rows of all ranks, before SAELens would do so over this rank's.

    Raises:
        SAEError: whitening would have to be estimated, which one rank's rows do not allow.
    """
    kind, d_in, scaler = (
        trainer.sae.cfg.normalize_activations,
        trainer.sae.cfg.d_in,
        trainer.activation_scaler,
    )
    if kind == "covariance_whitening" and scaler.whitening is None:
        raise SAEError(
            "normalize_activations='covariance_whitening' cannot be estimated over several ranks, since each sees its "
            "own rows. Estimate it in one process and resume from that checkpoint."
        )
    if kind == "expected_average_only_in" and scaler.scaling_factor is None:
        scaler.estimate_scaling_factor(d_in, trainer.data_provider, trainer.cfg.n_batches_for_norm_estimate)
        assert scaler.scaling_factor is not None  # just estimated
        mean_norm = torch.tensor(d_in**0.5 / scaler.scaling_factor, dtype=torch.float64)
        scaler.scaling_factor = d_in**0.5 * comm.size / float(comm.sum_(mean_norm))

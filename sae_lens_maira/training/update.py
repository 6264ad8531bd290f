"""From the gradients of a step to changed weights: the optimizer of a trainer, clipping, and what the next step reuses.

    buffers of the matrices' gradients -> part along rows removed, where rows have norm 1 -> clip -> Adam

W_enc and its gradient are stored as (d_sae, d_in), as W_dec.
"""

from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE

from sae_lens_maira.kernels import (
    Gradients,
    LocalCommunicator,
    ProcessGroupCommunicator,
    StepResult,
    Workspace,
)
from sae_lens_maira.sae import MatryoshkaTrainingSAE
from sae_lens_maira.training.architectures import StepPlan
from sae_lens_maira.training.optimizer import RowMajorAdam
from sae_lens_maira.training.sharded_optimizer import LatentAdam, ShardedAdam

MAX_GRADIENT_NORM = 1.0
"""SAELens' fixed clipping norm."""


def make_optimizer(
    sae: TrainingSAE[Any],
    cfg: SAETrainerConfig,
    comm: ProcessGroupCommunicator | LocalCommunicator,
    backend: str,
    sole_writer: bool,
    shard_optimizer: bool,
    shard_latents: bool,
) -> RowMajorAdam:
    """The Adam of a trainer.

    Args:
        sae: The SAE, with this rank's latents only if they are divided.
        cfg: Learning rate and decay rates.
        comm: The other ranks.
        backend: The backend that runs.
        sole_writer: Whether bfloat16 copies may be kept for the next step.
        shard_optimizer: Whether moments are divided over ranks.
        shard_latents: Whether latents are divided over ranks.
    """
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    if isinstance(comm, ProcessGroupCommunicator) and (shard_latents or shard_optimizer):
        optimizer = (LatentAdam if shard_latents else ShardedAdam)(sae, cfg.lr, betas, comm)
    else:
        optimizer = RowMajorAdam(sae.parameters(), cfg.lr, betas)
    optimizer.use_triton = backend == "triton"
    every_row = not isinstance(optimizer, ShardedAdam)
    optimizer.keep_bf16 = cfg.autocast and sole_writer and every_row
    holds_unit_rows = isinstance(sae, MatryoshkaTrainingSAE) and sae.has_unit_decoder
    if holds_unit_rows and optimizer.use_triton and every_row and sae.dtype == torch.float32:
        optimizer.unit.add(sae.W_dec)
    return optimizer


def gradient_buffers(sae: Any, workspace: Workspace) -> Gradients:
    """Buffers that a step writes the matrices' gradients to."""
    shape, like = tuple(sae.W_dec.shape), sae.W_dec.detach()
    W_enc_t, W_dec = (workspace.buffer(f"gradient of {n}", shape, like) for n in ("W_enc", "W_dec"))
    return Gradients(W_enc_t, sae.b_enc.detach(), W_dec, sae.b_dec.detach())


def rows_are_unit(optimizer: RowMajorAdam, sae: Any, workspace: Workspace) -> bool:
    """Whether the optimizer has just divided decoder rows by their norms, and they have not changed since."""
    known = workspace.refreshed.get("W_dec")
    return bool(optimizer.unit) and known is not None and known.is_of(sae.W_dec)


@torch.no_grad()
def apply_gradients(
    optimizer: RowMajorAdam, plan: StepPlan, result: StepResult, workspace: Workspace | None
) -> None:
    """Change the weights.

    Args:
        optimizer: Adam over the SAE's parameters.
        plan: The step.
        result: Its gradients.
        workspace: Receives norms and bfloat16 copies for the next step, where nothing else writes to the weights.
    """
    sae, gradients = plan.sae, result.gradients
    if sae.W_dec not in optimizer.unit:
        rows = optimizer.rows if isinstance(optimizer, ShardedAdam) else slice(None)
        plan.adjust_(gradients.W_dec, rows)
    for parameter, gradient in (
        (sae.W_enc, gradients.W_enc_t.T if sae.W_enc.requires_grad else None),
        (sae.b_enc, gradients.b_enc),
        (sae.W_dec, gradients.W_dec),
        (sae.b_dec, gradients.b_dec),
    ):
        parameter.grad = gradient if parameter.requires_grad else None
    roots = () if result.squares is None else result.squares.sqrt().unbind()
    known = dict(zip((sae.W_dec, sae.W_enc), roots, strict=False))
    if plan.unit_decoder:  # the squares are those of the gradient before `adjust_`
        known.pop(sae.W_dec, None)
    optimizer.clip_(MAX_GRADIENT_NORM, known)
    optimizer.step()
    if workspace is not None:
        left = {name: optimizer.refreshed.get(getattr(sae, name)) for name in ("W_enc", "W_dec")}
        workspace.refreshed |= {name: value for name, value in left.items() if value is not None}
    optimizer.zero_grad()
    plan.constrain_()

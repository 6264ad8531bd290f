"""Auxiliary loss on dead latents, as dense products over the dead columns only.

    z = h[:, dead] (k_aux largest per token),   e = z W_dec[dead] - residual,   aux = a mean_b |e|^2

Unlike the main loss this is not sparse, since thousands of dead latents are used per token. With the `nd` dead latents
gathered, each product costs nd / d_sae of a dense one. With nd <= k_aux no ranking is needed. The decoder norms cancel
here as well. Under autocast the four products round their operands to bfloat16, as in SAELens.
"""

from typing import Protocol

import torch

from sae_lens_maira.kernels.comm import Communicator, Division
from sae_lens_maira.kernels.own_latents import largest, own_dead
from sae_lens_maira.kernels.problem import StepSpec
from sae_lens_maira.kernels.sparse import LatentGradients


class Columns(Protocol):
    """Protocol of scores whose columns can be read individually."""

    norms: torch.Tensor | None

    def columns(self, latents: torch.Tensor) -> torch.Tensor:
        """Return h (rows, latents) of some latents."""
        ...


def add_aux_loss(
    spec: StepSpec,
    dead: torch.Tensor,
    n_dead: list[int],
    scores: Columns,
    xc: torch.Tensor,
    W_dec: torch.Tensor,
    errors: list[torch.Tensor],
    tokens: int,
    division: Division,
    grads: LatentGradients,
) -> torch.Tensor:
    """Adds the auxiliary gradients to `grads` in place; the loss of this rank's rows, 0-d float64.

    Args:
        spec: Settings of the step.
        dead: (d_sae,) boolean, of all ranks' latents.
        n_dead: Number of dead latents: below each level's width for kind "matryoshka", else in total.
        scores: Source of h for the dead columns of this rank's latents.
        xc: (B, d_in) centred input.
        W_dec: (latents of this rank, d_in).
        errors: e_l = reconstruction - x (B, d_in): of every level for kind "matryoshka", else of the last level.
        tokens: Number of rows over all ranks.
        division: The ranks that have other rows or other latents.
        grads: Gradients to add to.
    """
    own = n_dead
    if division.latents.size > 1:
        dead, own = own_dead(dead, spec, division.latents)
    total = torch.zeros((), dtype=torch.float64, device=xc.device)
    # A stable sort puts the dead latents first, in order, without reading their number from the device.
    latents = dead.to(torch.uint8).sort(descending=True, stable=True).indices[: own[-1]]
    errors = errors if spec.aux.kind == "matryoshka" else errors[-1:]
    for first, last, before, until, error in zip((0, *own), own, (0, *n_dead), n_dead, errors, strict=False):
        if before < until:
            inside = latents[first:last]
            total += _add_span(
                spec, inside, until - before, scores, xc, W_dec, error, tokens, division, grads
            )
    return total


def _add_span(
    spec: StepSpec,
    latents: torch.Tensor,
    n_dead: int,
    scores: Columns,
    xc: torch.Tensor,
    W_dec: torch.Tensor,
    error: torch.Tensor,
    tokens: int,
    division: Division,
    grads: LatentGradients,
) -> torch.Tensor:
    """Adds the gradients of some of this rank's dead latents, of `n_dead` in all; the loss."""
    aux = spec.aux
    k_aux = aux.k_aux if aux.k_aux is not None else xc.shape[1] // 2
    z = scores.columns(latents)
    alive = None
    if aux.kind == "dictionary_learning":
        alive = z > 0
        z = z.relu_()
    if n_dead > k_aux:
        ranked = z if scores.norms is None else z * scores.norms[latents]
        chosen = largest(ranked, k_aux, division.latents)
        alive = chosen if alive is None else alive & chosen
        z = z * chosen
    rows = W_dec[latents]
    product = _half_product if spec.autocast else torch.mm
    # z W_dec - residual, since residual = -error.
    if spec.autocast or division.latents.size > 1:
        off = error + division.latents.sum_(product(z, rows))
    else:
        off = torch.addmm(error, z, rows)
    squared = torch.linalg.vector_norm(off, dim=1).double().square_().sum()
    if aux.kind == "dictionary_learning":
        scale = aux.coefficient / _spread(error, tokens, division.rows)
        scale = torch.where(
            torch.isfinite(scale), scale, 0.0
        )  # for a constant residual dictionary_learning gives 0
        gradient = off.mul_((2 * scale / tokens).to(off.dtype))
    else:
        scale = aux.coefficient * min(n_dead / k_aux, 1.0)
        gradient = off.mul_(2 * scale / tokens)
    dz = product(gradient, rows.T)
    if alive is not None:
        dz *= alive
    if grads.W_dec.numel():  # empty where the matrix is frozen
        grads.W_dec.index_add_(0, latents, product(z.T, gradient))
    if grads.W_enc_t.numel():
        grads.W_enc_t.index_add_(0, latents, product(dz.T, xc))
    grads.b_enc.index_add_(0, latents, dz.sum(dim=0))
    return squared * scale / tokens


def _half_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply with operands rounded to bfloat16, as under autocast; the result has the type of the left operand."""
    return (left.to(torch.bfloat16) @ right.to(torch.bfloat16)).to(left.dtype)


def _spread(error: torch.Tensor, tokens: int, comm: Communicator) -> torch.Tensor:
    """Mean squared distance of the residuals from their mean over the whole batch, 0-d float64."""
    mean = comm.sum_(error.sum(dim=0, dtype=torch.float64)) / tokens
    away = torch.linalg.vector_norm(error - mean.to(error.dtype), dim=1)
    return comm.sum_(away.double().square_().sum()) / tokens

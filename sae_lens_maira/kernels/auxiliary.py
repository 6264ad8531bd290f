"""The auxiliary loss on dead latents, as dense products over the dead columns only.

    z = h[:, dead] (k_aux largest per token),   e = z W_dec[dead] - residual,   aux = a mean_b |e|^2

Unlike the main path this is not sparse: thousands of dead latents fire per token. With all `nd` dead latents
gathered, each product costs nd / d_sae of a dense one, and with nd <= k_aux nothing has to be ranked at all.
Norms cancel here as well. It knows nothing about how latents were found dead.
"""

import torch

from sae_lens_maira.kernels.comm import Communicator
from sae_lens_maira.kernels.problem import AuxSpec, StepSpec
from sae_lens_maira.kernels.scores import BoundedScores, DenseScores
from sae_lens_maira.kernels.sparse import LatentGradients


def add_aux_loss(
    spec: StepSpec,
    dead: torch.Tensor,
    scores: DenseScores | BoundedScores,
    xc: torch.Tensor,
    W_dec: torch.Tensor,
    errors: list[torch.Tensor],
    tokens: int,
    comm: Communicator,
    grads: LatentGradients,
) -> torch.Tensor:
    """Adds the auxiliary gradients to `grads` in place; this rank's share of the loss, 0-d float64.

    Args:
        spec: The step.
        dead: (d_sae,) boolean.
        scores: Source of h for the dead columns.
        xc: (B, d_in) centred input.
        W_dec: (d_sae, d_in).
        errors: e_l = reconstruction - x (B, d_in): of every level for kind "matryoshka", else of the last
            one.
        tokens: Rows over all ranks.
        comm: Reductions over ranks.
        grads: Gradients to add to.
    """
    total = torch.zeros((), dtype=torch.float64, device=xc.device)
    latents = dead.nonzero().squeeze(1)
    if spec.aux.kind == "matryoshka":
        spans = list(zip((0, *spec.widths), spec.widths, errors, strict=False))
    else:
        spans = [(0, spec.widths[-1], errors[-1])]
    for start, stop, error in spans:
        inside = latents[(latents >= start) & (latents < stop)]
        if len(inside):
            total += _add_span(spec.aux, inside, scores, xc, W_dec, error, tokens, comm, grads)
    return total


def _add_span(
    aux: AuxSpec,
    latents: torch.Tensor,
    scores: DenseScores | BoundedScores,
    xc: torch.Tensor,
    W_dec: torch.Tensor,
    error: torch.Tensor,
    tokens: int,
    comm: Communicator,
    grads: LatentGradients,
) -> torch.Tensor:
    k_aux = aux.k_aux if aux.k_aux is not None else xc.shape[1] // 2
    z = scores.columns(latents)
    alive = None
    if aux.kind == "dictionary_learning":
        alive = z > 0
        z = z.relu_()
    if len(latents) > k_aux:
        ranked = z if scores.norms is None else z * scores.norms[latents]
        top = ranked.topk(k_aux, dim=-1, sorted=False).indices
        chosen = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, top, True)
        alive = chosen if alive is None else alive & chosen
        z = z * chosen
    rows = W_dec[latents]
    off = torch.addmm(error, z, rows)  # z W_dec - residual, since residual = -error
    squared = torch.linalg.vector_norm(off, dim=1).double().square_().sum()
    if aux.kind == "dictionary_learning":
        scale = aux.coefficient / _spread(error, tokens, comm)
        if not bool(torch.isfinite(scale)):  # a constant residual: that library's nan_to_num gives 0
            return torch.zeros_like(squared)
    else:
        scale = torch.tensor(aux.coefficient * min(len(latents) / k_aux, 1.0), dtype=torch.float64)
    gradient = off.mul_(float(2 * scale / tokens))
    dz = gradient @ rows.T
    if alive is not None:
        dz *= alive
    if grads.W_dec.numel():  # empty where the matrix is frozen
        grads.W_dec.index_add_(0, latents, z.T @ gradient)
    if grads.W_enc_t.numel():
        grads.W_enc_t.index_add_(0, latents, dz.T @ xc)
    grads.b_enc.index_add_(0, latents, dz.sum(dim=0))
    return squared * scale.to(squared.device) / tokens


def _spread(error: torch.Tensor, tokens: int, comm: Communicator) -> torch.Tensor:
    """Mean squared distance of the residuals from their mean over the whole batch, 0-d float64."""
    mean = comm.sum_(error.sum(dim=0, dtype=torch.float64)) / tokens
    away = torch.linalg.vector_norm(error - mean.to(error.dtype), dim=1)
    return comm.sum_(away.double().square_().sum()) / tokens

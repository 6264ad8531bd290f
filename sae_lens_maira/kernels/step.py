"""The step, stage by stage: encode, select, lay out, decode, go back, auxiliary loss, biases.

    db_enc[j] = sum_b dh[b, j],     db_dec = sum_b S_0[b] - W_enc db_enc   (second term if x is centred)

so the input's gradient, a full product in SAELens, is one matrix-vector product. The stages are the same on
every backend; `Stages` says which implementation of the two passes over kept entries runs. Sums over ranks
happen here, and before anything that outlives the step is changed. It knows nothing about optimisers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels import sparse
from sae_lens_maira.kernels.auxiliary import add_aux_loss
from sae_lens_maira.kernels.comm import Communicator
from sae_lens_maira.kernels.layout import build_layout
from sae_lens_maira.kernels.problem import DeadMask, Gradients, SparseActs, StepResult, StepSpec, Weights
from sae_lens_maira.kernels.scores import BoundedScores, DenseScores
from sae_lens_maira.kernels.selection import select
from sae_lens_maira.kernels.sparse import Decoded, LatentGradients


class Stages(NamedTuple):
    """One backend's implementation of the passes over kept entries."""

    name: str
    dense_scores: Callable[[torch.Tensor, torch.Tensor | None], DenseScores]
    prefix_decode: Callable[..., Decoded]
    latent_backward: Callable[..., LatentGradients]
    bf16_operands: bool = False
    """Whether the passes read bfloat16 copies of W_dec, S and xc under autocast, for half the traffic."""
    scores_by_latent: bool = False
    """Whether `dense_scores` takes scores stored latent by latent, which MKL makes in a sixth less time (Zen 3)."""


SPARSE = Stages("sparse", DenseScores, sparse.prefix_decode, sparse.latent_backward, scores_by_latent=True)


class Refreshed(NamedTuple):
    """What an optimiser computed from a weight (d_sae, d_in) while it had it in hand."""

    norms: torch.Tensor
    """(d_sae,) row norms."""
    shadow: torch.Tensor | None
    """(d_sae, d_in) bfloat16 copy."""
    pointer: int
    version: int

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether the weight is still the tensor that this came from, unchanged as far as torch counts changes."""
        return weight.data_ptr() == self.pointer and weight._version == self.version


class Workspace:
    """Buffers that live from step to step, and the last threshold. Losing it costs time, never exactness."""

    def __init__(self) -> None:
        self.threshold: float | None = None
        self.refreshed: dict[str, Refreshed] = {}
        self._buffers: dict[str, torch.Tensor] = {}

    def norms(self, W_dec: torch.Tensor) -> torch.Tensor:
        """(d_sae,) row norms, from the optimiser's pass if it left them."""
        known = self.refreshed.get("W_dec")
        return (
            known.norms
            if known is not None and known.is_of(W_dec)
            else torch.linalg.vector_norm(W_dec, dim=1)
        )

    def bf16(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A bfloat16 copy of a (d_sae, d_in) weight, from the optimiser's pass if it left one."""
        known = self.refreshed.get(name)
        if known is not None and known.shadow is not None and known.is_of(weight):
            return known.shadow
        return weight.to(torch.bfloat16)

    def buffer(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of this shape, the same storage as last time if it fits."""
        found = self._buffers.get(name)
        if found is None or found.shape != shape or found.dtype != like.dtype or found.device != like.device:
            found = torch.empty(shape, dtype=like.dtype, device=like.device)
            self._buffers[name] = found
        return found


@torch.no_grad()
def run_stages(
    stages: Stages,
    weights: Weights,
    x: torch.Tensor,
    spec: StepSpec,
    dead: DeadMask,
    workspace: Workspace,
    comm: Communicator,
    gradients: Gradients | None = None,
) -> StepResult:
    """Losses and gradients of one batch on one backend; see `dispatch.fused_step`."""
    batch, d_sae = x.shape[0], weights.W_dec.shape[0]
    tokens = sum(comm.counts(batch))
    n = spec.count(tokens)
    if n > tokens * d_sae:
        raise BackendError(
            f"k = {spec.k} asks for {n} entries of a batch of {tokens} tokens and {d_sae} latents, which has "
            f"{tokens * d_sae}. Expected k <= d_sae."
        )
    xc = x - weights.b_dec if spec.centre else x
    norms = workspace.norms(weights.W_dec) if spec.rescale else None
    scores = _encode(stages, weights, xc, norms, spec, workspace)
    selection = select(scores, n, tokens, comm, workspace.threshold)
    workspace.threshold = selection.threshold or workspace.threshold

    layout = build_layout(selection.flat, batch, d_sae, spec.widths)
    scales = tuple(2 * weight / tokens for weight in spec.weights_of_levels)
    per_level = spec.aux.kind == "matryoshka" and dead is not None
    halve = spec.autocast and stages.bf16_operands
    W_dec, operand = (workspace.bf16("W_dec", weights.W_dec), xc.bfloat16()) if halve else (weights.W_dec, xc)
    decoded = stages.prefix_decode(layout, selection.h, W_dec, weights.b_dec, x, scales, per_level)
    out = None if gradients is None else (gradients.W_dec, gradients.W_enc_t)
    grads = stages.latent_backward(layout, selection.h, decoded.suffix, operand, W_dec, out, spec.frozen)
    db_dec = decoded.suffix[:, 0].sum(dim=0, dtype=x.dtype)
    level_losses = comm.sum_(decoded.squared) / tokens
    fired = comm.sum_(layout.fired)

    mask = dead if dead is None or isinstance(dead, torch.Tensor) else dead(fired)
    aux_loss = torch.zeros((), dtype=torch.float64, device=x.device)
    if mask is not None and spec.aux.kind != "none" and bool(mask.any()):
        aux_loss = add_aux_loss(spec, mask, scores, xc, weights.W_dec, decoded.errors, tokens, comm, grads)
        aux_loss = comm.sum_(aux_loss)

    if spec.centre:
        db_dec -= weights.W_enc @ grads.b_enc
    for gradient in (grads.W_dec, grads.W_enc_t, grads.b_enc, db_dec):
        comm.sum_(gradient)
    smallest = selection.values.min() if len(selection.values) else x.new_tensor(torch.inf)
    loss = (level_losses * level_losses.new_tensor(spec.weights_of_levels)).sum() + aux_loss
    # Comparisons drop NaN silently; a dense step would carry it into the loss, and so does this one.
    loss = loss + scores.poison() + (0 if norms is None else norms.sum() * 0)
    return StepResult(
        loss=loss.to(x.dtype),
        level_losses=level_losses.to(x.dtype),
        aux_loss=aux_loss.to(x.dtype),
        sae_out=decoded.errors[-1].add_(x),
        acts=SparseActs(layout.rows, layout.cols, selection.values, (batch, d_sae)),
        gradients=Gradients(grads.W_enc_t, grads.b_enc, grads.W_dec, db_dec),
        fired=fired,
        min_positive=comm.min_(smallest),
        tokens=tokens,
        backend=stages.name,
    )


def _encode(
    stages: Stages,
    weights: Weights,
    xc: torch.Tensor,
    norms: torch.Tensor | None,
    spec: StepSpec,
    workspace: Workspace,
) -> DenseScores | BoundedScores:
    if spec.candidates != "off":
        if spec.candidates == "tf32" and xc.device.type != "cuda":
            raise BackendError(
                f"candidates='tf32' was asked for on a {xc.device.type} device; only CUDA has TF32. "
                "Use 'bf16' or 'off'."
            )
        if xc.dtype != torch.float32:
            raise BackendError(
                f"Exact low-precision candidates are for float32 SAEs; this one is {xc.dtype}."
            )
        return BoundedScores(xc, weights.W_enc, weights.b_enc, norms, spec.candidates, workspace.buffer)
    rows, d_sae = xc.shape[0], weights.W_dec.shape[0]
    if stages.scores_by_latent and xc.device.type == "cpu" and not spec.autocast:
        by_latent = workspace.buffer("h", (d_sae, rows), xc)
        torch.addmm(weights.b_enc[:, None], weights.W_enc.T, xc.T, out=by_latent)
        return stages.dense_scores(by_latent.T, norms)
    h = workspace.buffer("h", (rows, d_sae), xc)
    if spec.autocast:
        product = xc.to(torch.bfloat16) @ workspace.bf16("W_enc", weights.W_enc.T).T
        torch.add(product, weights.b_enc, out=h)
    else:
        torch.addmm(weights.b_enc, xc, weights.W_enc, out=h)
    return stages.dense_scores(h, norms)

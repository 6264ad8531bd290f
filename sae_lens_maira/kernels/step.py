"""The step, stage by stage: encode, select, lay out, decode, go back, auxiliary loss, biases.

    db_enc[j] = sum_b dh[b, j],     db_dec = sum_b S_0[b] - W_enc db_enc   (second term if x is centred)

so the input's gradient, a full product in SAELens, is one matrix-vector product. The order of stages is the same on
every backend; `Stages` says which implementation of each runs. A selection on a GPU may be an attempt: everything up
to the gradients is launched, then its check and the number of dead latents are read, once. Sums over ranks happen
here, and before anything that outlives the step is changed. Ranks have other rows of the batch, or other latents (see
`own_latents`).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels import scores, sparse
from sae_lens_maira.kernels.auxiliary import add_aux_loss
from sae_lens_maira.kernels.comm import Communicator, Division, LocalCommunicator
from sae_lens_maira.kernels.layout import constants
from sae_lens_maira.kernels.own_latents import decode_over_ranks, of_all_latents, own_spec
from sae_lens_maira.kernels.problem import DeadMask, Gradients, SparseActs, StepResult, StepSpec, Weights
from sae_lens_maira.kernels.selection import Selected, refuse_broken, select_and_lay_out
from sae_lens_maira.kernels.sparse import Decoded, LatentGradients
from sae_lens_maira.kernels.workspace import Workspace


class Stages(NamedTuple):
    """One backend's implementation of the stages; `encode` makes what its `select` searches."""

    name: str
    encode: Callable[..., Any]
    select: Callable[..., Iterator[Selected]]
    prefix_decode: Callable[..., Decoded]
    latent_backward: Callable[..., LatentGradients]
    bf16_operands: bool = False
    """Whether the passes read bfloat16 copies of W_dec, S and xc under autocast, for half the traffic."""


SPARSE = Stages("sparse", scores.encode, select_and_lay_out, sparse.prefix_decode, sparse.latent_backward)


class Attempt(NamedTuple):
    """The passes over one selection, and what the rest of the step needs of them."""

    batch: int
    tokens: int
    xc: torch.Tensor
    found: Any
    kept: Selected
    decoded: Decoded
    grads: LatentGradients
    fired: torch.Tensor
    dead: torch.Tensor | None


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
    own_rows: bool = False,
    own_latents: bool = False,
) -> StepResult:
    """Losses and gradients of one batch on one backend; see `dispatch.fused_step`."""
    division = Division.of(comm, own_latents)
    for attempt in _attempts(stages, weights, x, spec, dead, workspace, division, gradients):
        numbers = _numbers(attempt, spec)
        found = None if numbers is None else numbers.tolist()
        right, n_dead = _read(found, attempt.kept.check is not None)
        if right:
            break
    else:
        raise AssertionError("the last attempt of a selection is right")
    workspace.threshold = attempt.kept.threshold
    return _finish(stages, weights, x, spec, division, attempt, n_dead, own_rows)


@torch.no_grad()
def first_attempt(
    stages: Stages,
    weights: Weights,
    x: torch.Tensor,
    spec: StepSpec,
    dead: DeadMask,
    workspace: Workspace,
    gradients: Gradients,
) -> tuple[StepResult, torch.Tensor, torch.Tensor]:
    """The step as if its first selection were right and no latent dead; sizes are fixed and nothing is read back.

    `workspace.threshold` has to be on the device.

    Returns:
        The result; the threshold for the next step; and numbers (int64): whether the selection is right, three more
        of it, the number of dead latents (of each level, if levels have their own), and whether the loss is finite.
    """
    alone = Division.of(LocalCommunicator(), own_latents=False)
    attempt = next(_attempts(stages, weights, x, spec, dead, workspace, alone, gradients))
    result = _finish(stages, weights, x, spec, alone, attempt, [0], own_rows=False)
    numbers, threshold = _numbers(attempt, spec), attempt.kept.threshold
    assert numbers is not None
    assert isinstance(threshold, torch.Tensor)
    return result, threshold, torch.cat((numbers, result.loss.isfinite().view(1).to(numbers.dtype)))


def _attempts(
    stages: Stages,
    weights: Weights,
    x: torch.Tensor,
    spec: StepSpec,
    dead: DeadMask,
    workspace: Workspace,
    division: Division,
    gradients: Gradients | None,
) -> Iterator[Attempt]:
    """Encode, then select, decode and go back, once or more often; the first attempt is right as a rule."""
    rows, latents = division
    batch, d_sae = x.shape[0], spec.widths[-1]
    tokens = sum(rows.counts(batch))
    n = spec.count(tokens)
    if n > tokens * d_sae:
        raise BackendError(
            f"k = {spec.k} asks for {n} entries of a batch of {tokens} tokens and {d_sae} latents, which has "
            f"{tokens * d_sae}. Expected k <= d_sae."
        )
    xc = x - weights.b_dec if spec.centre else x
    norms = workspace.norms(weights.W_dec) if spec.rescale else None
    _check_candidates(spec, xc)
    scales = tuple(2 * weight / tokens for weight in spec.weights_of_levels)
    per_level = spec.aux.kind == "matryoshka" and dead is not None
    halve = spec.autocast and stages.bf16_operands
    W_dec, operand = (workspace.bf16("W_dec", weights.W_dec), xc.bfloat16()) if halve else (weights.W_dec, xc)
    found = stages.encode(weights, xc, operand, norms, spec, workspace)
    out = None if gradients is None else (gradients.W_dec, gradients.W_enc_t)
    # To the selection, the same rows of another share of the latents are more rows.
    scored, widths = tokens * latents.size, own_spec(spec, latents).widths
    for kept in stages.select(found, n, scored, division.ranks, workspace, widths):
        layout = kept.layout
        inputs = layout, kept.h, W_dec, weights.b_dec, x, scales
        if latents.size > 1:
            decoded = decode_over_ranks(stages.prefix_decode, *inputs, latents)
        else:
            decoded = stages.prefix_decode(*inputs, per_level)
        grads = stages.latent_backward(layout, kept.h, decoded.suffix, operand, W_dec, out, spec.frozen)
        fired = of_all_latents(rows.sum_(layout.fired), d_sae, latents)
        mask = dead if dead is None or isinstance(dead, torch.Tensor) else dead(fired)
        yield Attempt(batch, tokens, xc, found, kept, decoded, grads, fired, mask)


def _finish(
    stages: Stages,
    weights: Weights,
    x: torch.Tensor,
    spec: StepSpec,
    division: Division,
    attempt: Attempt,
    n_dead: list[int],
    own_rows: bool,
) -> StepResult:
    """Losses, the auxiliary loss, biases and sums over ranks."""
    batch, tokens, xc, found, kept, decoded, grads, fired, mask = attempt
    layout, (rows, latents) = kept.layout, division
    db_dec = decoded.suffix[:, 0].sum(dim=0, dtype=x.dtype)
    squared = rows.sum_(decoded.squared)
    level_losses = torch.div(squared, tokens, out=x.new_empty(spec.levels))
    loss = squared.dot(constants(tuple(w / tokens for w in spec.weights_of_levels), squared.dtype, x.device))
    aux_loss = constants((0.0,), x.dtype, x.device)[0]
    squares = grads.squares if rows.size == 1 else None
    if mask is not None and n_dead[-1]:
        aux_loss = rows.sum_(
            add_aux_loss(
                spec, mask, n_dead, found, xc, weights.W_dec, decoded.errors, tokens, division, grads
            )
        )
        squares = None  # of gradients before the auxiliary loss
        loss = loss + aux_loss

    pending = [rows.start_sum_(matrix, own_rows) for matrix in (grads.W_dec, grads.W_enc_t)]
    if latents.rank > 0:  # all ranks have the same rows, so their sum enters once
        db_dec.zero_()
    if spec.centre:
        db_dec.addmv_(weights.W_enc, grads.b_enc, alpha=-1)
    rows.sum_(grads.b_enc)
    division.ranks.sum_(db_dec)
    # Comparisons drop NaN silently; a dense step would carry it into the loss, and so does this one.
    loss = torch.add(loss, latents.sum_(found.poison()), out=x.new_empty(()))
    for sums in pending:
        sums.wait()
    cols = layout.cols if latents.size == 1 else layout.cols * latents.size + latents.rank
    smallest = kept.smallest if division.ranks.size == 1 else division.ranks.min_(kept.smallest.clone())
    return StepResult(
        loss=loss,
        level_losses=level_losses,
        aux_loss=aux_loss.to(x.dtype),
        sae_out=decoded.errors[-1].add_(x),
        acts=SparseActs(layout.rows, cols, kept.values, (batch, spec.widths[-1])),
        gradients=Gradients(grads.W_enc_t, grads.b_enc, grads.W_dec, db_dec),
        squares=squares,
        fired=fired,
        min_positive=smallest,
        tokens=tokens,
        n_dead=n_dead[-1],
        backend=stages.name,
    )


def _numbers(attempt: Attempt, spec: StepSpec) -> torch.Tensor | None:
    """What the host has to know of an attempt, int64: its check, and how many latents are dead.

    The latter are those below each level's width where levels have auxiliary losses of their own, else one number.
    """
    dead, numbers = attempt.dead, []
    if attempt.kept.check is not None:
        numbers.append(attempt.kept.check)
    if dead is not None and spec.aux.kind == "matryoshka":
        ends = constants(tuple(width - 1 for width in spec.widths), torch.int64, dead.device)
        numbers.append(dead.cumsum(0)[ends])
    elif dead is not None and spec.aux.kind != "none":
        numbers.append(dead.sum().view(1))
    if not numbers:
        return None
    return numbers[0] if len(numbers) == 1 else torch.cat(numbers)


def _read(found: list[int] | None, checked: bool) -> tuple[bool, list[int]]:
    """Whether a selection is right, and how many latents are dead, from `_numbers`."""
    if found is None or not checked:
        return True, found or [0]
    right, _, _, broken = found[:4]
    refuse_broken(broken)
    return bool(right), found[4:] or [0]


def _check_candidates(spec: StepSpec, xc: torch.Tensor) -> None:
    if spec.candidates == "off":
        return
    if spec.candidates == "tf32" and xc.device.type != "cuda":
        raise BackendError(
            f"candidates='tf32' was requested on a {xc.device.type} device; only CUDA has TF32. Use 'bf16' or 'off'."
        )
    if xc.dtype != torch.float32:
        raise BackendError(f"Exact low-precision candidates are for float32 SAEs; this one is {xc.dtype}.")

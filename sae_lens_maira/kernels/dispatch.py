"""Choose and run a backend of the fused step.

`auto` is triton on a CUDA device with triton installed, and sparse everywhere else. Any other name runs that backend or
raises an error with the reason; there is no silent fallback. With TRITON_INTERPRET=1 triton's interpreter runs the
kernels on a CPU, for tests.
"""

import importlib.util
import logging
import os
from typing import Literal, get_args

import torch

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels.comm import Communicator, LocalCommunicator
from sae_lens_maira.kernels.own_latents import own_spec
from sae_lens_maira.kernels.problem import (
    AskedCandidates,
    Candidates,
    DeadMask,
    Gradients,
    StepResult,
    StepSpec,
    Weights,
)
from sae_lens_maira.kernels.reference import reference_step
from sae_lens_maira.kernels.step import SPARSE, run_stages
from sae_lens_maira.kernels.workspace import Workspace

Backend = Literal["auto", "triton", "sparse", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

WIDE_ENOUGH = 512
"""Smallest d_in for which candidates save time on a CPU."""

logger = logging.getLogger(__name__)
_said: list[str] = []


def resolve_backend(backend: str, device: torch.device | str) -> Literal["triton", "sparse", "reference"]:
    """Choose the backend for a name and a device.

    Raises:
        BackendError: The name is unknown, or triton was requested where it cannot run.
    """
    kind = torch.device(device).type
    installed = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if kind == "cuda" and installed else "sparse"
    if backend == "triton":
        if not installed:
            raise BackendError(
                "backend='triton' was requested, but the triton package is not installed. "
                "Install sae-lens-maira[triton], or use backend='sparse'."
            )
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendError(
                f"backend='triton' was requested on a {kind} device; its kernels run on CUDA. "
                "Move the SAE to a GPU, or use backend='sparse'."
            )
        return "triton"
    if backend == "sparse":
        return "sparse"
    if backend == "reference":
        return "reference"
    raise BackendError(f"Backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}.")


def resolve_candidates(
    candidates: AskedCandidates, device: torch.device | str, d_in: int, autocast: bool, dtype: torch.dtype
) -> Candidates:
    """Choose the candidate search: "auto" is the fastest exact search for the device and the width.

    This is TF32 on CUDA, and bfloat16 on a CPU with AVX-512 if rows are wide enough. "auto" is "off" under autocast,
    which rounds anyway, and for types other than float32, which have no bounds.
    """
    if candidates != "auto":
        return candidates
    if autocast or dtype != torch.float32:
        return "off"
    if torch.device(device).type == "cuda":
        return "tf32"
    return "bf16" if _has_wide_bf16() and d_in >= WIDE_ENOUGH else "off"


def _has_wide_bf16() -> bool:
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def say_if_emulated(candidates: str, device: torch.device | str) -> None:
    """Log once per process if bfloat16 candidates are slow on this CPU: without AVX-512 they are emulated."""
    if candidates == "bf16" and torch.device(device).type == "cpu" and not _has_wide_bf16() and not _said:
        _said.append(candidates)
        logger.warning(
            "candidates='bf16' was requested on a CPU without AVX-512, where bfloat16 products are emulated: the step "
            "stays exact, but candidates='off' is faster on this machine."
        )


def fused_step(
    weights: Weights,
    x: torch.Tensor,
    spec: StepSpec,
    dead: DeadMask = None,
    *,
    backend: Backend = "auto",
    workspace: Workspace | None = None,
    comm: Communicator | None = None,
    out: Gradients | None = None,
    own_rows: bool = False,
    own_latents: bool = False,
) -> StepResult:
    """Compute losses, gradients and sparse activations of one batch.

    Args:
        weights: Parameters of the SAE. W_enc (d_in, d_sae) is read fastest as the transposed view of a contiguous
            (d_sae, d_in) tensor.
        x: This rank's rows (batch, d_in), float32 or float64, the weights' type; all rows with `own_latents`.
        spec: Settings of selection, levels and losses.
        dead: Mask of dead latents (d_sae,), or a function that computes it from this batch's fire counts.
        backend: Name of the implementation; see `resolve_backend`. The result contains the one that ran.
        workspace: Buffers that are reused between steps.
        comm: Reductions over ranks; None means one process.
        out: Buffers (d_sae, d_in) for the gradients of W_enc_t and W_dec.
        own_rows: Whether these two gradients are needed only for this rank's share of the latents.
        own_latents: Whether the weights are those of this rank's share of the latents (`own_latents.latents_of`), and
            every rank passes the same rows. `spec` and `dead` are those of all latents.

    Raises:
        BackendError: Shapes or types do not match, or the backend cannot run.
    """
    name = resolve_backend(backend, x.device)
    group: Communicator = LocalCommunicator() if comm is None else comm
    _check(weights, x, spec, own_spec(spec, group).widths[-1] if own_latents else spec.widths[-1])
    if name == "reference":
        if group.size > 1:
            raise BackendError(
                "The reference backend works in one process only, but the step has "
                f"{group.size} ranks. Use backend='sparse'."
            )
        return reference_step(weights, x, spec, dead)
    stages = SPARSE
    if name == "triton":
        from sae_lens_maira.kernels.triton_stages import (
            TRITON,
        )  # triton is imported only when this backend runs

        stages = TRITON
    return run_stages(
        stages, weights, x, spec, dead, workspace or Workspace(), group, out, own_rows, own_latents
    )


def _check(weights: Weights, x: torch.Tensor, spec: StepSpec, latents: int) -> None:
    d_sae, d_in = weights.W_dec.shape
    if x.ndim != 2 or x.shape[1] != d_in:
        raise BackendError(f"The batch has shape {tuple(x.shape)}; expected (tokens, {d_in}).")
    if latents != d_sae:
        share = "" if latents == spec.widths[-1] else f", of which this rank has {latents}"
        raise BackendError(
            f"The last level width is {spec.widths[-1]}{share}, but the SAE has {d_sae} latents; they must agree."
        )
    types = {x.dtype, *(weight.dtype for weight in weights)}
    if len(types) != 1 or x.dtype not in (torch.float32, torch.float64):
        raise BackendError(
            f"The batch and the weights have types {sorted(map(str, types))}; "
            "expected one type, float32 or float64."
        )

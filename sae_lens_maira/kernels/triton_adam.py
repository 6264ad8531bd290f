"""Gradient clipping and Adam in one pass over memory on the GPU, which also computes row norms for the next step.

    g <- g / scale,   m <- m + (1 - b1)(g - m),   v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

A program updates one row, so that the row's norm needs no further read, and a bfloat16 copy for autocast only its
write. The clip scale, the learning rate and the step number are read on the device, so that the host does not wait.
Rows whose gradient and moments are all zero, as for a latent that never fired, are not written.

For rows of norm 1, the part of the gradient along the row is removed, and the updated row is divided by its norm:

    d = p / (|p| + 1e-6),   g <- g - (g . d) d,   update,   p <- p / |p|
"""

# pyright: reportCallIssue=false
# triton's type hints contain neither launch options (num_warps) nor the launch syntax of a jitted function.

import math

import torch
import triton
import triton.language as tl

from sae_lens_maira.kernels.triton_latent_backward import width_and_warps

BLOCK = 1024
"""Elements per iteration: 8 per thread with 4 warps, two 128-bit loads from each of four tensors."""
WARPS = 4


@triton.jit
def next_step_kernel(settings, step, lr, log_beta1, log_beta2):
    number = tl.load(step) + 1
    tl.store(step, number)
    exact = number.to(tl.float64)
    tl.store(settings, (tl.load(lr).to(tl.float64) / (1.0 - tl.exp(exact * log_beta1))).to(tl.float32))
    tl.store(settings + 1, tl.sqrt(1.0 - tl.exp(exact * log_beta2)).to(tl.float32))


@triton.jit
def adam_rows_kernel(
    parameter,
    gradient,
    mean,
    square,
    norms,
    shadow,
    scale,
    settings,
    beta1,
    beta2,
    eps,
    width,
    SHADOW: tl.constexpr,
    FRESH: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.load(scale)
    step_size = tl.load(settings)
    root_correction2 = tl.load(settings + 1)
    total = 0.0
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < width
        at = row * width + place
        g = tl.load(gradient + at, mask=inside, other=0.0) / divisor
        m = tl.load(mean + at, mask=inside, other=0.0)
        v = tl.load(square + at, mask=inside, other=0.0)
        p = tl.load(parameter + at, mask=inside, other=0.0)
        if UNIT:  # the whole row is in this iteration
            length = tl.sqrt(tl.sum(p * p, 0)) + 1e-6
            g -= tl.sum(g * p, 0) / (length * length) * p
        # The test is for zeros and not for activity, so that NaN is written.
        silent = tl.sum(((g == 0) & (m == 0) & (v == 0)).to(tl.int32), 0) == BLOCK
        write = inside & (silent == 0)
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p -= step_size * m / (tl.sqrt(v) / root_correction2 + eps)
        tl.store(mean + at, m, mask=write)
        tl.store(square + at, v, mask=write)
        if UNIT:
            norm = tl.sqrt(tl.sum(p * p, 0))
            write = inside & ((silent == 0) | (tl.abs(norm - 1.0) >= 1e-6))
            p /= norm + 1.1920929e-07
        tl.store(parameter + at, p, mask=write)
        if SHADOW:
            if FRESH:
                write = inside
            tl.store(shadow + at, p.to(shadow.dtype.element_ty), mask=write)
        total += tl.sum(p * p, 0)
    tl.store(norms + row, tl.sqrt(total))


@triton.jit
def tangent_squares_kernel(squares, gradient, parameter, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    g = tl.load(gradient + row * width + place, mask=inside, other=0.0)
    p = tl.load(parameter + row * width + place, mask=inside, other=0.0)
    length = tl.sqrt(tl.sum(p * p, 0)) + 1e-6
    g -= tl.sum(g * p, 0) / (length * length) * p
    tl.store(squares + row, tl.sum(g * g, 0))


def tangent_norm(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Norm (0-d) of a gradient (rows, width) without the part of each row along the parameter's row."""
    rows, width = parameter.shape
    block, warps = width_and_warps(width)
    squares = torch.empty(rows, dtype=parameter.dtype, device=parameter.device)
    tangent_squares_kernel[(rows,)](squares, gradient, parameter, width, BLOCK=block, num_warps=warps)
    return squares.sum().sqrt()


def next_step(step: torch.Tensor, lr: torch.Tensor, betas: tuple[float, float]) -> torch.Tensor:
    """Increment the step number (0-d float32); return (2,) step size and root of the second correction."""
    settings = torch.empty(2, dtype=torch.float32, device=step.device)
    next_step_kernel[(1,)](settings, step, lr, math.log(betas[0]), math.log(betas[1]), num_warps=1)
    return settings


def adam_rows(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    scale: torch.Tensor,
    settings: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    shadow: torch.Tensor | None = None,
    fresh: bool = False,
    unit: bool = False,
    norms: torch.Tensor | None = None,
) -> torch.Tensor:
    """Update contiguous float32 (rows, width) tensors in place; return the row norms (rows,) of the new parameter.

    Args:
        parameter: Weights to update.
        gradient: Gradient before clipping.
        mean: First moment.
        square: Second moment.
        scale: 0-d; the gradient is divided by it.
        settings: Result of `next_step`.
        betas: Decay rates of the moments.
        eps: Constant added to the denominator.
        shadow: (rows, width) copy in another type to update, or None.
        fresh: Whether the copy is still uninitialised, so that unchanged rows are copied too.
        unit: Whether rows are kept at norm 1.
        norms: (rows,) output tensor of the norms; a new tensor if not given.
    """
    rows, width = parameter.shape
    if norms is None:
        norms = torch.empty(rows, dtype=parameter.dtype, device=parameter.device)
    block, warps = width_and_warps(width) if unit else (min(BLOCK, triton.next_power_of_2(width)), WARPS)
    adam_rows_kernel[(rows,)](
        parameter,
        gradient,
        mean,
        square,
        norms,
        parameter if shadow is None else shadow,
        scale,
        settings,
        betas[0],
        betas[1],
        eps,
        width,
        SHADOW=shadow is not None,
        FRESH=fresh,
        UNIT=unit,
        BLOCK=block,
        num_warps=warps,
    )
    return norms

"""Clip and Adam in one pass over memory on the GPU, leaving behind what the next step would read the weights for.

    g <- g / scale,   m <- m + (1 - b1)(g - m),   v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

A program updates one row, so the row's norm costs nothing, and a bfloat16 copy for autocast costs its write. The
clip scale is read on the device: nothing waits for it. It knows nothing about which parameter it updates.
"""

# pyright: reportCallIssue=false
# triton's own types know neither launch options (num_warps) nor that a jitted function is launched, not called.

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Elements per turn: 8 per thread with 4 warps, two 128-bit loads of each of four streams."""
WARPS = 4


@triton.jit
def adam_rows_kernel(
    parameter,
    gradient,
    mean,
    square,
    norms,
    shadow,
    scale,
    step_size,
    beta1,
    beta2,
    root_correction2,
    eps,
    width,
    SHADOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.load(scale)
    total = 0.0
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < width
        at = row * width + place
        g = tl.load(gradient + at, mask=inside, other=0.0) / divisor
        m = tl.load(mean + at, mask=inside, other=0.0)
        v = tl.load(square + at, mask=inside, other=0.0)
        p = tl.load(parameter + at, mask=inside, other=0.0)
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p -= step_size * m / (tl.sqrt(v) / root_correction2 + eps)
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)
        tl.store(parameter + at, p, mask=inside)
        if SHADOW:
            tl.store(shadow + at, p.to(shadow.dtype.element_ty), mask=inside)
        total += tl.sum(p * p, 0)
    tl.store(norms + row, tl.sqrt(total))


def adam_rows(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    scale: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    shadow: torch.Tensor | None = None,
) -> torch.Tensor:
    """Updates contiguous float32 (rows, width) tensors in place; row norms (rows,) of the new parameter.

    Args:
        parameter: Weights.
        gradient: Gradient before clipping.
        mean: First moment.
        square: Second moment.
        scale: 0-d; the gradient is divided by it.
        step: Number of this update, from 1.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        shadow: (rows, width) copy in another type to refresh, or None.
    """
    rows, width = parameter.shape
    norms = torch.empty(rows, dtype=parameter.dtype, device=parameter.device)
    adam_rows_kernel[(rows,)](
        parameter,
        gradient,
        mean,
        square,
        norms,
        parameter if shadow is None else shadow,
        scale,
        lr / (1 - betas[0] ** step),
        betas[0],
        betas[1],
        (1 - betas[1] ** step) ** 0.5,
        eps,
        width,
        SHADOW=shadow is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
        num_warps=WARPS,
    )
    return norms

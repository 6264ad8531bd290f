"""Prefix decoding on the GPU: errors of all levels, their squares and the suffix gradient, with one read of W_dec rows.

    e_l = b_dec - x + sum_{entries of levels <= l} h W_dec[col],     S_m = sum_{l >= m} s_l e_l

One program keeps one part of d_in of one token in registers and processes the token's entries level by level. The part
is the slow grid axis, so that only a quarter of W_dec has to be in the L2 cache at a time. Errors stay in registers
until S, which is stored level by level, is written once. Squares are written per program and summed afterwards in
float64, without atomics, so that results are reproducible bit by bit.
"""

# pyright: reportCallIssue=false
# triton's own types know neither launch options (num_warps) nor that a jitted function is launched, not called.

import torch
import triton
import triton.language as tl

from sae_lens_maira.kernels.layout import Layout, constants
from sae_lens_maira.kernels.sparse import Decoded

LARGEST_BLOCK = 1024
"""A quarter of d_in = 4096. This part of W_dec at d_sae = 16384 is 67 MB in float32 and 34 MB in bfloat16."""


@triton.jit
def prefix_decode_kernel(
    suffix,
    errors,
    squares,
    offsets,
    cols,
    coefficients,
    W_dec,
    b_dec,
    x,
    scales,
    batch,
    d_in,
    LEVELS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stretch = tl.program_id(1)
    place = stretch * BLOCK + tl.arange(0, BLOCK)
    inside = place < d_in
    error = tl.load(b_dec + place, mask=inside, other=0.0) - tl.load(
        x + row * d_in + place, mask=inside, other=0.0
    )
    kept = ()
    for level in tl.static_range(LEVELS):  # pyright: ignore[reportGeneralTypeIssues]
        bag = row * LEVELS + level
        first = tl.load(offsets + bag)
        last = tl.load(offsets + bag + 1)
        for entry in range(first, last):
            col = tl.load(cols + entry).to(tl.int64)
            coefficient = tl.load(coefficients + entry)
            weight = tl.load(W_dec + col * d_in + place, mask=inside, other=0.0)
            error += coefficient * weight.to(error.dtype)
        if KEEP:
            tl.store(errors + (level * batch + row) * d_in + place, error, mask=inside)
        tl.store(squares + (level * batch + row) * tl.num_programs(1) + stretch, tl.sum(error * error, 0))
        kept = kept + (error,)  # noqa: RUF005 - triton compiles no starred tuples
    if not KEEP:
        tl.store(errors + row * d_in + place, error, mask=inside)
    running = tl.zeros([BLOCK], dtype=error.dtype)
    for back in tl.static_range(LEVELS):
        level = LEVELS - 1 - back
        running += tl.load(scales + level) * kept[LEVELS - 1 - back]
        tl.store(suffix + (level * batch + row) * d_in + place, running, mask=inside)


def block_and_warps(d_in: int) -> tuple[int, int]:
    """Part of d_in per program, and number of warps for 8 elements per thread: two 128-bit loads of float32."""
    block = min(LARGEST_BLOCK, int(triton.next_power_of_2(d_in)))
    return block, max(1, block // 256)


def prefix_decode(
    layout: Layout,
    h: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    x: torch.Tensor,
    scales: tuple[float, ...],
    keep_errors: bool = False,
) -> Decoded:
    """Same interface as `sparse.prefix_decode`. W_dec may be a bfloat16 copy; S then is bfloat16 too."""
    batch, levels, d_in = layout.batch, layout.levels, x.shape[1]
    block, warps = block_and_warps(d_in)
    stretches = int(triton.cdiv(d_in, block))
    suffix = torch.empty(levels, batch, d_in, dtype=W_dec.dtype, device=x.device)
    errors = torch.empty(levels if keep_errors else 1, batch, d_in, dtype=x.dtype, device=x.device)
    squares = torch.empty(levels, batch, stretches, dtype=x.dtype, device=x.device)
    if batch > 0:
        prefix_decode_kernel[(batch, stretches)](
            suffix,
            errors,
            squares,
            layout.offsets,
            layout.cols,
            h,
            W_dec,
            b_dec,
            x,
            constants(scales, x.dtype, x.device),
            batch,
            d_in,
            LEVELS=levels,
            KEEP=keep_errors,
            BLOCK=block,
            num_warps=warps,
        )
    return Decoded(
        suffix.transpose(0, 1), squares.sum(dim=(1, 2), dtype=torch.float64), list(errors.unbind(0))
    )

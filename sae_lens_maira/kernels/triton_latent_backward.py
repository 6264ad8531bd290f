"""Backward pass over latents on the GPU: one program computes dW_dec, dW_enc and db_enc of a latent in one pass.

    t = S_row . W_dec[j],    dW_dec[j] += h S_row,    dW_enc_t[j] += t xc_row,    db_enc[j] += t

A program keeps whole rows of d_in in registers, so that S and xc are read once for all three gradients. S is stored
level by level: latents of one level read (batch, d_in) of it, which fits the L2 cache. One program per latent would be
slow for a latent that fires on every token. Therefore entries beyond the first `SEGMENT` of a latent are summed by
other programs, and a second kernel adds these pieces in order. The number of programs depends on sizes only, so that
nothing is read back to the host. There are no atomics, so that results are reproducible bit by bit. The sums of squares
of both gradients are computed in the same pass.
"""

# pyright: reportCallIssue=false
# triton's own types know neither launch options (num_warps) nor that a jitted function is launched, not called.

import torch
import triton
import triton.language as tl

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels.layout import Layout, constants
from sae_lens_maira.kernels.sparse import LatentGradients

SEGMENT = 64
"""Entries per program. At k = 64 and d_sae / batch = 4 a latent has 16 entries on average. A very frequent latent gives
at most batch / 64 pieces, and partial sums take at most 2 nnz / 64 rows of memory.
"""
LARGEST_WIDTH = 16384
"""Largest d_in. Whole rows are in registers: 8 elements of 5 vectors per thread, 16 warps at d_in = 4096."""
STAGES = 2
"""Number of entries whose rows are loaded while another one is added."""
ADDED_AT_ONCE = 1024
"""Columns per program of the kernel that adds pieces."""


@triton.jit
def latent_backward_kernel(
    dW_dec,
    dW_enc,
    db_enc,
    squares,
    partial,
    partial_b,
    latents,
    pointers,
    rows,
    coefficients,
    suffix,
    xc,
    W_dec,
    widths,
    pieces,
    batch,
    d_sae,
    slots,
    d_in,
    LEVELS: tl.constexpr,
    SEGMENT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Programs below `pieces` process the later pieces of latents with more than SEGMENT entries, the others one latent
    # each.
    program = tl.program_id(0)
    extra = program < pieces
    latent = (program - pieces).to(tl.int64)
    if extra:
        latent = tl.load(latents + program * SEGMENT).to(tl.int64)
    known = latent < d_sae  # unused positions of the layout have the latent d_sae
    begin = tl.load(pointers + latent, mask=known, other=0)
    end = tl.load(pointers + latent + 1, mask=known, other=0)
    # Each multiple of SEGMENT within a latent's entries gives one piece; there are at least as many programs as pieces.
    nth = tl.where(extra, program - begin // SEGMENT, 0)
    first = begin + nth * SEGMENT
    last = tl.minimum(first + SEGMENT, end)
    active = known & ((nth > 0) == extra) & ((first < end) | (nth == 0))
    last = tl.where(active, last, first)
    level = 0
    for edge in tl.static_range(LEVELS - 1):  # pyright: ignore[reportGeneralTypeIssues]
        level += (latent >= tl.load(widths + edge)).to(tl.int32)
    place = tl.arange(0, BLOCK)
    inside = place < d_in
    compute = db_enc.dtype.element_ty
    weight = tl.load(W_dec + latent * d_in + place, mask=inside & active, other=0.0).to(compute)
    decoder = tl.zeros([BLOCK], dtype=compute)
    encoder = tl.zeros([BLOCK], dtype=compute)
    bias = tl.sum(decoder, 0)
    gradients = suffix + level.to(tl.int64) * batch * d_in + place
    for entry in tl.range(first, last, num_stages=STAGES):
        at = tl.load(rows + entry).to(tl.int64) * d_in
        coefficient = tl.load(coefficients + entry)
        gradient = tl.load(gradients + at, mask=inside, other=0.0).to(compute)
        token = tl.load(xc + at + place, mask=inside, other=0.0).to(compute)
        through = tl.sum(gradient * weight, 0)
        decoder += coefficient * gradient
        encoder += through * token
        bias += through
    if extra:
        if active:
            slot = program.to(tl.int64)
            tl.store(partial + 2 * slot * d_in + place, decoder, mask=inside)
            tl.store(partial + (2 * slot + 1) * d_in + place, encoder, mask=inside)
            tl.store(partial_b + slot, bias)
    else:
        tl.store(dW_dec + latent * d_in + place, decoder, mask=inside)
        tl.store(dW_enc + latent * d_in + place, encoder, mask=inside)
        tl.store(db_enc + latent, bias)
        whole = end - begin <= SEGMENT
        tl.store(squares + latent, tl.where(whole, tl.sum(decoder * decoder, 0), 0.0))
        tl.store(squares + slots + latent, tl.where(whole, tl.sum(encoder * encoder, 0), 0.0))


@triton.jit
def add_pieces_kernel(
    dW_dec,
    dW_enc,
    db_enc,
    squares,
    partial,
    partial_b,
    latents,
    pointers,
    d_sae,
    slots,
    d_in,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0)
    stretch = tl.program_id(1)
    latent = tl.load(latents + piece * SEGMENT).to(tl.int64)
    known = latent < d_sae
    begin = tl.load(pointers + latent, mask=known, other=0)
    end = tl.load(pointers + latent + 1, mask=known, other=0)
    place = stretch * BLOCK + tl.arange(0, BLOCK)
    inside = place < d_in
    number = (end - begin + SEGMENT - 1) // SEGMENT - 1
    mine = known & (piece - begin // SEGMENT == 1) & (number > 0)
    slot = d_sae + piece * tl.num_programs(1) + stretch
    decoder_square = tl.sum(tl.zeros([BLOCK], dtype=squares.dtype.element_ty), 0)
    encoder_square = decoder_square
    if mine:
        decoder = tl.load(dW_dec + latent * d_in + place, mask=inside, other=0.0)
        encoder = tl.load(dW_enc + latent * d_in + place, mask=inside, other=0.0)
        bias = tl.load(db_enc + latent)
        for step in range(0, number):
            at = (piece + step).to(tl.int64)
            decoder += tl.load(partial + 2 * at * d_in + place, mask=inside, other=0.0)
            encoder += tl.load(partial + (2 * at + 1) * d_in + place, mask=inside, other=0.0)
            bias += tl.load(partial_b + at)
        tl.store(dW_dec + latent * d_in + place, decoder, mask=inside)
        tl.store(dW_enc + latent * d_in + place, encoder, mask=inside)
        tl.store(db_enc + latent, bias, mask=stretch == 0)
        decoder_square += tl.sum(decoder * decoder, 0)
        encoder_square += tl.sum(encoder * encoder, 0)
    tl.store(squares + slot, decoder_square)
    tl.store(squares + slots + slot, encoder_square)


def width_and_warps(d_in: int) -> tuple[int, int]:
    """Row width in registers and warps for 8 elements per thread: at d_in = 4096, half of all warps fit at once.

    Raises:
        BackendError: d_in is too wide for one program.
    """
    block = int(triton.next_power_of_2(d_in))
    if block > LARGEST_WIDTH:
        raise BackendError(
            f"d_in is {d_in}; the triton backend supports at most {LARGEST_WIDTH}, since rows are kept in registers. "
            "Use backend='sparse'."
        )
    return block, min(16, max(1, block // 256))


def latent_backward(
    layout: Layout,
    h: torch.Tensor,
    suffix: torch.Tensor,
    xc: torch.Tensor,
    W_dec: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    frozen: frozenset[str] = frozenset(),
    segment: int = SEGMENT,
) -> LatentGradients:
    """Same interface as `sparse.latent_backward`; suffix, xc and W_dec may be bfloat16.

    One pass computes both gradients, so that the gradient of a frozen matrix is computed too and then dropped.
    """
    d_in, d_sae = xc.shape[1], layout.d_sae
    block, warps = width_and_warps(d_in)
    device, dtype = h.device, h.dtype
    if out is None or frozen:
        out = (
            torch.empty(d_sae, d_in, dtype=dtype, device=device),
            torch.empty(d_sae, d_in, dtype=dtype, device=device),
        )
    b_enc = torch.empty(d_sae, dtype=dtype, device=device)
    order = layout.by_latent
    latents, rows, coefficients = layout.latents, layout.rows[order], h[order]
    pieces = int(triton.cdiv(len(order), segment))
    stretch = min(block, ADDED_AT_ONCE)
    slots = d_sae + pieces * int(triton.cdiv(d_in, stretch))
    squares = torch.empty(2, slots, dtype=dtype, device=device)
    partial = torch.empty(2 * pieces, d_in, dtype=dtype, device=device)
    partial_b = torch.empty(pieces, dtype=dtype, device=device)
    latent_backward_kernel[(pieces + d_sae,)](
        *out,
        b_enc,
        squares,
        partial,
        partial_b,
        latents,
        layout.pointers,
        rows,
        coefficients,
        suffix.transpose(0, 1).contiguous(),
        xc,
        W_dec,
        constants(layout.widths, torch.int32, device),
        pieces,
        layout.batch,
        d_sae,
        slots,
        d_in,
        LEVELS=layout.levels,
        SEGMENT=segment,
        STAGES=STAGES,
        BLOCK=block,
        num_warps=warps,
    )
    if pieces:
        add_pieces_kernel[(pieces, triton.cdiv(d_in, stretch))](
            *out,
            b_enc,
            squares,
            partial,
            partial_b,
            latents,
            layout.pointers,
            d_sae,
            slots,
            d_in,
            SEGMENT=segment,
            BLOCK=stretch,
            num_warps=4,
        )
    nothing = h.new_empty(0)
    return LatentGradients(
        nothing if "W_dec" in frozen else out[0],
        nothing if "W_enc" in frozen else out[1],
        b_enc,
        None if frozen else squares.sum(dim=1),
    )

"""The backward pass over latents on the GPU: dW_dec, dW_enc and db_enc of a latent by one program, in one walk.

    t = S_bag . W_dec[j],    dW_dec[j] += h S_bag,    dW_enc_t[j] += t xc_row,    db_enc[j] += t

A program holds whole rows of d_in in registers, so S and xc are read once for all of these. A latent that fires
on every token would keep one program busy long after the rest: its entries are cut into segments of at most
`SEGMENT`, whose partial sums a second kernel adds in order. No atomics: the same bits every time.
"""

# pyright: reportCallIssue=false
# triton's own types know neither launch options (num_warps) nor that a jitted function is launched, not called.

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels.layout import Layout
from sae_lens_maira.kernels.sparse import LatentGradients

SEGMENT = 256
"""Entries per program. At k = 64, d_sae / batch = 4 a latent has 16 on average; a hot one gives at most
batch / 256 segments, and partial sums take at most 2 nnz / 256 rows of memory."""
LARGEST_WIDTH = 16384
"""Rows are held in registers whole: 16 elements of 5 vectors per thread, 8 warps at d_in = 4096."""


class Segments(NamedTuple):
    """Stretches of the latent-sorted entries, one program each; `slot` is the place of a partial sum or -1."""

    latent: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    slot: torch.Tensor
    hot: torch.Tensor
    """Latents cut into several segments."""
    hot_first: torch.Tensor
    hot_number: torch.Tensor


@triton.jit
def latent_backward_kernel(
    dW_dec,
    dW_enc,
    db_enc,
    partial,
    partial_b,
    latents,
    firsts,
    lasts,
    slots,
    rows,
    bags,
    coefficients,
    suffix,
    xc,
    W_dec,
    d_in,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    latent = tl.load(latents + segment).to(tl.int64)
    first = tl.load(firsts + segment)
    last = tl.load(lasts + segment)
    slot = tl.load(slots + segment).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < d_in
    compute = db_enc.dtype.element_ty
    weight = tl.load(W_dec + latent * d_in + place, mask=inside, other=0.0).to(compute)
    decoder = tl.zeros([BLOCK], dtype=compute)
    encoder = tl.zeros([BLOCK], dtype=compute)
    bias = tl.sum(decoder, 0)
    for entry in range(first, last):
        row = tl.load(rows + entry).to(tl.int64)
        bag = tl.load(bags + entry).to(tl.int64)
        coefficient = tl.load(coefficients + entry)
        gradient = tl.load(suffix + bag * d_in + place, mask=inside, other=0.0).to(compute)
        token = tl.load(xc + row * d_in + place, mask=inside, other=0.0).to(compute)
        through = tl.sum(gradient * weight, 0)
        decoder += coefficient * gradient
        encoder += through * token
        bias += through
    if slot < 0:
        tl.store(dW_dec + latent * d_in + place, decoder, mask=inside)
        tl.store(dW_enc + latent * d_in + place, encoder, mask=inside)
        tl.store(db_enc + latent, bias)
    else:
        tl.store(partial + (2 * slot) * d_in + place, decoder, mask=inside)
        tl.store(partial + (2 * slot + 1) * d_in + place, encoder, mask=inside)
        tl.store(partial_b + slot, bias)


@triton.jit
def add_segments_kernel(
    dW_dec, dW_enc, db_enc, partial, partial_b, hot, hot_first, hot_number, d_in, BLOCK: tl.constexpr
):
    which = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < d_in
    latent = tl.load(hot + which).to(tl.int64)
    first = tl.load(hot_first + which).to(tl.int64)
    number = tl.load(hot_number + which)
    compute = db_enc.dtype.element_ty
    decoder = tl.zeros([BLOCK], dtype=compute)
    encoder = tl.zeros([BLOCK], dtype=compute)
    bias = tl.sum(decoder, 0)
    for step in range(0, number):
        slot = first + step
        decoder += tl.load(partial + (2 * slot) * d_in + place, mask=inside, other=0.0)
        encoder += tl.load(partial + (2 * slot + 1) * d_in + place, mask=inside, other=0.0)
        bias += tl.load(partial_b + slot)
    tl.store(dW_dec + latent * d_in + place, decoder, mask=inside)
    tl.store(dW_enc + latent * d_in + place, encoder, mask=inside)
    tl.store(db_enc + latent, bias, mask=tl.program_id(1) == 0)


def cut(pointers: torch.Tensor, longest: int = SEGMENT) -> Segments:
    """Cuts latent-sorted entries with boundaries (d_sae + 1,) into segments; a silent latent gets an empty one."""
    counts = pointers.diff()
    pieces = ((counts + longest - 1) // longest).clamp(min=1)
    number = int(pieces.sum())
    latent = torch.repeat_interleave(pieces, output_size=number)
    begins = pieces.cumsum(0) - pieces
    nth = torch.arange(number, device=pointers.device) - begins[latent]
    first = pointers[latent] + nth * longest
    last = torch.minimum(first + longest, pointers[latent + 1])
    split = (pieces > 1)[latent]
    slot = torch.where(split, split.cumsum(0) - 1, torch.full_like(latent, -1))
    hot = (pieces > 1).nonzero().squeeze(1)
    return Segments(latent, first, last, slot, hot, slot[begins[hot]], pieces[hot])


def width_and_warps(d_in: int) -> tuple[int, int]:
    """Row width in registers and warps for 16 elements per thread.

    Raises:
        BackendError: d_in is too wide for one program.
    """
    block = int(triton.next_power_of_2(d_in))
    if block > LARGEST_WIDTH:
        raise BackendError(
            f"d_in is {d_in}; the triton backend holds rows of at most {LARGEST_WIDTH} in registers. "
            "Use backend='sparse'."
        )
    return block, min(16, max(1, block // 512))


def latent_backward(
    layout: Layout,
    h: torch.Tensor,
    suffix: torch.Tensor,
    xc: torch.Tensor,
    W_dec: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    frozen: frozenset[str] = frozenset(),
    longest: int = SEGMENT,
) -> LatentGradients:
    """Same contract as `sparse.latent_backward`; suffix, xc and W_dec may be bfloat16.

    One walk makes both gradients, so that of a frozen matrix is computed here too, and dropped.
    """
    d_in = xc.shape[1]
    block, warps = width_and_warps(d_in)
    if out is None or frozen:
        shape = (layout.d_sae, d_in)
        out = (
            torch.empty(shape, dtype=h.dtype, device=h.device),
            torch.empty(shape, dtype=h.dtype, device=h.device),
        )
    b_enc = torch.empty(layout.d_sae, dtype=h.dtype, device=h.device)
    segments = cut(layout.pointers, longest)
    slots = int(segments.hot_number.sum())
    partial = torch.empty(max(1, 2 * slots), d_in, dtype=h.dtype, device=h.device)
    partial_b = torch.empty(max(1, slots), dtype=h.dtype, device=h.device)
    order = layout.by_latent
    latent_backward_kernel[(len(segments.latent),)](
        *out,
        b_enc,
        partial,
        partial_b,
        segments.latent,
        segments.first,
        segments.last,
        segments.slot,
        layout.rows[order],
        layout.bags[order],
        h[order],
        suffix,
        xc,
        W_dec,
        d_in,
        BLOCK=block,
        num_warps=warps,
    )
    if len(segments.hot):
        stretch = min(block, 1024)
        add_segments_kernel[(len(segments.hot), triton.cdiv(d_in, stretch))](
            *out,
            b_enc,
            partial,
            partial_b,
            segments.hot,
            segments.hot_first,
            segments.hot_number,
            d_in,
            BLOCK=stretch,
            num_warps=4,
        )
    nothing = h.new_empty(0)
    return LatentGradients(
        nothing if "W_dec" in frozen else out[0], nothing if "W_enc" in frozen else out[1], b_enc
    )

"""Find candidates of the selection on the GPU: entries above a lower bound, by row, columns ascending.

Dense scores are compared directly. Bounds of scores, from a low-precision product, are compared with the bound of each
latent, and the entries above it are scored exactly (float32) from rows of x and W_enc. A row's candidates are
contiguous in the buffer. Rows may be in any order, which does not change later results.
"""

# pyright: reportCallIssue=false
# triton's type hints contain neither launch options (num_warps) nor the launch syntax of a jitted function.

from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROWS = 2
"""Rows per program: norms and biases are read once for all of them."""
BLOCK = 512
"""Columns per iteration: with `ROWS` rows and 8 warps, 4 scores per thread and 64 registers, at half occupancy."""

ROUNDED = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}
"""Relative rounding error of a stored bound: twice that of the type."""


class Table(NamedTuple):
    """Scores of all entries. Dense: (table + bias) * norms is h * norm. Bounds: table >= bounds marks candidates."""

    table: torch.Tensor
    """(rows, d_sae) h, a bfloat16 product, or upper bounds of a low-precision product."""
    bias: torch.Tensor | None = None
    """(d_sae,) added to the table; None if the table contains it."""
    norms: torch.Tensor | None = None
    """(d_sae,) norms of decoder rows; None means 1."""
    bounds: torch.Tensor | None = None
    """(d_sae,) smallest bound of a candidate, in the table's type; None for dense scores."""
    slack: float = 0.0
    """Relative amount added to a bound before it is compared."""


class Found(NamedTuple):
    """Candidates, contiguous per row: entries starts[row] to starts[row] + counts[row] of the other tensors."""

    columns: torch.Tensor
    h: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    total: torch.Tensor
    """(1,) number of candidates of this rank; larger than the buffer if that was too small."""


class Encoder(NamedTuple):
    """Inputs of the exact scores of candidates; W_enc_t is (d_sae, d_in)."""

    xc: torch.Tensor
    W_enc_t: torch.Tensor
    b_enc: torch.Tensor


@triton.jit
def candidates_kernel(
    columns,
    h,
    values,
    starts,
    counts,
    total,
    odd,
    table,
    bias,
    norms,
    bounds,
    threshold,
    safety,
    slack,
    capacity,
    rows,
    d_sae,
    BIAS: tl.constexpr,
    NORMS: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = row.to(tl.int64) * d_sae
    lo = tl.load(threshold) * safety
    number = tl.zeros([ROWS], dtype=tl.int32)
    begin = tl.zeros([ROWS], dtype=tl.int32)
    wrong = 0
    # The first iteration counts, which gives the position of the row; the second reads the scores from the cache and
    # writes.
    for turn in tl.static_range(2):
        for start in range(0, d_sae, BLOCK):
            col = start + tl.arange(0, BLOCK)
            inside = (row < rows)[:, None] & (col < d_sae)[None, :]
            score = tl.load(table + line[:, None] + col[None, :], mask=inside, other=0.0)
            if BOUNDED:
                bound = tl.load(bounds + col, mask=col < d_sae, other=0.0)
                upper = score.to(tl.float32)
                upper += tl.abs(upper) * slack
                hit = ((upper >= bound.to(tl.float32)[None, :]) & inside).to(tl.int32)
            else:
                entry = score.to(lo.dtype)
                if BIAS:
                    entry += tl.load(bias + col, mask=col < d_sae, other=0.0)[None, :]
                value = entry
                if NORMS:
                    value = entry * tl.load(norms + col, mask=col < d_sae, other=0.0)[None, :]
                hit = ((value > lo) & inside).to(tl.int32)
            if turn == 0:
                number += tl.sum(hit, 1)
                if not BOUNDED:
                    # Comparisons ignore NaN; a finite value times 0 is 0.
                    strange = inside & ~(tl.abs(value) < float("inf"))
                    wrong += tl.sum(tl.sum(strange.to(tl.int32), 1), 0)
            else:
                place = begin[:, None] + tl.cumsum(hit, 1) - hit
                keep = (hit > 0) & (place < capacity)
                tl.store(columns + place, tl.broadcast_to(col[None, :], [ROWS, BLOCK]), mask=keep)
                if not BOUNDED:
                    tl.store(h + place, entry, mask=keep)
                    tl.store(values + place, value, mask=keep)
                begin += tl.sum(hit, 1)
        if turn == 0:
            begin = tl.atomic_add(total, tl.sum(number, 0)) + tl.cumsum(number, 0) - number
            tl.store(starts + row, begin, mask=row < rows)
            tl.store(counts + row, number, mask=row < rows)
            if wrong > 0:
                tl.atomic_add(odd, wrong)


@triton.jit
def exact_scores_kernel(
    h,
    values,
    broken,
    columns,
    starts,
    counts,
    table,
    xc,
    W_enc_t,
    b_enc,
    norms,
    threshold,
    safety,
    slack,
    capacity,
    d_in,
    d_sae,
    NORMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < d_in
    token = tl.load(xc + row.to(tl.int64) * d_in + place, mask=inside, other=0.0)
    lo = tl.load(threshold) * safety
    first = tl.load(starts + row)
    last = tl.minimum(first + tl.load(counts + row), capacity)
    wrong = 0
    for entry in tl.range(first, last, num_stages=2):  # pyright: ignore[reportGeneralTypeIssues]
        col = tl.load(columns + entry)
        weight = tl.load(W_enc_t + col.to(tl.int64) * d_in + place, mask=inside, other=0.0)
        product = tl.sum(token * weight, 0)
        bound = tl.load(table + row.to(tl.int64) * d_sae + col).to(tl.float32)
        wrong += (product > bound + tl.abs(bound) * slack).to(tl.int32)
        exact = product + tl.load(b_enc + col)
        value = exact
        if NORMS:
            value = exact * tl.load(norms + col)
        tl.store(h + entry, exact)
        tl.store(values + entry, tl.where(value > lo, value, 0.0))
    if wrong > 0:
        tl.atomic_add(broken, wrong)


def find_candidates(
    scores: Table,
    threshold: torch.Tensor,
    safety: float,
    capacity: int,
    total: torch.Tensor,
    odd: torch.Tensor,
    broken: torch.Tensor,
    encoder: Encoder | None,
) -> Found:
    """Launch the search for candidates.

    Args:
        scores: Dense scores, or bounds of them.
        threshold: 0-d; the lower bound is `threshold * safety`.
        safety: Factor of the threshold.
        capacity: Size of the buffer in candidates.
        total: (1,) int32, initially 0; receives the number of candidates.
        odd: (1,) int32, initially 0; receives the number of dense scores that are not finite.
        broken: (1,) int64, initially 0; receives the number of scores above their bound.
        encoder: Inputs of the exact scores, if `scores` contains bounds.
    """
    table, bias, norms, bounds, slack = scores
    rows, d_sae = table.shape
    device, dtype = table.device, threshold.dtype
    columns = torch.empty(capacity, dtype=torch.int32, device=device)
    h, values = (torch.empty(capacity, dtype=dtype, device=device) for _ in range(2))
    places = (torch.empty if rows else torch.zeros)(2, max(rows, 1), dtype=torch.int32, device=device)
    found = Found(columns, h, values, places[0], places[1], total)
    candidates_kernel[(triton.cdiv(rows, ROWS),)](
        *found,
        odd,
        table,
        table if bias is None else bias,
        table if norms is None else norms,
        table if bounds is None else bounds,
        threshold,
        safety,
        slack,
        capacity,
        rows,
        d_sae,
        BIAS=bias is not None,
        NORMS=norms is not None,
        BOUNDED=bounds is not None,
        ROWS=ROWS,
        BLOCK=min(BLOCK, triton.next_power_of_2(d_sae)),
        num_warps=8,
    )
    if encoder is not None:
        width = encoder.xc.shape[1]
        block = triton.next_power_of_2(width)
        exact_scores_kernel[(rows,)](
            h,
            values,
            broken,
            *found[:1],
            *found[3:5],
            table,
            encoder.xc,
            encoder.W_enc_t,
            encoder.b_enc,
            table if norms is None else norms,
            threshold,
            safety,
            slack + ROUNDED[table.dtype],
            capacity,
            width,
            d_sae,
            NORMS=norms is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return found

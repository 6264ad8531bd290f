"""Exact, asynchronous selection on the GPU: the n largest of h * norm over a batch, as a `Layout`.

    1. candidates: every entry above a lower bound, by `triton_candidates`
    2. threshold: the n-th largest candidate, eight bits of the floats per pass (histograms)
    3. entries above the threshold, and the first entries equal to it in row-major order, are written in place

Sizes are fixed in advance (n kept entries, a buffer of candidates), so that nothing is read back to the host. `check`
contains whether the candidates included the n largest; the caller reads it later, together with other numbers.
"""

# pyright: reportCallIssue=false
# triton's own types know neither launch options (num_warps) nor that a jitted function is launched, not called.

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sae_lens_maira.kernels.comm import Communicator
from sae_lens_maira.kernels.layout import Layout, constants, sort_by_latent
from sae_lens_maira.kernels.triton_candidates import Encoder, Table, find_candidates

ENTRIES = 2048
"""Candidates per program of a histogram."""
AT_ONCE = 128
"""Candidates of one row per iteration; a row has 64 to 128 on average."""


class Kept(NamedTuple):
    """Kept entries of this rank."""

    layout: Layout
    h: torch.Tensor
    values: torch.Tensor
    threshold: torch.Tensor
    """0-d; the n-th largest entry over all ranks, or 0 if fewer than n are positive."""
    check: torch.Tensor
    """(4,) int64: whether the selection is right; candidates and kept entries of this rank; number of violated bounds.
    """
    poison: torch.Tensor
    """0-d float64: NaN if a dense score is not finite, else 0."""


@triton.jit
def resolve(histograms, remaining, DONE: tl.constexpr):
    """Leading `DONE` digits of the n-th largest entry, and how many entries with these digits are among the n."""
    bins = tl.arange(0, 256)
    found = tl.zeros([1], dtype=tl.int64).sum(0)
    for digit in tl.static_range(DONE):
        number = tl.load(histograms + digit * 256 + 255 - bins)
        place = tl.minimum(tl.sum((tl.cumsum(number, 0) < remaining).to(tl.int32), 0), 255)
        remaining -= tl.sum(tl.where(bins < place, number, 0), 0)
        found = found * 256 + (255 - place)
    return found, remaining


@triton.jit
def histogram_kernel(
    histograms, values, total, capacity, n, DONE: tl.constexpr, DIGITS: tl.constexpr, ENTRIES: tl.constexpr
):
    number = tl.minimum(tl.load(total), capacity)
    first = tl.program_id(0) * ENTRIES
    if first < number:
        place = first + tl.arange(0, ENTRIES)
        value = tl.load(values + place, mask=place < number, other=0.0)
        if DIGITS == 8:  # noqa: SIM108 - a ternary compiles both
            bits = value.to(tl.int64, bitcast=True)
        else:
            bits = value.to(tl.int32, bitcast=True).to(tl.int64)
        found, _ = resolve(histograms, n, DONE)  # pyright: ignore[reportGeneralTypeIssues]
        shift: tl.constexpr = 8 * (DIGITS - 1 - DONE)
        digit = ((bits >> shift) & 255).to(tl.int32)
        # Entries equal to 0 are below every bound: they fill the end of the buffer and mark rejected candidates.
        match = (place < number) & (value > 0)
        if DONE > 0:
            match = match & ((bits >> (shift + 8)) == found)
        here = tl.histogram(tl.where(match, digit, 0), 256)
        bins = tl.arange(0, 256)
        here -= tl.where(bins == 0, ENTRIES - tl.sum(match.to(tl.int32), 0), 0)
        tl.atomic_add(histograms + DONE * 256 + bins, here, mask=here > 0)


@triton.jit
def count_kernel(
    above,
    equal,
    kth,
    ties,
    check,
    poison,
    values,
    starts,
    counts,
    histograms,
    total,
    odd,
    threshold,
    safety,
    capacity,
    n,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    # Every program computes the threshold: it reads a few hundred numbers from the cache, which avoids a launch.
    found, remaining = resolve(histograms, n, DIGITS)  # pyright: ignore[reportGeneralTypeIssues]
    if DIGITS == 8:  # noqa: SIM108 - a ternary compiles both
        nth_largest = found.to(tl.float64, bitcast=True)
    else:
        nth_largest = found.to(tl.int32).to(tl.float32, bitcast=True)
    enough = tl.sum(tl.load(histograms + tl.arange(0, 256)), 0) >= n
    nth_largest = tl.where(enough, nth_largest, 0.0)
    if row == 0:
        lo = tl.load(threshold) * safety
        fits = tl.load(total) <= capacity
        # An entry that is not a candidate is at most lo, up to the rounding of a bound.
        right = fits & ((lo <= 0) | (enough & (nth_largest > lo * (1 + 1e-6))))
        tl.store(kth, nth_largest)
        tl.store(ties, tl.where(enough, remaining, 0))
        tl.store(check, right.to(tl.int64))
        tl.store(check + 1, tl.load(total).to(tl.int64))
        tl.store(poison, tl.where(tl.load(odd) > 0, float("nan"), 0.0))
    first = tl.load(starts + row)
    last = tl.minimum(first + tl.load(counts + row), capacity)
    more = 0
    same = 0
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(values + place, mask=place < last, other=0.0)
        more += tl.sum((value > nth_largest).to(tl.int32), 0)
        same += tl.sum(((value == nth_largest) & (value > 0)).to(tl.int32), 0)
    tl.store(above + row, more)
    tl.store(equal + row, same)


@triton.jit
def write_kernel(
    rows_out,
    cols_out,
    keys_out,
    h_out,
    values_out,
    offsets,
    check,
    columns,
    h,
    values,
    starts,
    counts,
    above,
    equal,
    above_ends,
    equal_ends,
    kth,
    ties,
    widths,
    capacity,
    n,
    d_sae,
    LEVELS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    threshold = tl.load(kth)
    first = tl.load(starts + row)
    last = tl.minimum(first + tl.load(counts + row), capacity)
    wanted = tl.load(ties)
    seen = tl.load(equal_ends + row).to(tl.int32) - tl.load(equal + row)
    begin = tl.load(above_ends + row).to(tl.int32) - tl.load(above + row) + tl.minimum(seen, wanted)
    if row == 0:
        tl.store(offsets, 0)
    base = begin
    level = tl.arange(0, LANES)  # levels, up to the next power of two
    width = tl.load(widths + level, mask=level < LEVELS, other=0)
    below = tl.zeros([LANES], dtype=tl.int32)
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(values + place, mask=place < last, other=0.0)
        tie = ((value == threshold) & (value > 0)).to(tl.int32)
        nth = seen + tl.cumsum(tie, 0)
        keep = ((value > threshold) | ((tie > 0) & (nth <= wanted))).to(tl.int32)
        to = begin + tl.cumsum(keep, 0) - keep
        put = (keep > 0) & (to < n)
        col = tl.load(columns + place, mask=place < last, other=0)
        tl.store(rows_out + to, tl.broadcast_to(row, [BLOCK]).to(tl.int64), mask=put)
        tl.store(cols_out + to, col.to(tl.int64), mask=put)
        tl.store(keys_out + to, col, mask=put)
        tl.store(h_out + to, tl.load(h + place, mask=place < last, other=0.0), mask=put)
        tl.store(values_out + to, value, mask=put)
        inside = (col[:, None] < width[None, :]) & (keep > 0)[:, None]
        below += tl.sum(inside.to(tl.int32), 0)
        seen += tl.sum(tie, 0)
        begin += tl.sum(keep, 0)
    tl.store(offsets + row * LEVELS + 1 + level, (base + below).to(tl.int64), mask=level < LEVELS)
    if row == tl.num_programs(0) - 1:
        tl.store(check + 2, begin.to(tl.int64))
        for start in range(begin, n, BLOCK):  # unused positions sort after every latent
            place = start + tl.arange(0, BLOCK)
            tl.store(keys_out + place, tl.broadcast_to(d_sae, [BLOCK]), mask=place < n)


def select_rows(
    scores: Table,
    n: int,
    widths: tuple[int, ...],
    comm: Communicator,
    threshold: torch.Tensor,
    safety: float,
    capacity: int,
    encoder: Encoder | None = None,
) -> Kept:
    """Launch the selection; nothing is read back to the host.

    Args:
        scores: Dense scores, or bounds of them.
        n: Number of entries to keep over all ranks, at least 1.
        widths: Cumulative level widths.
        comm: Reductions over ranks.
        threshold: 0-d, on the device; the lower bound of the candidates is `threshold * safety`.
        safety: Factor of the threshold; 1 if `threshold` is the bound.
        capacity: Size of the buffer in candidates.
        encoder: Inputs of the exact scores of candidates, if `scores` contains bounds.
    """
    rows, d_sae = scores.table.shape
    device, dtype = threshold.device, threshold.dtype
    digits = 8 if dtype == torch.float64 else 4
    zeros = torch.zeros(8 + digits * 128, dtype=torch.int64, device=device)
    check, poison, counters = zeros[:4], zeros[4:5].view(torch.float64)[0], zeros[5:8].view(torch.int32)
    total, ties, odd, histograms = counters[:1], counters[1:2], counters[2:3], zeros[8:].view(torch.int32)
    kth = torch.empty((), dtype=dtype, device=device)
    found = find_candidates(scores, threshold, safety, capacity, total, odd, check[3:], encoder)
    _, h, values, *places, _ = found
    for digit in range(digits):
        histogram_kernel[(triton.cdiv(capacity, ENTRIES),)](
            histograms, values, total, capacity, n, DONE=digit, DIGITS=digits, ENTRIES=ENTRIES, num_warps=4
        )
        if comm.size > 1:
            comm.sum_(histograms[digit * 256 : digit * 256 + 256])
    numbers = torch.empty(2, max(rows, 1), dtype=torch.int32, device=device)
    count_kernel[(max(rows, 1),)](
        *numbers,
        kth,
        ties,
        check,
        poison,
        values,
        *places,
        histograms,
        total,
        odd,
        threshold,
        safety,
        capacity,
        n,
        DIGITS=digits,
        BLOCK=AT_ONCE,
        num_warps=1,
    )
    ends = numbers.cumsum(dim=1)
    if comm.size > 1:
        comm.min_(check[:1])
        _share_ties(ties, ends, comm)
    levels = len(widths)
    index = torch.empty(2, n, dtype=torch.int64, device=device)
    keys = index.new_empty(n, dtype=torch.int32)
    if rows == 0:
        keys.fill_(d_sae)
    kept = torch.empty(2, n, dtype=dtype, device=device)
    offsets = (torch.zeros if rows == 0 else torch.empty)(rows * levels + 1, dtype=torch.int64, device=device)
    write_kernel[(rows,)](
        *index,
        keys,
        *kept,
        offsets,
        check,
        found.columns,
        h,
        values,
        *places,
        *numbers,
        *ends,
        kth,
        ties,
        constants(widths, torch.int32, device),
        capacity,
        n,
        d_sae,
        LEVELS=levels,
        LANES=triton.next_power_of_2(levels),
        BLOCK=AT_ONCE,
        num_warps=1,
    )
    layout = Layout(index[0], index[1], offsets, *sort_by_latent(keys, d_sae), rows, widths)
    return Kept(layout, kept[0], kept[1], kth, check, poison)


def shortened(kept: Kept, number: int) -> Kept:
    """Cut a selection to its first entries, without unused positions."""
    layout = kept.layout
    layout = layout._replace(
        rows=layout.rows[:number],
        cols=layout.cols[:number],
        by_latent=layout.by_latent[:number],
        latents=layout.latents[:number],
    )
    return kept._replace(layout=layout, h=kept.h[:number], values=kept.values[:number])


def _share_ties(ties: torch.Tensor, ends: torch.Tensor, comm: Communicator) -> None:
    """Replace the number of ties that all ranks keep by this rank's share; lower ranks take precedence."""
    here = torch.zeros(comm.size, dtype=torch.int64, device=ties.device)
    here[comm.rank] = ends[1, -1]
    before = comm.sum_(here)[: comm.rank].sum()
    ties.sub_(before).clamp_(min=0)

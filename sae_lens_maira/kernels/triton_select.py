"""Compaction of the scores above a bound, one pass over (rows, d_sae): found = {(b, j): h[b, j] > bound[j]}.

Each program reads one stretch of one row, counts its hits, draws that many places with one atomic and writes flat
indices there. Places come in any order; the host sorts about 1.1 k B integers afterwards. Read once, the scores cost
their size in traffic, which is the bound. It knows nothing about what a bound means.
"""

# pyright: reportCallIssue=false
# triton's own types know neither launch options (num_warps) nor that a jitted function is launched, not called.

import torch
import triton
import triton.language as tl

from sae_lens_maira.kernels.scores import DenseScores

BLOCK = 2048
"""Scores per program: 16 per thread with 4 warps, so four 128-bit loads are in flight per thread."""
WARPS = 4
FIRST_SHARE = 64
"""The first buffer holds 1 / 64 of all scores; a fuller result is written again into one that fits."""


@triton.jit
def compact_kernel(found, counter, scores, bounds, capacity, d_sae, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < d_sae
    score = tl.load(scores + row * d_sae + col, mask=inside, other=0.0)
    bound = tl.load(bounds + col, mask=inside, other=0.0)
    hit = ((score > bound) & inside).to(tl.int32)
    number = tl.sum(hit, 0)
    if number > 0:
        ticket = tl.atomic_add(counter, number)
        place = ticket + tl.cumsum(hit, 0) - 1
        tl.store(found + place, row * d_sae + col, mask=(hit > 0) & (place < capacity))


def compact_above(scores: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Flat indices, ascending int64, of the entries of (rows, d_sae) above their column's bound (d_sae,)."""
    rows, d_sae = scores.shape
    if rows == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    capacity = scores.numel() // FIRST_SHARE + 1024
    while True:
        found = torch.empty(capacity, dtype=torch.int64, device=scores.device)
        counter = torch.zeros(1, dtype=torch.int32, device=scores.device)
        grid = (rows, triton.cdiv(d_sae, BLOCK))
        compact_kernel[grid](found, counter, scores, bounds, capacity, d_sae, BLOCK=BLOCK, num_warps=WARPS)
        number = int(counter)
        if number <= capacity:
            return found[:number].sort().values
        capacity = number


class TritonScores(DenseScores):
    """Scores in full, searched by the kernel."""

    def _flat_above(self, bound: torch.Tensor | float) -> torch.Tensor:
        bounds = torch.as_tensor(bound, dtype=self.h.dtype, device=self.h.device)
        return compact_above(self.h, bounds.expand(self.shape[1]).contiguous())

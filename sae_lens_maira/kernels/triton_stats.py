"""Firing statistics on the GPU, from fire counts per latent instead of a (batch, d_sae) mask.

    frequency += count,     since_fired <- 0 if count > 0 else since_fired + 1

This takes one launch and reads or writes three vectors of length d_sae.
"""

# pyright: reportCallIssue=false
# triton's type hints contain neither launch options (num_warps) nor the launch syntax of a jitted function.

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def firing_kernel(counts, frequency, since_fired, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    count = tl.load(counts + place, mask=inside, other=0)
    total = tl.load(frequency + place, mask=inside, other=0.0)
    since = tl.load(since_fired + place, mask=inside, other=0.0)
    tl.store(frequency + place, total + count.to(total.dtype), mask=inside)
    tl.store(since_fired + place, tl.where(count > 0, 0.0, since + 1.0), mask=inside)


def record_firing_(counts: torch.Tensor, frequency: torch.Tensor, since_fired: torch.Tensor) -> None:
    """Update frequency and since_fired (d_sae,) float32 in place from counts (d_sae,) int64."""
    size = len(counts)
    firing_kernel[(triton.cdiv(size, BLOCK),)](counts, frequency, since_fired, size, BLOCK=BLOCK, num_warps=4)

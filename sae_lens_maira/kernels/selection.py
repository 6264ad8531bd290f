"""Exact selection of the n largest positive entries of h * norm over a whole batch, without sorting it.

    1. a lower bound `lo` of the n-th largest entry: last step's threshold, or a sample of rows
    2. compaction of the entries above `lo` (about 1.1 n of them), one pass over the scores
    3. the n-th largest of those, by radix selection on the bits of the floats
    4. a check that makes step 1 harmless: if the n-th largest is not safely above `lo`, lower `lo` and repeat

Ties go to the lowest flat index (rank by rank). Counts and digit histograms are summed over ranks, so that
the result is that of one process with all rows; a rank sends 256 integers per digit and never its scores.
Scores are made by `scores`; the GPU has a selection of its own, `triton_select`.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from sae_lens_maira.errors import BackendError
from sae_lens_maira.kernels.comm import Communicator
from sae_lens_maira.kernels.layout import Layout, build_layout
from sae_lens_maira.kernels.workspace import Workspace

SAFETY = 0.98
"""Last step's threshold times this is the first lower bound; too high only costs a second compaction."""
SAFER = 0.9
"""The same for the second lower bound."""
SAMPLED_ROWS = 16
SAMPLE_SLACK = 1.15


class Sampled(Protocol):
    """Scores h (rows, d_sae) of one rank of which a part can be looked at."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of this rank, d_sae."""
        ...

    def sample(self, rows: int) -> torch.Tensor:
        """H * norm of about so many evenly spaced rows, flattened."""
        ...


class Scores(Sampled, Protocol):
    """Scores in some form; `above` is exact, the rest may be estimates."""

    def above(self, lo: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flat indices (ascending), h and h * norm of a set that contains every entry with h * norm > lo > 0.

        At lo = 0 it holds exactly the positive entries.
        """
        ...


class Selection(NamedTuple):
    """Kept entries of this rank: flat indices ascending, h, h * norm; and the threshold over all ranks."""

    flat: torch.Tensor
    h: torch.Tensor
    values: torch.Tensor
    threshold: float
    """The n-th largest entry; 0 if fewer than n are positive."""


class Selected(NamedTuple):
    """Kept entries of this rank, laid out for the passes; the result of a backend's selection."""

    layout: Layout
    h: torch.Tensor
    values: torch.Tensor
    threshold: torch.Tensor | float | None
    """The n-th largest entry; None if fewer than n are positive and none is known from an earlier step."""
    smallest: torch.Tensor
    """Smallest kept entry of this rank, 0-d; inf if there is none."""
    check: torch.Tensor | None = None
    """Numbers on the device of which the first says whether this is the selection; None where it is known to be."""


def select_and_lay_out(
    scores: Scores, n: int, tokens: int, comm: Communicator, workspace: Workspace, widths: tuple[int, ...]
) -> Iterator[Selected]:
    """The one right selection of `select`, laid out."""
    known = workspace.threshold
    found = select(scores, n, tokens, comm, None if known is None else float(known))
    layout = build_layout(found.flat, scores.shape[0], widths)
    smallest = found.values.min() if len(found.values) else found.values.new_full((), torch.inf)
    yield Selected(layout, found.h, found.values, found.threshold or known, smallest)


def refuse_broken(number: int) -> None:
    """Raise if scores were larger than their low-precision upper bound.

    Raises:
        BackendError: The low-precision product of this machine is not what the proof assumes.
    """
    if number:
        raise BackendError(
            f"{number} scores are larger than their low-precision upper bounds, so exact selection by candidates is "
            "not safe with this machine's matrix product. Expected the product to accumulate in float32. "
            "Set candidates='off'."
        )


def select(scores: Scores, n: int, tokens: int, comm: Communicator, hint: float | None) -> Selection:
    """The n largest positive entries over all ranks.

    Args:
        scores: This rank's scores.
        n: Entries to keep over all ranks.
        tokens: Rows over all ranks.
        comm: Reductions over ranks.
        hint: Threshold of an earlier step. It changes the cost only, never the result.
    """
    for lo in lower_bounds(scores, n, tokens, comm, hint):
        index, h, values = scores.above(lo)
        total = sum(comm.counts(len(index)))
        if total < n and lo > 0:
            continue
        if total <= n:  # every positive entry is kept
            positive = values > 0
            return Selection(index[positive], h[positive], values[positive], 0.0)
        threshold, ties = kth_largest(values, n, comm)
        # Entries left out of the compaction are at most lo (1 + rounding of lo / norm).
        if lo > 0 and threshold <= lo * (1 + 8 * torch.finfo(values.dtype).eps):
            continue
        kept = keep(values, threshold, ties, comm).nonzero().squeeze(1)
        return Selection(index[kept], h[kept], values[kept], threshold)
    raise AssertionError("the last bound is 0, where every positive entry is a candidate")


def lower_bounds(
    scores: Sampled, n: int, tokens: int, comm: Communicator, hint: float | None
) -> Iterator[float]:
    """Lower bounds of the n-th largest entry, likely first, 0 last; arguments as `select`."""
    if n == 0:
        yield float(torch.finfo(torch.float32).max)
        yield 0.0
        return
    if hint is not None and hint > 0:
        yield hint * SAFETY
        yield hint * SAFER
    rows, _ = scores.shape
    share = n / max(tokens, 1)
    estimate = torch.tensor(torch.inf, dtype=torch.float64)
    if rows > 0:
        sample = scores.sample(SAMPLED_ROWS)
        wanted = int(share * sample.numel() / scores.shape[1] * SAMPLE_SLACK) + 64
        top = sample.topk(min(wanted, sample.numel()), sorted=False).values
        estimate = top.min().nan_to_num(0.0).double().clamp(min=0).cpu()
    lo = float(comm.min_(estimate))
    if 0 < lo < torch.inf:
        yield lo
        yield lo / 2
        yield lo / 8
    yield 0.0


def kth_largest(values: torch.Tensor, k: int, comm: Communicator) -> tuple[float, int]:
    """The k-th largest of positive floats over all ranks, and how many entries equal to it belong to the k.

    Positive floats order as their bits do, so eight bits per round fix the answer: 4 rounds for float32, 8
    for float64.
    """
    wide = values.dtype == torch.float64
    keys = values.contiguous().view(torch.int64 if wide else torch.int32).to(torch.int64)
    found, remaining = 0, k
    for shift in range(56 if wide else 24, -1, -8):
        digit = (keys >> shift) & 255
        histogram = comm.sum_(torch.bincount(digit, minlength=256))
        at_least = histogram.flip(0).cumsum(0).cpu()
        place = int((at_least < remaining).sum())
        if place:
            remaining -= int(at_least[place - 1])
        found |= (255 - place) << shift
        keys = keys[digit == 255 - place]
    bits = torch.tensor(found, dtype=torch.int64)
    as_float = bits.view(torch.float64) if wide else bits.to(torch.int32).view(torch.float32)
    return float(as_float), remaining


def keep(values: torch.Tensor, threshold: float, ties: int, comm: Communicator) -> torch.Tensor:
    """Mask of the entries above the threshold and of the first `ties` entries equal to it, in rank order."""
    equal = values == threshold
    here = comm.counts(int(equal.sum()))
    mine = min(here[comm.rank], max(0, ties - sum(here[: comm.rank])))
    if mine < here[comm.rank]:
        equal &= equal.cumsum(0) <= mine
    return (values > threshold) | equal


def compact(mask: torch.Tensor) -> torch.Tensor:
    """Flat indices of the True entries of a contiguous boolean tensor, ascending.

    True entries are rare here. Reading eight of them as one word first makes the search about eight times
    cheaper.
    """
    flat = mask.view(-1)
    if flat.numel() % 8 or flat.storage_offset() % 8:
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64).nonzero().squeeze(1)
    word, byte = flat.view(-1, 8)[words].nonzero(as_tuple=True)
    return words[word] * 8 + byte

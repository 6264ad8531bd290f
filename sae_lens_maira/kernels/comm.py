"""Reductions over the processes that share one batch: the interface, a single process, and torch.distributed.

The batch is divided by rows or by latents. By rows, every rank has all weights and its share of the rows. Selection,
losses, thresholds and gradients of the whole batch follow from sums and minima over ranks. Either every rank then
applies the same update, and weights are sent only once, at the start; or each rank receives the sums of its share of
the latents, updates these rows and sends them to the others. Shares of a batch may differ in size or be empty. By
latents, see `own_latents`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from sae_lens_maira.distributed import Ranks


class Communicator(Protocol):
    """Reductions over the processes that share one batch."""

    @property
    def rank(self) -> int:
        """Number of this process; rows of lower ranks come first in the batch."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over ranks in place and return it."""
        ...

    def min_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the elementwise minimum over ranks in place and return it."""
        ...

    def counts(self, value: int) -> list[int]:
        """One integer per rank, in rank order."""
        ...

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows (n_r, d), concatenated in rank order."""
        ...

    def start_sum_(self, tensor: torch.Tensor, own_rows: bool = False) -> "Pending":
        """Begin to sum a tensor over ranks in place.

        Args:
            tensor: Not to be touched before `Pending.wait`.
            own_rows: Whether each rank needs the sums of its share of the rows only (see `shares`). The other rows
                are undefined afterwards.
        """
        ...


class Pending:
    """Exchanges under way."""

    def wait(self) -> None:
        """Return when their results can be used; on a GPU, by work that is queued after this call."""


class LocalCommunicator:
    """One process: every reduction is the identity."""

    rank = 0
    size = 1

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as it is."""
        return tensor

    def min_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as it is."""
        return tensor

    def counts(self, value: int) -> list[int]:
        """Return the one value."""
        return [value]

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows as they are."""
        return rows

    def start_sum_(self, tensor: torch.Tensor, own_rows: bool = False) -> Pending:
        """Do nothing."""
        return Pending()


class Division(NamedTuple):
    """How a batch is divided over ranks; at most one of the two has several."""

    rows: Communicator
    """Ranks that have other rows."""
    latents: Communicator
    """Ranks that have other latents of the same rows."""

    @classmethod
    def of(cls, comm: Communicator, own_latents: bool) -> "Division":
        """Division of a batch by latents or by rows."""
        alone = LocalCommunicator()
        return cls(alone, comm) if own_latents else cls(comm, alone)

    @property
    def ranks(self) -> Communicator:
        """All ranks."""
        return self.rows if self.latents.size == 1 else self.latents


class ProcessGroupCommunicator:
    """`Communicator` over torch.distributed's default group; a failed exchange names the rank that caused it."""

    def __init__(self, ranks: Ranks, device: str = "cpu") -> None:
        """Start the group if it is not running.

        Args:
            ranks: This process and the others, from `distributed()`.
            device: Device of the tensors; "cuda" or "cuda:1" uses NCCL, anything else gloo.

        Raises:
            ConfigError: The ranks have no address to meet at.
            RankError: A rank did not come.
        """
        ranks.join_group(device)
        self._ranks, self.rank, self.size = ranks, ranks.rank, ranks.size
        self._device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def min_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise minimum over ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def start_sum_(self, tensor: torch.Tensor, own_rows: bool = False) -> Pending:
        """Begin to sum a tensor.

        With `own_rows` every share is reduced to its owner: the traffic of a reduce-scatter, for shares of any size.
        """
        started = _Started(self, tensor)
        if own_rows:
            for owner, rows in self._owned(tensor):
                started.begin(dist.reduce, rows, dst=owner)
        elif tensor.numel():
            started.begin(dist.all_reduce, slice(None))
        return started

    def start_spread_(self, tensor: torch.Tensor) -> Pending:
        """Begin to overwrite every share of the rows of a tensor with its owner's: an all-gather in place."""
        started = _Started(self, tensor)
        for owner, rows in self._owned(tensor):
            started.begin(dist.broadcast, rows, src=owner)
        return started

    def collect(self, share: torch.Tensor, own: list[slice], length: int) -> torch.Tensor | None:
        """Rows of all shares, in memory of the host, on rank 0; None on the others.

        Args:
            share: This rank's rows.
            own: Rows of each rank.
            length: Rows of all ranks.
        """
        if self.rank > 0:
            if len(share):
                with self._explained():
                    dist.send(share.contiguous().to(self._device), dst=0)
            return None
        whole = torch.empty(length, *share.shape[1:], dtype=share.dtype)
        whole[own[0]] = share.cpu()
        for owner, rows in list(enumerate(own))[1:]:
            part = share.new_empty(len(range(length)[rows]), *share.shape[1:], device=self._device)
            if len(part):
                with self._explained():
                    dist.recv(part, src=owner)
                whole[rows] = part.cpu()
        return whole

    def scatter_(self, share: torch.Tensor, own: list[slice], whole: torch.Tensor) -> torch.Tensor:
        """Overwrite this rank's rows with those of rank 0's tensor, in place; the reverse of `collect`.

        Args:
            share: This rank's rows.
            own: Rows of each rank.
            whole: Rows of all ranks, on any device; read on rank 0 only.
        """
        if self.rank == 0:
            for owner, rows in list(enumerate(own))[1:]:
                with self._explained():
                    dist.send(whole[rows].contiguous().to(self._device), dst=owner)
            return share.copy_(whole[own[0]])
        received = torch.empty(share.shape, dtype=share.dtype, device=self._device)
        with self._explained():
            dist.recv(received, src=0)
        return share.copy_(received)

    def counts(self, value: int) -> list[int]:
        """One integer per rank, in rank order."""
        mine = torch.zeros(self.size, dtype=torch.int64, device=self._device)
        mine[self.rank] = value
        return self.sum_(mine).tolist()

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite the tensor with rank 0's, in place."""
        sent = tensor.contiguous().to(self._device)
        with self._explained():
            dist.broadcast(sent, src=0)
        return tensor.copy_(sent)

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows (n_r, d), concatenated in rank order."""
        counts = self.counts(len(rows))
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        with self._explained():
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def _reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        direct = tensor.is_contiguous() and tensor.device.type == self._device.type
        sent = tensor if direct else tensor.contiguous().to(self._device)
        with self._explained():
            dist.all_reduce(sent, op)
        return tensor if direct else tensor.copy_(sent)

    def _owned(self, tensor: torch.Tensor) -> list[tuple[int, slice]]:
        """Owner and rows of every share that is not empty."""
        return [(r, rows) for r, rows in enumerate(shares(len(tensor), self.size)) if rows.start < rows.stop]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._ranks.explain(error) from error


def shares(length: int, size: int) -> list[slice]:
    """Rows that each rank owns; they differ by at most one in number and may be none."""
    edges = [length * rank // size for rank in range(size + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


class _Started(Pending):
    """Exchanges of one tensor, or of a copy of it where the group needs another device or memory order."""

    def __init__(self, comm: ProcessGroupCommunicator, tensor: torch.Tensor) -> None:
        direct = tensor.is_contiguous() and tensor.device.type == comm._device.type
        self._comm, self._tensor, self._works = comm, tensor, []
        self._sent = tensor if direct else tensor.contiguous().to(comm._device)

    def begin(self, exchange: Callable[..., Any], rows: slice, **options: int) -> None:
        """Begin an exchange of some rows."""
        with self._comm._explained():
            self._works.append(exchange(self._sent[rows], async_op=True, **options))

    def wait(self) -> None:
        with self._comm._explained():
            for work in self._works:
                work.wait()
        if self._sent is not self._tensor:
            self._tensor.copy_(self._sent)

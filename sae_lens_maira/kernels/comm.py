"""Reductions over the processes that share one batch: the interface, a single process, and torch.distributed.

The step of rank r sees its own rows. Selection, losses, thresholds and gradients of the whole batch follow from sums
and minima over ranks, so every rank applies the same update and weights are sent only once, at the start. Shares of a
batch may differ in size or be empty.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

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

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._ranks.explain(error) from error

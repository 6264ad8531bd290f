"""Training over several processes of torchrun: gloo on CPU, NCCL on GPU.

Rank r holds rows of its own; the batch is all ranks' rows in rank order. Selection, thresholds, losses, gradients and
statistics are those of the whole batch (the reductions are listed in `kernels.comm`), so every rank applies the same
update and weights never need to be sent. Shares may differ in size or be empty. It knows nothing about SAEs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from sae_lens_maira.errors import ConfigError


class ProcessGroupCommunicator:
    """`kernels.Communicator` over torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums over ranks in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def min_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise minimum over ranks in place."""
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def counts(self, value: int) -> list[int]:
        """One integer per rank, in rank order."""
        mine = torch.zeros(self.size, dtype=torch.int64, device=self._device)
        mine[self.rank] = value
        return self.sum_(mine).tolist()

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrites the tensor with rank 0's, in place."""
        sent = tensor.contiguous().to(self._device)
        dist.broadcast(sent, src=0)
        return tensor.copy_(sent)

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows (n_r, d), concatenated in rank order."""
        counts = self.counts(len(rows))
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def _reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if tensor.is_contiguous() and tensor.device.type == self._device.type:
            dist.all_reduce(tensor, op)
            return tensor
        sent = tensor.contiguous().to(self._device)
        dist.all_reduce(sent, op)
        return tensor.copy_(sent)


@contextmanager
def distributed(timeout_s: float = 600.0) -> Iterator[ProcessGroupCommunicator]:
    """Joins the processes that torchrun started.

    Args:
        timeout_s: A rank that does not answer for so long counts as failed.

    Raises:
        ConfigError: the process was not started by torchrun.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "RANK and WORLD_SIZE are not set; multi-process training expects torchrun, for example "
            "`torchrun --nproc-per-node 2 train.py`."
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield ProcessGroupCommunicator()
    finally:
        dist.destroy_process_group()


class ShardedBatches:
    """A rank's share of every batch of a provider that yields the same whole batches on all ranks."""

    def __init__(self, batches: Iterator[torch.Tensor], rank: int, size: int) -> None:
        self.batches, self.rank, self.size = batches, rank, size

    def __iter__(self) -> "ShardedBatches":
        """The iterator itself."""
        return self

    def __next__(self) -> torch.Tensor:
        """The rank's rows of the next batch; shares differ by at most one row and may be empty."""
        batch = next(self.batches)
        start, stop = (len(batch) * (self.rank + i) // self.size for i in (0, 1))
        return batch[start:stop]

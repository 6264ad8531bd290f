"""What a step needs to know of other processes: four reductions, nothing more.

The step of rank r sees its own rows. Selection, losses, thresholds and gradients of the whole batch follow
from sums and minima over ranks; `LocalCommunicator` is the single process, where all of them are the
identity. The version on torch.distributed lives with the trainer. This module knows nothing about tensors'
meaning.
"""

from typing import Protocol

import torch


class Communicator(Protocol):
    """Reductions over the processes that share one batch."""

    @property
    def rank(self) -> int:
        """Position of this process; rows of lower ranks come first in the batch."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over ranks in place and returns it."""
        ...

    def min_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Takes the elementwise minimum over ranks in place and returns it."""
        ...

    def counts(self, value: int) -> list[int]:
        """One integer per rank, in rank order."""
        ...


class LocalCommunicator:
    """One process: every reduction is the identity."""

    rank = 0
    size = 1

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor as it is."""
        return tensor

    def min_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor as it is."""
        return tensor

    def counts(self, value: int) -> list[int]:
        """Returns the one value."""
        return [value]

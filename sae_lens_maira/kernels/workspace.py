"""State that is reused between steps: buffers, the last threshold, and results of the optimizer for the next step."""

from typing import NamedTuple

import torch


class Refreshed(NamedTuple):
    """Results that the optimizer computed from a weight (d_sae, d_in) during its update."""

    norms: torch.Tensor
    """(d_sae,) row norms."""
    shadow: torch.Tensor | None
    """(d_sae, d_in) bfloat16 copy."""
    pointer: int
    version: int

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether this was computed from the given weight, and torch has counted no change since."""
        return weight.data_ptr() == self.pointer and weight._version == self.version


class Workspace:
    """Buffers that the next step reuses, and the last threshold. Without it results are the same, but slower.

    Attributes:
        threshold: Threshold of the last selection; a 0-d tensor if reading it would make the host wait.
        refreshed: Name of a weight -> its norms and copy.
    """

    def __init__(self) -> None:
        self.threshold: torch.Tensor | float | None = None
        self.refreshed: dict[str, Refreshed] = {}
        self._buffers: dict[str, torch.Tensor] = {}

    def norms(self, W_dec: torch.Tensor) -> torch.Tensor:
        """(d_sae,) row norms, from the optimizer's pass if it computed them."""
        known = self.refreshed.get("W_dec")
        return (
            known.norms
            if known is not None and known.is_of(W_dec)
            else torch.linalg.vector_norm(W_dec, dim=1)
        )

    def bf16(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """bfloat16 copy of a (d_sae, d_in) weight, from the optimizer's pass if it made one."""
        known = self.refreshed.get(name)
        if known is not None and known.shadow is not None and known.is_of(weight):
            return known.shadow
        return weight.to(torch.bfloat16)

    def buffer(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Uninitialised tensor of this shape, in the same storage as last time if it fits."""
        found = self._buffers.get(name)
        if found is None or found.shape != shape or found.dtype != like.dtype or found.device != like.device:
            found = torch.empty(shape, dtype=like.dtype, device=like.device)
            self._buffers[name] = found
        return found

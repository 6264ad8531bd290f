"""What a study's prompt leaves behind, and room for what is written after it: the parts of shared prompts.

A `Prompt` holds one study without padding; a `Room` holds keys and values of one block for a batch of them, padded on
the left, with space for the tokens to come. It knows nothing about interventions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer


class Room(DynamicLayer):
    """Keys and values of one block with room for what will be written, so that a step copies one token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room, self.used = room, 0
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, heads, T, d_head), and return all that is held."""
        start, self.used = self.used, self.used + key_states.shape[2]
        if not self._buffers:
            shape = (*key_states.shape[:2], self._room, key_states.shape[3])
            self._buffers = [key_states.new_empty(shape), value_states.new_empty(shape)]
            self.is_initialized = True
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.used] = new
        self._show()
        return self.keys, self.values  # pyright: ignore[reportReturnType] - set by _show

    def rewind(self, length: int) -> None:
        """Forget what stands behind `length`."""
        self.used = min(self.used, length)
        self._show()

    def keep(self, rows: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        self._buffers = [buffer[rows] for buffer in self._buffers]
        self._show()

    def get_seq_length(self, *args: Any) -> int:
        """Positions held."""
        return self.used

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.used] for buffer in self._buffers)


@dataclass(frozen=True)
class Prompt:
    """One study's prompt, without padding: its encoding's columns (1, L), h (L, d_model), keys and values a block.

    `first` (d_vocab,) are the unsteered logits of the report's first token.
    """

    columns: dict[str, torch.Tensor]
    hidden: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    first: torch.Tensor


def position_ids_of(mask: torch.Tensor) -> torch.Tensor:
    """(B, n) place of every real token in its row, 0 at padding: the positions that `generate` gives."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def left_padded(parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """(B, heads, length, d_head) of (heads, l, d_head), padded on the left."""
    return torch.stack([nn.functional.pad(part, (0, 0, length - part.shape[1], 0)) for part in parts])

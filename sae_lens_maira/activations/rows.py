"""Activation rows in memory: one row per kept token with its study, position, role, token and patch.

`reader.read_rows` makes them from studies, `ActivationStore.blocks` from a store, and `RowProvider` feeds them to a
trainer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
import torch

from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import TokenRole

COLUMNS = ("study", "position", "role", "token", "view", "patch_row", "patch_col", "source")
"""Columns of the index that a store keeps next to the values."""
SOURCES = ("teacher", "generated", "prompt")
"""Where a row's text comes from: the study's report, the model's own, or the prompt alone. Stored by number."""


def study_order(index: pd.DataFrame) -> np.ndarray:
    """(N,) order of the rows of an index by study, source and position."""
    return np.lexsort((index["position"], index["source"], index["study"]))


@dataclass(frozen=True)
class ActivationRows:
    """Kept activations of N tokens.

    Attributes:
        values: (N, d_in) float32.
        study: (N,) int64, number of the study in the sequence of studies that was read.
        position: (N,) int32, position in that study's own unpadded sequence.
        role: (N,) int8, a `TokenRole`.
        token: (N,) int32 token id.
        view: (N,) int8, 0 frontal, 1 lateral, 2 prior frontal, -1 for text.
        patch_row, patch_col: (N,) int16, -1 for text.
        hook_name: The hook point of the values.
    """

    values: torch.Tensor
    study: np.ndarray
    position: np.ndarray
    role: np.ndarray
    token: np.ndarray
    view: np.ndarray
    patch_row: np.ndarray
    patch_col: np.ndarray
    hook_name: str

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_image(self) -> np.ndarray:
        """(N,) True for image patches."""
        return self.role == TokenRole.IMAGE

    def where(self, mask: np.ndarray) -> "ActivationRows":
        """The rows where `mask` (N,) is True."""
        if mask.shape != (len(self),):
            raise StoreError(f"mask has shape {mask.shape}; expected ({len(self)},), one entry per row.")
        kept = {name: getattr(self, name)[mask] for name in _columns()}
        return replace(self, values=self.values[torch.from_numpy(mask)], **kept)


def joined(parts: Sequence[ActivationRows]) -> ActivationRows:
    """Concatenate rows of one hook point.

    Raises:
        StoreError: There are no parts, or they come from several hook points.
    """
    names = {part.hook_name for part in parts}
    if len(names) != 1:
        raise StoreError(
            f"Cannot join rows of {', '.join(sorted(names)) or 'no hook point'}; expected exactly one hook point."
        )
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _columns()}
    return ActivationRows(values=torch.cat([part.values for part in parts]), hook_name=names.pop(), **columns)


def _columns() -> list[str]:
    return [f.name for f in fields(ActivationRows) if f.name not in ("values", "hook_name")]


class RowProvider:
    """Endless shuffled batches of rows in memory: an SAELens data provider (`Iterator[Tensor (B, d_in)]`).

    Each pass over the rows is a new permutation, seeded by (seed, pass). The last short batch of a pass is completed
    from the next one, so every row is used equally often.
    """

    def __init__(self, values: torch.Tensor, batch_size: int, seed: int = 0) -> None:
        if len(values) == 0:
            raise StoreError("There are no rows to train on; read or harvest some first.")
        self._values, self._batch, self._seed = values, batch_size, seed
        self._passes, self._queue = 0, torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        while len(self._queue) < self._batch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._passes)
            self._queue = torch.cat([self._queue, torch.randperm(len(self._values), generator=generator)])
            self._passes += 1
        chosen, self._queue = self._queue[: self._batch], self._queue[self._batch :]
        return self._values[chosen]

"""Training rows straight from the model, without a store: harvest's forward pass and SAELens' mixing buffer.

An epoch is every study once, in an order drawn from (seed, epoch), `group` studies at a time; the rows that the filter
keeps go through SAELens' buffer, whose shuffle is seeded here without changing torch's global generator. The state is
the next group: rows that wait in the buffer when it is taken are not used in that epoch, as in SAELens. A store
resumes at the exact row.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sae_lens.training.mixing_buffer import mixing_buffer

from sae_lens_maira.activations.provider import require_same_batches
from sae_lens_maira.activations.reader import RowReader
from sae_lens_maira.activations.sampling import RowSettings
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.studies import Study


class DirectProvider:
    """`Iterator[Tensor (batch_size, d_in) float32]` over studies; endless and deterministic by seed."""

    def __init__(
        self,
        maira: Maira2,
        studies: Sequence[Study],
        hook: str,
        batch_size: int,
        settings: RowSettings | None = None,
        seed: int = 0,
        buffer_rows: int = 65536,
        mix_fraction: float = 0.5,
        group: int = 64,
        workers: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare; the model runs when a batch needs it.

        Args:
            maira: Model and processor.
            studies: Any sequence; items are read when needed.
            hook: Hook point.
            batch_size: Rows per batch.
            settings: Which rows are kept.
            seed: Random seed of order and mixing.
            buffer_rows: SAELens' buffer; at least a batch.
            mix_fraction: Share of the buffer that stays for the next mixing.
            group: Studies that are sorted by length and pass through the model together, a few at a time.
            workers: Threads that encode ahead of the model.
            device: Device of the batches.

        Raises:
            StoreError: No studies, a hook point off the token sequence, or a buffer below a batch.
        """
        if buffer_rows < batch_size:
            raise StoreError(
                f"buffer_rows is {buffer_rows:,} and a batch has {batch_size:,} rows; the buffer must hold a batch."
            )
        self._reader = RowReader(maira, studies, [hook], settings or RowSettings(), workers)
        self._hook, self._n, self._group, self._seed = hook, len(studies), group, seed
        self._device = torch.device(device)
        self._shape = (buffer_rows, batch_size, mix_fraction)
        self._next_group = 0
        self._restart()

    def _restart(self) -> None:
        self._mixer = torch.Generator().manual_seed(self._seed * 1_000_003 + self._next_group).get_state()
        buffer_rows, batch_size, mix_fraction = self._shape
        self._batches = mixing_buffer(buffer_rows, batch_size, self._groups(), mix_fraction)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    @property
    def d_in(self) -> int:
        """Values per row."""
        return self._reader.hooks[self._hook]

    @property
    def _per_epoch(self) -> int:
        return -(-self._n // self._group)

    @property
    def epoch(self) -> int:
        """Epochs whose studies have all been read."""
        return self._next_group // self._per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Which studies come next; numbers only."""
        return {"group": self._next_group, "identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the studies that `state` names; the buffer is filled from them.

        Raises:
            StoreError: It belongs to other studies or settings.
        """
        require_same_batches(state, self._identity())
        self._next_group = state["group"]
        self._restart()

    def __next__(self) -> torch.Tensor:
        # SAELens' buffer draws from torch's global generator: set ours for the draw, then restore the old state.
        outside = torch.get_rng_state()
        torch.set_rng_state(self._mixer)
        try:
            batch = next(self._batches)
            self._mixer = torch.get_rng_state()
        finally:
            torch.set_rng_state(outside)
        return batch.to(self._device)

    def _groups(self) -> Iterator[torch.Tensor]:
        """Rows (n, d_in) of one group of studies after another, without end."""
        empty = 0
        while True:
            epoch, number = divmod(self._next_group, self._per_epoch)
            order = np.random.default_rng([self._seed, epoch]).permutation(self._n)
            chosen = order[number * self._group : (number + 1) * self._group].tolist()
            self._next_group += 1
            parts = [part.values[self._hook] for part in self._reader.batches(chosen)]
            rows = torch.cat(parts)
            empty = 0 if len(rows) else empty + 1
            if empty == self._per_epoch:
                raise StoreError(
                    f"No token of {self._n} studies is kept by the roles and rates that were requested, so there is "
                    "nothing to train on. Choose other roles."
                )
            if len(rows):
                yield rows

    def _identity(self) -> dict[str, Any]:
        """What determines the batches, as JSON values."""
        names = dict(zip(("buffer_rows", "batch_size", "mix_fraction"), self._shape, strict=True))
        return {
            "hook point": self._hook,
            "studies": self._n,
            "group": self._group,
            "seed": self._seed,
        } | names

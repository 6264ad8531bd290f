"""Shuffled batches from a store, endless, in bounded memory: a data provider in SAELens' sense.

An epoch draws all segments of all shards in a new order, opens `buffer_rows` rows' worth of them at a time and
permutes the rows of that buffer; each kept row comes exactly once an epoch, and a batch may reach over buffers and
epochs. Where the next batch starts is the whole state. SAELens' own mixing buffer drops the rows left at the end and
cannot be resumed, so it is not used. It knows nothing about SAEs.
"""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

from sae_lens_maira.activations.sampling import RoleRates, rate_table, role_rates
from sae_lens_maira.activations.store import SEGMENT, ActivationStore
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import TokenRole


class StoreProvider:
    """`Iterator[Tensor (batch_size, d_in) float32]` over a store; deterministic by seed, resumable anywhere."""

    def __init__(
        self,
        store: ActivationStore,
        hook: str,
        batch_size: int,
        seed: int = 0,
        roles: str | Collection[TokenRole | str] = "all",
        rates: RoleRates | None = None,
        buffer_rows: int = 65536,
        device: torch.device | str = "cpu",
    ) -> None:
        """Look at the manifest; rows are read when a batch needs them.

        Args:
            store: to read; shards committed later are not seen.
            hook: hook point.
            batch_size: rows a batch.
            seed: of the shuffle.
            roles: rows to use.
            rates: the mixture: share of a role's rows an epoch uses, drawn anew each epoch, e.g. `{"image": 0.1}`.
            buffer_rows: rows in memory at a time, rounded up to whole segments of 4,096.
            device: of the batches.

        Raises:
            StoreError: no such hook point, or no rows.
        """
        if hook not in store.spec.hooks:
            raise StoreError(
                f"{store.folder} holds {', '.join(store.spec.hooks)}, not {hook!r}; name one of these."
            )
        self._store, self._hook, self._batch, self._seed = store, hook, batch_size, seed
        self._rates = role_rates(roles, rates)
        self._table, self._device = rate_table(self._rates), device
        self._per_buffer = max(1, -(-buffer_rows // SEGMENT))
        self._segments = [
            (shard, start) for shard, rows in store.rows.items() for start in range(0, rows, SEGMENT)
        ]
        self._roles = {shard: store.index(shard, ["role"])["role"].to_numpy() for shard in store.rows}
        present = np.zeros(len(TokenRole), dtype=np.int64)
        for roles_here in self._roles.values():
            present += np.bincount(roles_here, minlength=len(TokenRole))
        if not (present * self._table).sum():
            raise StoreError(
                f"{store.folder} has no row of the wanted roles at {hook}; it holds "
                f"{', '.join(f'{r.name.lower()} {present[r]:,}' for r in TokenRole if present[r]) or 'no rows'}."
            )
        self._epoch, self._buffer, self._offset = 0, 0, 0
        self._loaded: tuple[int, int] | None = None
        self._values, self._order = torch.empty(0), torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts; numbers only."""
        return {
            "epoch": self._epoch,
            "buffer": self._buffer,
            "offset": self._offset,
            "identity": self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            StoreError: it belongs to another store, shuffle or mixture.
        """
        if state["identity"] != self._identity():
            raise StoreError(
                "The state was taken from a provider with other rows, seed, batch size, buffer or mixture, so its "
                "place means nothing here. Build the provider as it was, or start anew."
            )
        self._epoch, self._buffer, self._offset = state["epoch"], state["buffer"], state["offset"]

    def __next__(self) -> torch.Tensor:
        parts, missing = [], self._batch
        while missing:
            self._load()
            part = self._order[self._offset : self._offset + missing]
            parts.append(self._values[part])
            missing -= len(part)
            self._offset += len(part)
            if self._offset >= len(self._order):
                self._offset, self._buffer = 0, self._buffer + 1
                if self._buffer * self._per_buffer >= len(self._segments):
                    self._buffer, self._epoch = 0, self._epoch + 1
        return torch.cat(parts).to(self._device).float()

    def _load(self) -> None:
        """Read the current buffer, unless it is the one in memory."""
        if self._loaded == (self._epoch, self._buffer):
            return
        order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._segments))
        chosen = order[self._buffer * self._per_buffer : (self._buffer + 1) * self._per_buffer]
        rng = np.random.default_rng([self._seed, self._epoch, self._buffer])
        kept, values = [], []
        rows = 0
        for number in chosen:
            shard, start = self._segments[number]
            roles = self._roles[shard][start : start + SEGMENT]
            keep = np.flatnonzero(rng.random(len(roles)) < self._table[roles])
            if len(keep):
                values.append(self._store.read(self._hook, shard, start, start + SEGMENT))
                kept.append(keep + rows)
                rows += len(roles)
        # Freed before the new buffer is joined, so that no more than one is held whole.
        self._values = torch.empty(0)
        self._values = torch.cat(values) if values else torch.empty(0, self._store.spec.hooks[self._hook])
        positions = np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)
        self._order = torch.from_numpy(rng.permutation(positions))
        self._loaded = (self._epoch, self._buffer)

    def _identity(self) -> list[Any]:
        rates = sorted((int(role), rate) for role, rate in self._rates.items())
        return [
            self._hook,
            self._batch,
            self._seed,
            self._per_buffer,
            len(self._store),
            len(self._segments),
            [list(pair) for pair in rates],
        ]

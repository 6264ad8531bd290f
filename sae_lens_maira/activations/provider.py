"""Shuffled batches from a store, endless, in bounded memory: a data provider in SAELens' sense.

An epoch draws all segments of all shards in a new order, opens `buffer_rows` rows' worth of them at a time and
permutes the rows of that buffer; each kept row comes exactly once an epoch, and a batch may reach over buffers and
epochs. Where the next batch starts is the whole state: threads read the next buffer ahead and change nothing that
comes out. SAELens' own mixing buffer drops the rows left at the end and cannot be resumed, so it is not used. It
knows nothing about SAEs.
"""

from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from sae_lens_maira.activations.prefetch import BatchMemory, empty_rows
from sae_lens_maira.activations.sampling import RoleRates, rate_table, role_rates
from sae_lens_maira.activations.segments import SEGMENT
from sae_lens_maira.activations.store import DTYPES, ActivationStore
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import TokenRole


class _Buffer(NamedTuple):
    """One buffer, being read.

    Attributes:
        key: Epoch and number of the buffer.
        memory: (n, d_in) rows of this rank's segments, one segment after the other.
        at: (rows of all segments,) row in `memory`, or -1 where the segment belongs to another rank.
        kept: Positions in `at` of every segment's kept rows.
    """

    key: tuple[int, int]
    memory: torch.Tensor
    at: np.ndarray
    kept: list[Future[np.ndarray]]


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
        workers: int = 2,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Look at the manifest; rows are read when a batch needs them.

        Args:
            store: to read; shards committed later are not seen.
            hook: hook point.
            batch_size: rows a batch.
            seed: of the shuffle.
            roles: rows to use.
            rates: the mixture: share of a role's rows an epoch uses, drawn anew each epoch, e.g. `{"image": 0.1}`.
            buffer_rows: rows that are mixed, rounded up to whole segments of 4,096; twice as many lie in memory.
            workers: threads that read and check segments, the next buffer's while this one is used.
            device: of the batches.
            rank: Number of this process, from 0.
            world_size: Number of processes that share the batches. Every process reads every world_size-th segment of
                a buffer and yields those rows of each batch that are in them; all shares together are the batch of a
                single process, in another order. Shares differ in size.

        Raises:
            StoreError: no such hook point, or no rows.
        """
        if hook not in store.spec.hooks:
            raise StoreError(
                f"{store.folder} holds {', '.join(store.spec.hooks)}, not {hook!r}; name one of these."
            )
        if batch_size < 1 or workers < 1:
            raise StoreError(f"batch_size is {batch_size} and workers is {workers}; both must be at least 1.")
        self._store, self._hook, self._batch, self._seed = store, hook, batch_size, seed
        self._rates = role_rates(roles, rates)
        self._table, self._device = rate_table(self._rates), torch.device(device)
        self._per_buffer = max(1, -(-buffer_rows // SEGMENT))
        self._rank, self._world = rank, world_size
        self._segments = [
            (shard, start) for shard, rows in store.rows.items() for start in range(0, rows, SEGMENT)
        ]
        present = store.role_counts()
        if not sum(present.get(role, 0) for role in self._rates):
            raise StoreError(
                f"{store.folder} has no row of the wanted roles at {hook}; it holds "
                f"{', '.join(f'{role.name.lower()} {n:,}' for role, n in present.items()) or 'no rows'}."
            )
        self._roles: dict[int, np.ndarray] = {}
        self._epoch, self._buffer, self._offset = 0, 0, 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="store")
        self._ahead: _Buffer | None = None
        self._loaded: tuple[int, int] | None = None
        width, dtype = store.spec.hooks[hook], DTYPES[store.spec.dtype]
        self._values, self._order = torch.empty(0, width), torch.empty(0, dtype=torch.long)
        # The memory of buffers and of a batch in the store's dtype is used again and again.
        self._spare: list[torch.Tensor] = []
        self._rows = empty_rows(batch_size, width, dtype)
        self._batches = BatchMemory(batch_size, width, torch.float32)

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
        drawn = filled = 0
        while drawn < self._batch:
            self._load()
            part = self._order[self._offset : self._offset + self._batch - drawn]
            mine = part[part >= 0]
            torch.index_select(self._values, 0, mine, out=self._rows[filled : filled + len(mine)])
            filled += len(mine)
            drawn += len(part)
            self._offset += len(part)
            if self._offset >= len(self._order):
                self._epoch, self._buffer = self._following(self._epoch, self._buffer)
                self._offset = 0
        if self._device.type != "cpu":
            return self._rows[:filled].to(self._device).float()
        return self._batches.empty()[:filled].copy_(self._rows[:filled])

    def _following(self, epoch: int, buffer: int) -> tuple[int, int]:
        """The buffer after this one."""
        last = (buffer + 1) * self._per_buffer >= len(self._segments)
        return (epoch + 1, 0) if last else (epoch, buffer + 1)

    def _load(self) -> None:
        """Have the current buffer in memory, and the next one on its way."""
        key = (self._epoch, self._buffer)
        if self._loaded == key:
            return
        coming, self._ahead = self._ahead, None
        if coming is not None and coming.key != key:  # a state was loaded
            for job in coming.kept:
                job.cancel()
            coming = None
        if coming is None:
            coming = self._start(key)
        if self._loaded is not None:
            self._spare.append(self._values)
        self._loaded = None
        positions = np.concatenate([job.result() for job in coming.kept])
        self._values = coming.memory
        rng = np.random.default_rng([self._seed, *key, 1])
        self._order = torch.from_numpy(coming.at[rng.permutation(positions)])
        self._loaded = key
        self._ahead = self._start(self._following(*key))

    def _start(self, key: tuple[int, int]) -> _Buffer:
        """Let the threads read a buffer."""
        order = np.random.default_rng([self._seed, key[0]]).permutation(len(self._segments))
        chosen = order[key[1] * self._per_buffer : (key[1] + 1) * self._per_buffer]
        rng = np.random.default_rng([self._seed, *key])
        memory = self._spare.pop() if self._spare else self._memory()
        counts = [self._rows_of(int(number)) for number in chosen]
        at = np.full(sum(counts), -1, dtype=np.int64)
        jobs, first, filled = [], 0, 0
        for turn, (number, count) in enumerate(zip(chosen, counts, strict=True)):
            place = None
            if turn % self._world == self._rank:
                place = memory[filled : filled + count]
                at[first : first + count] = np.arange(filled, filled + count)
                filled += count
            jobs.append(
                self._pool.submit(self._read, *self._segments[int(number)], place, rng.random(count), first)
            )
            first += count
        return _Buffer(key, memory, at, jobs)

    def _read(
        self, shard: int, start: int, place: torch.Tensor | None, draws: np.ndarray, first: int
    ) -> np.ndarray:
        """Read one segment to its place, if it has one and any row is kept; the kept rows' positions in the buffer."""
        if shard not in self._roles:
            self._roles[shard] = self._store.index(shard, ["role"])["role"].to_numpy()
        roles = self._roles[shard][start : start + len(draws)]
        kept = np.flatnonzero(draws < self._table[roles])
        if len(kept) and place is not None:
            self._store.read_into(place, self._hook, shard, start)
        return kept + first

    def _rows_of(self, number: int) -> int:
        shard, start = self._segments[number]
        return min(SEGMENT, self._store.rows[shard] - start)

    def _memory(self) -> torch.Tensor:
        """Memory for this rank's segments of any buffer."""
        largest = sorted(self._rows_of(number) for number in range(len(self._segments)))
        most = -(-self._per_buffer // self._world)
        rows = sum(largest[-most:])
        return empty_rows(rows, self._rows.shape[1], self._rows.dtype)

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

"""Shuffled batches from a store, endless, in bounded memory: a data provider in SAELens' sense.

An epoch takes all segments of all shards in a new random order, `buffer_rows` rows at a time, and permutes the rows of
each such buffer; every kept row comes exactly once per epoch, and a batch may span buffers and epochs. The state is the
position of the next batch: threads read the next buffer and prepare the next batches without changing what comes out.
SAELens' own mixing buffer drops the rows left at the end of an epoch and cannot be resumed, so it is not used.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from sae_lens_maira.activations.mixing import Mixing
from sae_lens_maira.activations.prefetch import BatchMemory, empty_rows
from sae_lens_maira.activations.sampling import RoleRates, rate_table, role_rates
from sae_lens_maira.activations.segments import TORCH_DTYPES
from sae_lens_maira.activations.store import ActivationStore
from sae_lens_maira.activations.store_spec import SEGMENT
from sae_lens_maira.errors import StoreError
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.memory import free_bytes


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


class _Prepared(NamedTuple):
    """A batch, the position (epoch, buffer, offset) after it, and the event of its copy to a GPU."""

    batch: torch.Tensor
    place: tuple[int, int, int]
    ready: torch.cuda.Event | None


def require_same_batches(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise StoreError unless a provider's state was taken from one that yields the same batches.

    Args:
        state: What `state_dict` returned.
        identity: What determines the batches of the provider that is to continue, by name.
    """
    theirs = state.get("identity")
    theirs = theirs if isinstance(theirs, dict) else {}
    differ = [
        f"{name} is {theirs.get(name)!r} there and {value!r} here"
        for name, value in identity.items()
        if theirs.get(name) != value
    ]
    if differ:
        raise StoreError(
            f"The state was taken from a provider of other batches: {'; '.join(differ)}. Use the same studies or store "
            "and the same settings to continue it, or start again (`train --resume false`)."
        )


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
        buffer_rows: int | None = None,
        workers: int = 2,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        ahead: int | None = None,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        """Look at the manifest; rows are read when a batch needs them.

        Args:
            store: Store to read; shards committed later are not seen.
            hook: Hook point.
            batch_size: Rows per batch.
            seed: Random seed of the shuffle.
            roles: Rows to use.
            rates: The mixture: share of a role's rows per epoch, drawn again in each epoch, e.g. `{"image": 0.1}`.
            buffer_rows: Rows that are mixed, rounded up to whole segments of 1,024; memory holds twice as many. If not
                given, as many as batches need to reach 0.92 of the ideal mixing, in at most a quarter of the free
                memory; a provider that loads a state then takes the size of the state.
            workers: Threads that read and check segments, the next buffer's while this one is used.
            device: Device of the batches.
            rank: Number of this process, from 0.
            world_size: Number of processes that share the batches. Every process reads every world_size-th segment of
                a buffer and yields those rows of each batch that are in them; all shares together are the batch of a
                single process, in another order. Shares differ in size.
            ahead: Batches that a thread prepares before they are asked for; 2 on a GPU, where they are copied from
                pinned memory on a stream of their own, and 0 on a CPU, whose cores the training uses, if not given.
            agree: Function that returns the smallest of the numbers that the processes call it with, since their free
                memory differs; needed for several processes without `buffer_rows`.

        Raises:
            StoreError: No such hook point, or no rows; several processes and neither `buffer_rows` nor `agree`.
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
        self._mixing: Mixing | None = None
        self._sized = buffer_rows is None
        if buffer_rows is not None:
            self._per_buffer = max(1, -(-buffer_rows // SEGMENT))
        elif world_size > 1 and agree is None:
            raise StoreError(
                f"{world_size} processes share the batches, and their free memory differs. Give all of them the same "
                "buffer_rows."
            )
        else:
            free = free_bytes(torch.device("cpu"))
            size = SEGMENT * store.spec.hooks[hook] * TORCH_DTYPES[store.spec.dtype].itemsize
            wanted = self.mixing.default_segments(size, free)
            self._per_buffer = wanted if agree is None else agree(wanted)
        self._roles: dict[int, np.ndarray] = {}
        self._epoch, self._buffer, self._offset = 0, 0, 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="store")
        self._ahead: _Buffer | None = None
        self._loaded: tuple[int, int] | None = None
        width, dtype = store.spec.hooks[hook], TORCH_DTYPES[store.spec.dtype]
        self._values, self._order = torch.empty(0, width), torch.empty(0, dtype=torch.long)
        # The memory of buffers and of a batch in the store's dtype is used again and again.
        self._spare: list[torch.Tensor] = []
        self._rows = empty_rows(batch_size, width, dtype)
        self._batches = BatchMemory(batch_size, width, torch.float32)
        self._depth = (2 if self._device.type == "cuda" else 0) if ahead is None else ahead
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._prepared: deque[Future[_Prepared]] = deque()
        self._place = (0, 0, 0)
        self._ring: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    @property
    def rates(self) -> dict[str, float]:
        """Share of each role's stored rows that an epoch uses, by role name."""
        return {role.name.lower(): rate for role, rate in self._rates.items()}

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._place[0]

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts; numbers only."""
        epoch, buffer, offset = self._place
        return {"epoch": epoch, "buffer": buffer, "offset": offset, "identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            StoreError: It belongs to another store, shuffle or mixture.
        """
        mine, theirs = self._identity(), state.get("identity")
        if self._sized and isinstance(theirs, dict) and isinstance(theirs.get("buffer_rows"), int):
            mine["buffer_rows"] = theirs["buffer_rows"]
        require_same_batches(state, mine)
        for job in self._prepared:
            job.cancel()
        while self._prepared:
            job = self._prepared.popleft()
            if not job.cancelled():
                job.result()
        self._resize(mine["buffer_rows"] // SEGMENT)
        self._place = self._epoch, self._buffer, self._offset = (
            state["epoch"],
            state["buffer"],
            state["offset"],
        )

    @property
    def mixing(self) -> Mixing:
        """How the rows of the store mix, estimated from the index of a few shards."""
        if self._mixing is None:
            self._mixing = Mixing.of_store(self._store, self._batch, self._table)
        return self._mixing

    @property
    def buffer_rows(self) -> int:
        """Rows of the buffer, whole segments of 1,024."""
        return self._per_buffer * SEGMENT

    def __next__(self) -> torch.Tensor:
        if not self._depth:
            batch, self._place, _ = self._make()
            return batch
        while len(self._prepared) <= self._depth:
            self._prepared.append(self._maker.submit(self._make))
        batch, self._place, ready = self._prepared.popleft().result()
        if ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready)
            batch.record_stream(stream)
        return batch

    def _make(self) -> "_Prepared":
        """The next batch, the position after it, and the event of its copy to a GPU."""
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
        place = self._epoch, self._buffer, self._offset
        if self._stream is None:
            return _Prepared(self._batches.empty()[:filled].copy_(self._rows[:filled]), place, None)
        pinned, done = self._pinned()
        pinned[:filled].copy_(self._rows[:filled])
        with torch.cuda.stream(self._stream):
            batch = pinned[:filled].to(self._device, non_blocking=True).float()
            done.record(self._stream)
        return _Prepared(batch, place, done)

    def _pinned(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """A page-locked buffer that no copy reads any more, and the event that marks the end of its next copy."""
        if len(self._ring) <= self._depth:
            self._ring.append((torch.empty_like(self._rows).pin_memory(), torch.cuda.Event()))
        else:
            self._ring.rotate(-1)
        pinned, done = self._ring[-1]
        done.synchronize()
        return pinned, done

    def _following(self, epoch: int, buffer: int) -> tuple[int, int]:
        """The buffer after this one."""
        last = (buffer + 1) * self._per_buffer >= len(self._segments)
        return (epoch + 1, 0) if last else (epoch, buffer + 1)

    def _load(self) -> None:
        """Load the current buffer, and start loading the next one."""
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
        """Start reading a buffer in the threads."""
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

    def _resize(self, segments: int) -> None:
        """Use buffers of another size from the next batch on."""
        if segments == self._per_buffer:
            return
        if self._ahead is not None:
            for job in self._ahead.kept:
                job.cancel()
        self._per_buffer, self._ahead, self._loaded = segments, None, None
        self._spare.clear()

    def _memory(self) -> torch.Tensor:
        """Memory for this rank's segments of any buffer."""
        largest = sorted(self._rows_of(number) for number in range(len(self._segments)))
        most = -(-self._per_buffer // self._world)
        rows = sum(largest[-most:])
        return empty_rows(rows, self._rows.shape[1], self._rows.dtype)

    def _identity(self) -> dict[str, Any]:
        """What determines the batches, as JSON values."""
        return {
            "hook point": self._hook,
            "batch_size": self._batch,
            "seed": self._seed,
            "buffer_rows": self.buffer_rows,
            "store": self._store.fingerprint,
            "rows": len(self._store),
            "rates": self.rates,
        }

"""Order-independent random sampling.

    priority(seed, a, b) = 63 mixed bits of (seed, a, b);     a sample is what has the lowest priorities

A sample depends on the items and the seed, never on their order, so a stream can be sampled in one pass and in any
number of blocks with the same result. `RowSample` keeps the active latents of a bounded number of rows.
"""

import numpy as np

LAST = np.int64(2**63 - 1)
"""Above every priority: an empty place."""


def priority(seed: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mixed bits of two numbers that broadcast, as int64 >= 0 (SplitMix64's finaliser over each in turn)."""
    x = np.full(1, seed, dtype=np.uint64)
    for part in (a, b):
        x = _mix(x ^ (np.asarray(part, dtype=np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return (x >> np.uint64(1)).view(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class LowestPriorities:
    """For each of n keys, the `size` items of lowest priority, each with a value.

    One call of `offer` may name a key once.

    Attributes:
        priority, item: (n, size) int64; LAST and -1 where nothing is kept.
        value: (n, size) float32.
    """

    def __init__(self, n: int, size: int) -> None:
        self.priority = np.full((n, size), LAST)
        self.item = np.full((n, size), -1, dtype=np.int64)
        self.value = np.zeros((n, size), dtype=np.float32)
        self._worst = np.full(n, LAST)

    def offer(
        self, keys: np.ndarray, priorities: np.ndarray, item: int, values: np.ndarray | None = None
    ) -> None:
        """Offer one item to distinct `keys` (m,) with `priorities` (m,)."""
        if not self.item.shape[1]:
            return
        hot = priorities < self._worst[keys]
        keys, priorities = keys[hot], priorities[hot]
        place = self.priority[keys].argmax(1)
        self.priority[keys, place] = priorities
        self.item[keys, place] = item
        if values is not None:
            self.value[keys, place] = values[hot]
        self._worst[keys] = self.priority[keys].max(1)

    def restore(self, priority: np.ndarray, item: np.ndarray, value: np.ndarray) -> None:
        """Replace the contents by those of another sampler."""
        self.priority, self.item, self.value = priority, item, value
        if item.shape[1]:
            self._worst = priority.max(1)

    def add(self, other: "LowestPriorities") -> None:
        """Keep the lowest priorities of both; no item was offered to both."""
        priorities = np.concatenate([self.priority, other.priority], 1)
        order = np.argsort(priorities, axis=1, kind="stable")[:, : self.item.shape[1]]
        items = np.concatenate([self.item, other.item], 1)
        values = np.concatenate([self.value, other.value], 1)
        self.restore(*(np.take_along_axis(x, order, 1) for x in (priorities, items, values)))

    @property
    def nbytes(self) -> int:
        return self.priority.nbytes + self.item.nbytes + self.value.nbytes + self._worst.nbytes


class RowSample:
    """The active latents of at most `size` rows, those of lowest priority (up to twice as many meanwhile).

    Attributes:
        limit: no row of this priority or a higher one can still be kept.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self._seed = size, seed
        self._priority = np.zeros(0, dtype=np.int64)
        self._lengths = np.zeros(0, dtype=np.int64)
        self._latents = np.zeros(0, dtype=np.int32)
        self.limit = LAST

    def state(self) -> dict[str, np.ndarray]:
        """The rows kept, for `restore`; `limit` belongs to it."""
        return {"priority": self._priority, "lengths": self._lengths, "latents": self._latents}

    def restore(self, priority: np.ndarray, lengths: np.ndarray, latents: np.ndarray, limit: int) -> None:
        """Take the rows of a `state` in place of what is kept."""
        self._priority, self._lengths, self._latents = priority, lengths, latents
        self.limit = np.int64(limit)

    def merge(self, other: "RowSample") -> None:
        """Keep the rows of lowest priority of both."""
        limit = min(self.limit, other.limit)
        parts = [one._below(limit) for one in (self, other)]
        self._priority, self._lengths, self._latents = (
            np.concatenate(columns) for columns in zip(*parts, strict=True)
        )
        self.limit = limit
        self._cut()

    def _below(self, limit: np.int64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kept = self._priority < limit
        return self._priority[kept], self._lengths[kept], self._latents[np.repeat(kept, self._lengths)]

    def add(self, a: np.ndarray, b: np.ndarray, row: np.ndarray, latent: np.ndarray) -> None:
        """Offer n rows.

        Args:
            a: (n,) first number of a row's name.
            b: (n,) second number.
            row: (nnz,) rows of the active latents, ascending.
            latent: (nnz,) the active latents.
        """
        order = priority(self._seed, a, b)
        kept = order < self.limit
        self._priority = np.r_[self._priority, order[kept]]
        self._lengths = np.r_[self._lengths, np.bincount(row, minlength=len(a))[kept]]
        self._latents = np.r_[self._latents, latent[kept[row]].astype(np.int32)]
        if len(self._priority) > 2 * self.size:
            self._cut()

    def _cut(self) -> None:
        if len(self._priority) <= self.size:
            return
        self.limit = np.partition(self._priority, self.size)[self.size]
        self._priority, self._lengths, self._latents = self._below(self.limit)

    def triplets(self) -> tuple[int, np.ndarray, np.ndarray]:
        """`(rows, row, latent)`: how many rows were kept, and (nnz,) their active latents."""
        self._cut()
        return len(self._lengths), np.repeat(np.arange(len(self._lengths)), self._lengths), self._latents

"""How many studies are mixed in a batch, and how many rows a shuffle buffer needs for that.

    p(S) = between + (within - between) / S       chance that two rows of a buffer of S segments are of one study
    effective studies of a batch = 1 / (1/B + (1 - 1/B) p(S))

The effective number of studies of a batch of B rows is 1 / (sum of squared shares of studies), in expectation. `within`
is the chance for two rows of one segment, `between` that for rows of two segments. A buffer of all segments mixes as
the whole store does, which is the ideal.
"""

from dataclasses import dataclass

import numpy as np

from sae_lens_maira.activations.store import ActivationStore
from sae_lens_maira.activations.store_spec import SEGMENT

ENOUGH = 0.92
"""Share of the ideal that a buffer of the default size reaches: 0.9, and a margin for unequal studies."""
LEAST_SEGMENTS = 64
MEMORY_SHARE = 0.25
"""Share of the free memory that the two buffers (one in use, one being read) may take."""
SAMPLED_SHARDS = 8


@dataclass(frozen=True)
class Mixing:
    """How the rows of a store mix.

    Attributes:
        batch: Rows per batch.
        segments: Number of segments of the store.
        within: Chance that two rows of one segment are of one study.
        whole: Chance that two rows of the whole store are of one study.
    """

    batch: int
    segments: int
    within: float
    whole: float

    @classmethod
    def of_store(cls, store: ActivationStore, batch: int, weights: np.ndarray) -> "Mixing":
        """Estimate from the index of up to eight shards; a segment is a random sample of its shard.

        Args:
            store: The store.
            batch: Rows per batch.
            weights: (roles,) share of a role's rows that an epoch uses.
        """
        shards = [shard for shard, rows in store.rows.items() if rows]
        chosen = {shards[i * len(shards) // SAMPLED_SHARDS] for i in range(SAMPLED_SHARDS)}
        pairs = sampled = within = 0.0
        for shard in sorted(chosen):
            index = store.index(shard, ["study", "role"])
            weight = weights[index["role"].to_numpy()]
            _, study = np.unique(index["study"].to_numpy(), return_inverse=True)
            rows = np.bincount(study, weight)
            same = float((rows**2).sum() - (weight**2).sum())
            total = float(weight.sum())
            within += total * same / max(total**2 - float((weight**2).sum()), 1.0)
            pairs, sampled = pairs + same, sampled + total
        every = sum(n * float(weights[role]) for role, n in store.role_counts().items())
        segments = sum(-(-rows // SEGMENT) for rows in store.rows.values())
        return cls(
            batch, segments, within / max(sampled, 1.0), pairs / max(sampled, 1.0) / max(every - 1, 1.0)
        )

    @property
    def ideal(self) -> float:
        """Effective studies of a batch of rows drawn from the whole store."""
        return self._effective(self.whole)

    def effective(self, segments: int) -> float:
        """Effective studies of a batch from a buffer of so many segments."""
        n = min(segments, self.segments)
        return self._effective(self._between + (self.within - self._between) / n)

    def segments_for(self, share: float) -> int:
        """The fewest segments in a buffer whose batches reach this share of the ideal."""
        target = ((1 / (share * self.ideal)) - 1 / self.batch) / (1 - 1 / self.batch) if self.batch > 1 else 1
        excess = self.within - self._between
        if excess <= 0 or target <= self._between:
            return 1 if excess <= 0 else self.segments
        return min(self.segments, max(1, int(np.ceil(excess / (target - self._between) - 1e-9))))

    def default_segments(self, segment_bytes: float, free: float) -> int:
        """Segments of a buffer that mixes well enough, or as many as fit in a quarter of the free memory.

        The segments of an epoch are divided evenly over its buffers, so that the last one is not a small rest.

        Args:
            segment_bytes: Size of a segment.
            free: Bytes of free memory.
        """
        needed = min(self.segments, max(LEAST_SEGMENTS, self.segments_for(ENOUGH)))
        even = -(-self.segments // (self.segments // needed))
        return int(min(even, max(1, MEMORY_SHARE * free // (2 * segment_bytes))))

    @property
    def _between(self) -> float:
        if self.segments < 2:
            return self.within
        return max(0.0, (self.whole - self.within / self.segments) / (1 - 1 / self.segments))

    def _effective(self, same: float) -> float:
        return 1 / (1 / self.batch + (1 - 1 / self.batch) * same)


def describe_mixing(mixing: Mixing, buffer_rows: int) -> str:
    """A line for stderr about the batches of a provider with a buffer of so many rows."""
    segments = min(mixing.segments, -(-buffer_rows // SEGMENT))
    effective, ideal = mixing.effective(segments), mixing.ideal
    few = effective < 0.9 * ideal
    return (
        f"A batch of {mixing.batch:,} rows has {effective:,.0f} effective studies, {effective / ideal:.0%} of the "
        f"{ideal:,.0f} of rows from the whole store; the buffer mixes {segments * SEGMENT:,} rows"
        f"{'. A larger provider.buffer_rows mixes more' if few else ''}.\n"
    )


__all__ = ["ENOUGH", "Mixing", "describe_mixing"]

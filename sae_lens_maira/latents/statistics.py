"""Statistics of all latents in one pass over activation rows, with memory independent of the number of rows.

    active entries (row, latent, value)  ->  scatter-adds and scatter-maxima over latents, per modality
    peak[study, modality, latent]        ->  studies fired, agreement, top studies, samples per octave, zero studies

    priority(seed, a, b) = 63 mixed bits of (seed, a, b);     a sample is what has the lowest priorities

Activations are counted in the bins of `stats.EDGES`, so that the fraction of rows in an interval [2^i, 2^(i+1)) is
exact and the 99th percentile has a relative error below 1 %. Samples depend on the study and the seed, not on the
order, so that statistics of separate studies can be added: count(A + B) = count(A) + count(B).
"""

from typing import Any

import numpy as np
import torch

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.maps import MAP_BYTES, MapSums
from sae_lens_maira.latents.source import active_entries
from sae_lens_maira.stats import (
    BINS_PER_OCTAVE,
    EDGES,
    HIGHEST_OCTAVE,
    LOWEST_OCTAVE,
    quantile_bins,
    quantile_of_counts,
)

OCTAVES = HIGHEST_OCTAVE - LOWEST_OCTAVE

TEXT, IMAGE = 0, 1

_SUMS = (
    *("rows", "studies", "fired", "studies_fired", "sum", "histogram", "any_fired"),
    *("positives", "labelled", "true_positive", "labelled_fired"),
)

LAST = np.int64(2**63 - 1)
"""Value above every priority, which marks an empty place."""


def priority(seed: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hash a seed and two broadcastable arrays to int64 >= 0 (finaliser of SplitMix64, applied to each in turn)."""
    x = np.full(1, seed, dtype=np.uint64)
    for part in (a, b):
        x = _mix(x ^ (np.asarray(part, dtype=np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return (x >> np.uint64(1)).view(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class LowestPriorities:
    """Sampler that keeps the `size` items of lowest priority for each of n keys, each with a value.

    A call of `offer` may contain each key once.

    Attributes:
        priority, item: (n, size) int64; LAST and -1 at empty places.
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
        """Offer one item for distinct `keys` (m,) with `priorities` (m,)."""
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
        """Merge another sampler; no item may have been offered to both."""
        priorities = np.concatenate([self.priority, other.priority], 1)
        order = np.argsort(priorities, axis=1, kind="stable")[:, : self.item.shape[1]]
        items = np.concatenate([self.item, other.item], 1)
        values = np.concatenate([self.value, other.value], 1)
        self.restore(*(np.take_along_axis(x, order, 1) for x in (priorities, items, values)))

    @property
    def nbytes(self) -> int:
        return self.priority.nbytes + self.item.nbytes + self.value.nbytes + self._worst.nbytes


class RowSample:
    """Active latents of the `size` rows of lowest priority (up to twice as many are kept temporarily).

    Attributes:
        limit: Rows of this priority or a higher one are not kept any more.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self._seed = size, seed
        self._priority = np.zeros(0, dtype=np.int64)
        self._lengths = np.zeros(0, dtype=np.int64)
        self._latents = np.zeros(0, dtype=np.int32)
        self.limit = LAST

    def state(self) -> dict[str, np.ndarray]:
        """Return the rows, for `restore`; save `limit` with it."""
        return {"priority": self._priority, "lengths": self._lengths, "latents": self._latents}

    def restore(self, priority: np.ndarray, lengths: np.ndarray, latents: np.ndarray, limit: int) -> None:
        """Replace the rows by those of a `state`."""
        self._priority, self._lengths, self._latents = priority, lengths, latents
        self.limit = np.int64(limit)

    def merge(self, other: "RowSample") -> None:
        """Merge another sample and keep the rows of lowest priority."""
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
            a: (n,) first number of each row's key.
            b: (n,) second number of each row's key.
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
        """Return `(rows, row, latent)`: the number of rows, and (nnz,) their active latents."""
        self._cut()
        return len(self._lengths), np.repeat(np.arange(len(self._lengths)), self._lengths), self._latents


class LatentStatistics:
    """Running statistics of d_sae latents.

    Arrays with two rows hold text positions first and image positions second.

    Attributes:
        rows, studies: (2,) number of rows and studies seen.
        fired, studies_fired: (2, d_sae) int64 numbers of rows and studies in which each latent fires.
        sum: (2, d_sae) float64 sum of activations.
        max: (2, d_sae) float32 largest activation.
        histogram: (2, d_sae, bins) int32 counts between `EDGES`.
        any_fired: (d_sae,) number of studies in which the latent fires at text or image positions.
        top_value, top_study: (d_sae, top) largest peaks of studies, descending, and these studies; -1 at empty places.
        octaves: Sample of studies per (latent, octave of their peak); key latent * OCTAVES + octave.
        zero: Sample of studies per latent in which it never fires.
        positives, labelled: (2, F) and (2,) numbers of labelled studies with a row of that modality.
        true_positive: (2, d_sae, F) int64 labelled studies with the finding in which the latent fires.
        labelled_fired: (2, d_sae) number of labelled studies in which the latent fires.
        n_studies, last_study: Number of studies seen, and the index of the last one.
        maps: Sums of activations per latent and patch.
    """

    def __init__(
        self,
        d_sae: int,
        grid: tuple[int, int] = (0, 0),
        truth: np.ndarray | None = None,
        labelled: np.ndarray | None = None,
        top: int = 20,
        per_octave: int = 5,
        zero: int = 20,
        sample_rows: int = 4096,
        seed: int = 0,
        map_bytes: int = MAP_BYTES,
    ) -> None:
        """Set all counts to zero.

        Args:
            d_sae: Number of latents.
            grid: Rows and columns of the patch grid; (0, 0) disables maps.
            truth: (n_studies, F) bool, findings of each study.
            labelled: (n_studies,) bool, whether the truth is known; all if None.
            top: Number of studies of largest peak kept per latent.
            per_octave: Number of studies sampled per latent and octave.
            zero: Number of studies sampled per latent in which it never fires.
            sample_rows: Number of rows per modality kept for co-firing.
            seed: Random seed of all sampling.
            map_bytes: Budget for the maps per finding, see `latents.maps`.
        """
        self.d_sae, self.grid, self.seed = d_sae, grid, seed
        self.truth = np.zeros((0, 0), dtype=bool) if truth is None else truth
        self._labelled = np.ones(len(self.truth), dtype=bool) if labelled is None else labelled
        n_findings = self.truth.shape[1]
        self.rows, self.studies = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)
        self.n_studies, self.last_study = 0, -1
        self.fired, self.studies_fired = (torch.zeros(2, d_sae, dtype=torch.int64) for _ in range(2))
        self.sum = torch.zeros(2, d_sae, dtype=torch.float64)
        self.max = torch.zeros(2, d_sae)
        self.histogram = torch.zeros(2, d_sae, len(EDGES) - 1, dtype=torch.int32)
        self.any_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.top_value = torch.zeros(d_sae, top)
        self.top_study = torch.full((d_sae, top), -1, dtype=torch.int64)
        self.octaves = LowestPriorities(d_sae * OCTAVES, per_octave)
        self.zero = LowestPriorities(d_sae, zero)
        self.positives, self.labelled = np.zeros((2, n_findings), dtype=np.int64), np.zeros(2, dtype=np.int64)
        self.true_positive = torch.zeros(2, d_sae, n_findings, dtype=torch.int64)
        self.labelled_fired = torch.zeros(2, d_sae, dtype=torch.int64)
        self.maps = MapSums(d_sae, grid, self.truth, self._labelled, map_bytes)
        self.samples = (RowSample(sample_rows, seed), RowSample(sample_rows, seed + 1))
        self._octave_edges = torch.from_numpy(EDGES[BINS_PER_OCTAVE:-1:BINS_PER_OCTAVE].copy()).float()

    def update(self, rows: ActivationRows, acts: torch.Tensor) -> None:
        """Count a block of whole studies.

        Args:
            rows: n rows; studies ascend within a block and from block to block.
            acts: (n, d_sae) activations of these rows, dense or sparse; `rows.values` is not read.

        Raises:
            RecordError: Sizes do not match, a study occurs in two blocks, or an activation is not finite.
        """
        if tuple(acts.shape) != (len(rows), self.d_sae):
            raise RecordError(
                f"Activations of shape {tuple(acts.shape)} came with {len(rows)} rows; expected "
                f"({len(rows)}, {self.d_sae}). Encode the same rows with the same SAE."
            )
        if not len(rows):
            return
        if rows.study[0] <= self.last_study or (np.diff(rows.study) < 0).any():
            before = max(self.last_study, rows.study.max())
            raise RecordError(
                f"Rows of study {rows.study.min()} came after study {before}; blocks contain "
                "whole studies in ascending order. Harvest in study order, each study in one block."
            )
        row, latent, value = active_entries(acts)
        if not bool(torch.isfinite(value).all()):
            raise RecordError("An activation is not finite; the model or the SAE overflowed. Use float32.")
        self.last_study = int(rows.study[-1])
        modality = torch.from_numpy(rows.is_image.astype(np.int64))
        self.rows += np.bincount(modality.numpy(), minlength=2)
        at = modality[row] * self.d_sae + latent
        ones = torch.ones_like(at)
        self.fired.view(-1).index_add_(0, at, ones)
        self.sum.view(-1).index_add_(0, at, value.double())
        self.max.view(-1).scatter_reduce_(0, at, value, "amax")
        self.histogram.view(-1).index_add_(0, at * (len(EDGES) - 1) + quantile_bins(value), ones.int())
        self.maps.update(rows, row, latent, value)
        for k, sample in enumerate(self.samples):
            mine, entries = (modality == k).numpy(), (modality[row] == k).numpy()
            local = np.cumsum(mine) - 1
            sample.add(
                rows.study[mine], rows.position[mine], local[row.numpy()[entries]], latent.numpy()[entries]
            )
        names, inverse = np.unique(rows.study, return_inverse=True)
        study = torch.from_numpy(inverse)
        peak = torch.zeros(len(names), 2, self.d_sae)
        peak.view(-1).scatter_reduce_(0, study[row] * 2 * self.d_sae + at, value, "amax")
        has = torch.zeros(len(names), 2, dtype=torch.bool)
        has[study, modality] = True
        self._count_studies(names, peak, has.numpy())

    def _count_studies(self, names: np.ndarray, peak: torch.Tensor, has: np.ndarray) -> None:
        """Count peaks (s, 2, d_sae) of the studies `names` (s,), which have rows of the modalities `has` (s, 2)."""
        fires = peak > 0
        self.n_studies += len(names)
        self.studies += has.sum(0)
        self.studies_fired += fires.sum(0)
        highest = peak.amax(1)
        self.any_fired += (highest > 0).sum(0)
        if self.truth.shape[1]:
            known = has & self._labelled[names][:, None]
            self.labelled += known.sum(0)
            for k in (TEXT, IMAGE):
                truth = torch.from_numpy(self.truth[names[known[:, k]]]).float()
                mine = fires[torch.from_numpy(known[:, k]), k].float()
                self.positives[k] += truth.sum(0).long().numpy()
                self.labelled_fired[k] += mine.sum(0).long()
                self.true_positive[k] += (mine.T @ truth).round().long()
        # The edges of the histogram are used, so that a peak on an edge is in the octave of its bin.
        octave = torch.bucketize(highest, self._octave_edges, right=True)
        everyone = np.arange(self.d_sae)
        for number, value, bucket in zip(names.tolist(), highest, octave.numpy(), strict=True):
            order = priority(self.seed, np.full(self.d_sae, number), everyone)
            on = (value > 0).numpy()
            latents = everyone[on]
            self.octaves.offer(latents * OCTAVES + bucket[on], order[on], number, value.numpy()[on])
            self.zero.offer(everyone[~on], order[~on], number)
            self._offer_top(number, value)

    def _offer_top(self, number: int, value: torch.Tensor) -> None:
        if not self.top_value.shape[1]:
            return
        hot = (value > self.top_value[:, -1]).nonzero().squeeze(1)
        values = torch.cat([self.top_value[hot], value[hot, None]], 1)
        studies = torch.cat([self.top_study[hot], torch.full((len(hot), 1), number)], 1)
        # A stable sort, so that of equal peaks the earlier study comes first.
        values, order = values.sort(dim=1, descending=True, stable=True)
        self.top_value[hot] = values[:, :-1]
        self.top_study[hot] = studies.gather(1, order)[:, :-1]

    @property
    def nbytes(self) -> int:
        """Size in bytes, without the sample of rows, which is bounded by its size and the SAE's L0."""
        tensors = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]
        return sum(t.nbytes for t in tensors) + self.maps.nbytes + self.octaves.nbytes + self.zero.nbytes

    def p99(self) -> tuple[np.ndarray, np.ndarray]:
        """99th percentile of activations above zero, as `stats.p99` defines it: (2, d_sae) and over both, (d_sae,)."""
        both = quantile_of_counts(self.histogram.sum(0), self.max.amax(0))
        return quantile_of_counts(self.histogram, self.max).numpy(), both.numpy()

    def state(self) -> dict[str, Any]:
        """Return all counts, as tensors and numbers."""
        own = {name: getattr(self, name) for name in (*_SUMS, "max", "top_value", "top_study")}
        state: dict[str, Any] = {name: torch.as_tensor(value) for name, value in own.items()}
        state |= {"n_studies": self.n_studies, "last": self.last_study, "maps": self.maps.state()}
        for name in ("octaves", "zero"):
            kept: LowestPriorities = getattr(self, name)
            state[name] = {k: torch.as_tensor(getattr(kept, k)) for k in ("priority", "item", "value")}
        state["samples"] = [
            {k: torch.as_tensor(v) for k, v in sample.state().items()} | {"limit": int(sample.limit)}
            for sample in self.samples
        ]
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Replace all counts by those of a `state` of the same sizes.

        Raises:
            RecordError: The state has other sizes.
        """
        if state["fired"].shape != self.fired.shape or state["top_value"].shape != self.top_value.shape:
            raise RecordError(
                f"Saved statistics have {tuple(state['fired'].shape)} latents and "
                f"{tuple(state['top_value'].shape)} top studies, other than the requested ones. Remove the unfinished "
                "collection and start again."
            )
        for name in (*_SUMS, "max", "top_value", "top_study"):
            value, array = state[name], isinstance(getattr(self, name), np.ndarray)
            setattr(self, name, value.numpy() if array else value)
        self.n_studies, self.last_study = state["n_studies"], state["last"]
        self.maps.restore(state["maps"])
        for name in ("octaves", "zero"):
            getattr(self, name).restore(**{k: v.numpy() for k, v in state[name].items()})
        for sample, own in zip(self.samples, state["samples"], strict=True):
            rows = {name: own[name].numpy() for name in ("priority", "lengths", "latents")}
            sample.restore(**rows, limit=own["limit"])

    def add(self, other: "LatentStatistics") -> None:
        """Add the counts of other studies."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max = torch.maximum(self.max, other.max)
        self.n_studies += other.n_studies
        self.last_study = max(self.last_study, other.last_study)
        self.maps.add(other.maps)
        values = torch.cat([self.top_value, other.top_value], 1)
        studies = torch.cat([self.top_study, other.top_study], 1)
        # Sorted by study, then stably by value: of equal peaks the earlier study comes first, as in one pass.
        order = studies.argsort(dim=1, stable=True)
        values, studies = values.gather(1, order), studies.gather(1, order)
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self.top_value.shape[1]]
        self.top_value, self.top_study = values.gather(1, order), studies.gather(1, order)
        self.octaves.add(other.octaves)
        self.zero.add(other.zero)
        for sample, more in zip(self.samples, other.samples, strict=True):
            sample.merge(more)

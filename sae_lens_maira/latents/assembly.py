"""One record from the statistics of one latent: which studies it wants, and what is said about it.

Everything here reads finished statistics; nothing is measured. Octaves of activation become the record's intervals,
bins of a quarter octave its histogram, sums its means. It knows nothing about models, SAEs or files.
"""

from collections.abc import Sequence

import numpy as np

from sae_lens_maira.latents.activations import short, spell
from sae_lens_maira.latents.packing import half_precision
from sae_lens_maira.latents.records import (
    MODALITIES,
    Context,
    FindingAgreement,
    Firing,
    Histogram,
    Interval,
    LatentRecord,
    MeanMap,
    Neighbour,
    TokenWeight,
)
from sae_lens_maira.latents.relations import finding_agreement
from sae_lens_maira.latents.settings import CollectConfig
from sae_lens_maira.latents.statistics import OCTAVES, LatentStatistics
from sae_lens_maira.maira2.prompts import VIEWS
from sae_lens_maira.stats import BINS_PER_OCTAVE, EDGES, LOWEST_OCTAVE, mean_map

BINS_PER_BAR = BINS_PER_OCTAVE // 4
"""Quantile bins that one bar of a record's histogram joins: a bar is a quarter of an octave wide."""

Weights = Sequence[tuple[str, int, float]]


def level_of_latents(widths: Sequence[int], d_sae: int) -> np.ndarray:
    """(d_sae,) level that introduced each latent, from cumulative widths."""
    return np.searchsorted(np.asarray(widths), np.arange(d_sae), side="right")


class RecordBuilder:
    """Builds records from `LatentStatistics`."""

    def __init__(
        self,
        statistics: LatentStatistics,
        findings: Sequence[str],
        levels: np.ndarray,
        config: CollectConfig,
    ) -> None:
        self._s, self._findings, self._config = statistics, findings, config
        self.grid, self.levels, self.samples = statistics.grid, levels, statistics.samples
        self._p99 = statistics.p99()
        self._by_octave = statistics.histogram.sum(0).view(-1, OCTAVES, BINS_PER_OCTAVE).sum(-1).numpy()

    def kind_of(self, latent: int) -> str:
        """The kind of position at which the latent fires at a larger share of rows."""
        share = self._s.fired[:, latent].numpy() / np.maximum(self._s.rows, 1)
        return MODALITIES[int(share.argmax())]

    def _octaves_of(self, latent: int) -> list[int]:
        occupied = np.flatnonzero(self._by_octave[latent])[::-1]
        return occupied[: self._config.intervals].tolist()

    def _in_octave(self, latent: int, octave: int) -> list[int]:
        """Sampled studies whose peak lies in the octave, largest first."""
        place = latent * OCTAVES + octave
        items, values = self._s.octaves.item[place], self._s.octaves.value[place]
        order = np.lexsort((items, -values))
        return [int(items[i]) for i in order if items[i] >= 0]

    def _top(self, latent: int) -> list[int]:
        return [study for study in self._s.top_study[latent].tolist() if study >= 0]

    def _zero(self, latent: int) -> list[int]:
        """Sampled studies in which it never fires, in the order of their draw."""
        order = np.argsort(self._s.zero.priority[latent])
        return [int(self._s.zero.item[latent, i]) for i in order if self._s.zero.item[latent, i] >= 0]

    def wanted(self, latent: int) -> list[int]:
        """Studies that the latent needs a context of."""
        studies = {*self._top(latent), *self._zero(latent)}
        for octave in self._octaves_of(latent):
            studies.update(self._in_octave(latent, octave))
        return sorted(studies)

    def build(
        self,
        latent: int,
        contexts: dict[int, Context],
        neighbours: tuple[Neighbour, ...],
        tokens: tuple[Weights, Weights],
    ) -> LatentRecord:
        """The record of one latent.

        Args:
            latent: its number.
            contexts: study -> context, of all studies that `wanted` names.
            neighbours: of the latent.
            tokens: (token, id, weight) raised and lowered.
        """
        s, rows = self._s, int(self._s.rows.sum())
        studies = int(s.any_fired[latent])
        status = "dead" if not studies else "rare" if studies < self._config.min_studies else "alive"
        largest = float(s.max[:, latent].max())
        up, down = (
            tuple(TokenWeight(spell(token), i, short(weight)) for token, i, weight in side) for side in tokens
        )
        return LatentRecord(
            latent=latent,
            level=int(self.levels[latent]),
            status=status,
            density=int(s.fired[:, latent].sum()) / rows if rows else 0.0,
            max=largest,
            histogram=self._histogram(latent),
            firing=tuple(self._firing(latent, k) for k in range(2)),
            top_tokens=up,
            bottom_tokens=down,
            agreement=self._agreement(latent),
            neighbours=neighbours,
            maps=self._maps(latent),
            top=tuple(contexts[study] for study in self._top(latent)),
            intervals=tuple(
                self._interval(latent, octave, contexts, rows, largest) for octave in self._octaves_of(latent)
            ),
            zero=tuple(contexts[study] for study in self._zero(latent)),
        )

    def _firing(self, latent: int, k: int) -> Firing:
        s, fired = self._s, int(self._s.fired[k, latent])
        return Firing(
            kind=MODALITIES[k],
            rows=int(s.rows[k]),
            fired=fired,
            studies=int(s.studies[k]),
            studies_fired=int(s.studies_fired[k, latent]),
            mean=float(s.sum[k, latent]) / fired if fired else 0.0,
            max=float(s.max[k, latent]),
            p99=float(self._p99[k, latent]),
        )

    def _histogram(self, latent: int) -> Histogram:
        counts = self._s.histogram[:, latent].sum(0).view(-1, BINS_PER_BAR).sum(-1).numpy()
        occupied = np.flatnonzero(counts)
        if not len(occupied):
            return Histogram((), ())
        first, last = int(occupied[0]), int(occupied[-1]) + 1
        edges = EDGES[::BINS_PER_BAR][first : last + 1]
        return Histogram(tuple(short(e) for e in edges.tolist()), tuple(counts[first:last].tolist()))

    def _agreement(self, latent: int) -> tuple[FindingAgreement, ...]:
        found = [
            entry
            for k, kind in enumerate(MODALITIES)
            if self._s.labelled[k]
            for entry in finding_agreement(
                self._s.true_positive[k, latent].numpy(),
                int(self._s.labelled_fired[k, latent]),
                self._s.positives[k],
                int(self._s.labelled[k]),
                self._findings,
                kind,
                self._config.findings,
            )
        ]
        return tuple(sorted(found, key=lambda entry: -entry.f1))

    def _maps(self, latent: int) -> tuple[MeanMap, ...]:
        s, maps = self._s, []
        for view in VIEWS:
            if view in s.maps and bool(s.maps[view][latent].any()):
                mean = half_precision(mean_map(s.maps[view][latent], s.map_rows[view]).numpy())
                maps.append(MeanMap(view, *self.grid, mean, s.map_studies[view]))
        return tuple(maps)

    def _interval(
        self, latent: int, octave: int, contexts: dict[int, Context], rows: int, largest: float
    ) -> Interval:
        low = 2.0 ** (LOWEST_OCTAVE + octave)
        # The outermost octaves also hold what lies beyond them.
        high = 2 * low if octave < OCTAVES - 1 else max(2 * low, largest * 1.001)
        return Interval(
            low=low if octave else 0.0,
            high=high,
            fraction=int(self._by_octave[latent, octave]) / rows,
            contexts=tuple(contexts[study] for study in self._in_octave(latent, octave)),
        )

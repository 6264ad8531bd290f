"""One record from the statistics of one latent: which studies it wants, and what is said about it.

Everything here reads finished statistics; nothing is measured. Octaves of activation become the record's intervals,
bins of a quarter octave its histogram, sums its means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae_lens_maira.latents.activations import short, spell
from sae_lens_maira.latents.maps import MAP_BYTES
from sae_lens_maira.latents.records import (
    MODALITIES,
    Context,
    FindingAgreement,
    Firing,
    Histogram,
    Interval,
    LatentRecord,
    Neighbour,
    TokenWeight,
)
from sae_lens_maira.latents.relations import finding_agreement
from sae_lens_maira.latents.statistics import OCTAVES, LatentStatistics
from sae_lens_maira.stats import BINS_PER_OCTAVE, EDGES, LOWEST_OCTAVE

BINS_PER_BAR = BINS_PER_OCTAVE // 4
"""Quantile bins that one bar of a record's histogram joins: a bar is a quarter of an octave wide."""

Weights = Sequence[tuple[str, int, float]]


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What a record set keeps of each latent.

    Attributes:
        model: Name of the model, for the record set's meta.
        sae: Name of the SAE, for the record set's meta.
        control: "trained", or the kind of control that is recorded instead of the trained SAE.
        latents: Indices of the latents to write records of; all if None. Statistics and neighbours cover all latents.
        top: Number of contexts of largest activation.
        intervals: Number of octaves of activation, highest first, that get contexts.
        per_interval: Number of contexts per octave.
        zero: Number of contexts of studies in which the latent never fires.
        min_studies: With fewer active studies a latent has the status "rare".
        tokens: Number of output tokens that the decoder row raises most, and lowers most.
        findings: Number of findings of highest F1 per modality.
        neighbours: Number of neighbours per relation.
        sample_rows: Number of rows per modality on which co-firing is measured.
        keep_images: Copy images also of credentialed studies; None copies those of the others only.
        image_side: Largest side of a copied image in pixels.
        map_bytes: Memory for mean maps per finding; patches are pooled where full resolution exceeds it.
        chunk: Number of rows encoded at once.
        salt: Salt of the pseudonyms; random and not kept if None.
        seed: Random seed of all sampling.
        save_seconds: Seconds of work that a kill may lose.
        progress: Whether to show progress bars.
    """

    model: str = "phantom"
    sae: str = ""
    control: str = "trained"
    latents: tuple[int, ...] | None = None
    top: int = 20
    intervals: int = 5
    per_interval: int = 5
    zero: int = 20
    min_studies: int = 10
    tokens: int = 10
    findings: int = 5
    neighbours: int = 5
    sample_rows: int = 4096
    keep_images: bool | None = None
    image_side: int = 256
    map_bytes: int = MAP_BYTES
    chunk: int = 2048
    salt: str | None = None
    seed: int = 0
    save_seconds: float = 60.0
    progress: bool = False


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
        self._p99, self._p99_all = statistics.p99()
        self._by_octave = statistics.histogram.sum(0).view(-1, OCTAVES, BINS_PER_OCTAVE).sum(-1).numpy()

    def modality_of(self, latent: int) -> str:
        """The modality at which the latent fires at a larger share of rows."""
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
            p99=short(float(self._p99_all[latent])),
            histogram=self._histogram(latent),
            firing=tuple(self._firing(latent, k) for k in range(2)),
            top_tokens=up,
            bottom_tokens=down,
            agreement=self._agreement(latent),
            neighbours=neighbours,
            maps=s.maps.of(latent),
            top=tuple(contexts[study] for study in self._top(latent)),
            intervals=tuple(
                self._interval(latent, octave, contexts, rows, largest) for octave in self._octaves_of(latent)
            ),
            zero=tuple(contexts[study] for study in self._zero(latent)),
        )

    def _firing(self, latent: int, k: int) -> Firing:
        s, fired = self._s, int(self._s.fired[k, latent])
        return Firing(
            modality=MODALITIES[k],
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
            for k, modality in enumerate(MODALITIES)
            if self._s.labelled[k]
            for entry in finding_agreement(
                self._s.true_positive[k, latent].numpy(),
                int(self._s.labelled_fired[k, latent]),
                self._s.positives[k],
                int(self._s.labelled[k]),
                self._findings,
                modality,
                self._config.findings,
            )
        ]
        return tuple(sorted(found, key=lambda entry: -entry.f1))

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

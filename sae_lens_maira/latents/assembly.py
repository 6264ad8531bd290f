"""Build the record of one latent from its statistics: contexts, agreement, neighbours and output tokens.

The statistics are complete at this point. Octaves of activation become the record's intervals, bins of a quarter octave
its histogram, sums its means.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sae_lens_maira.latents.contexts import short, spell
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
from sae_lens_maira.latents.statistics import OCTAVES, LatentStatistics, RowSample
from sae_lens_maira.stats import BINS_PER_OCTAVE, EDGES, LOWEST_OCTAVE, f1, wilson_arrays


def token_weights(
    decoder: torch.Tensor, gain: torch.Tensor, unembed: torch.Tensor, n: int, chunk: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the tokens that each latent's decoder row raises and lowers most.

    Args:
        decoder: (m, d_in) decoder rows.
        gain: (d_in,) weight of the final norm.
        unembed: (vocabulary, d_in) weight of `lm_head`.
        n: Number of tokens that are raised, and that are lowered.
        chunk: Latents at once.

    Returns:
        `(weights, ids)`, (m, 2, n): the raised tokens, highest first, and the lowered ones, lowest first.
    """
    n = min(n, len(unembed))
    readout = (unembed.float() * gain.float()).T
    weights, ids = [], []
    for part in decoder.float().split(chunk):
        logits = part @ readout
        up, down = logits.topk(n), logits.topk(n, largest=False)
        weights.append(torch.stack([up.values, down.values], 1))
        ids.append(torch.stack([up.indices, down.indices], 1))
    return torch.cat(weights).cpu(), torch.cat(ids).cpu()


def finding_agreement(
    true_positive: np.ndarray,
    fired: int,
    positives: np.ndarray,
    studies: int,
    findings: Sequence[str],
    modality: str,
    n: int,
) -> tuple[FindingAgreement, ...]:
    """Findings that one latent agrees with best, by F1 of firing.

    Args:
        true_positive: (F,) number of labelled studies with the finding in which the latent fires.
        fired: Number of labelled studies in which it fires.
        positives: (F,) number of labelled studies with the finding.
        studies: Number of labelled studies.
        findings: F names.
        modality: "text" or "image".
        n: Largest number of findings; findings without a true positive are left out.
    """
    union = fired + positives - true_positive
    low, high = wilson_arrays(true_positive, union)
    scores = f1(true_positive, np.asarray(fired), positives)
    best = [i for i in np.argsort(-scores, kind="stable")[:n] if true_positive[i]]
    return tuple(
        FindingAgreement(
            finding=str(findings[i]),
            modality=modality,
            f1=float(scores[i]),
            low=float(2 * low[i] / (1 + low[i])),
            high=float(2 * high[i] / (1 + high[i])),
            precision=float(true_positive[i] / fired),
            recall=float(true_positive[i] / positives[i]),
            positives=int(positives[i]),
            studies=int(studies),
        )
        for i in best
    )


class Relations:
    """Neighbours of latents: by co-firing, by decoder direction, and from finer to coarser levels."""

    def __init__(self, samples: Sequence[RowSample], decoder: torch.Tensor, levels: np.ndarray) -> None:
        """Store the sampled rows and the weights.

        Args:
            samples: Sampled rows of each modality.
            decoder: (d_sae, d_in) decoder.
            levels: (d_sae,) level of each latent, 0 the coarsest.
        """
        d_sae = len(decoder)
        parts, offset = [], 0
        for sample in samples:
            n, row, latent = sample.triplets()
            parts.append(np.stack([latent.astype(np.int64), row + offset]))
            offset += n
        entries = torch.from_numpy(np.concatenate(parts, 1))
        self._fires = torch.sparse_coo_tensor(
            entries, torch.ones(entries.shape[1]), (d_sae, offset), check_invariants=False
        ).coalesce()
        self._count = torch.zeros(d_sae).index_add_(0, entries[0], torch.ones(entries.shape[1]))
        self._unit = torch.nn.functional.normalize(decoder.float(), dim=1)
        self._levels = torch.from_numpy(levels)

    def of(
        self, latents: Sequence[int], n: int, least: float = 0.1, refines: float = 0.9, chunk: int = 256
    ) -> Iterator[tuple[Neighbour, ...]]:
        """Find the neighbours of each of `latents`, in that order.

        Args:
            latents: Latents whose neighbours are found.
            n: Largest number of neighbours per relation, strongest first.
            least: Smallest Jaccard index and cosine of a neighbour.
            refines: Smallest share of a latent's rows at which the coarser latent must fire.
            chunk: Latents at once.
        """
        for start in range(0, len(latents), chunk):
            mine = torch.as_tensor(latents[start : start + chunk], dtype=torch.int64)
            own = self._fires.index_select(0, mine).to_dense()
            both = torch.sparse.mm(self._fires, own.T).T
            either = self._count[mine, None] + self._count - both
            jaccard = both / either.clamp(min=1)
            cosine = self._unit[mine] @ self._unit.T
            share = both / self._count[mine, None].clamp(min=1)
            share[self._levels >= self._levels[mine, None]] = 0
            itself = torch.arange(len(mine))
            jaccard[itself, mine] = 0
            cosine[itself, mine] = 0
            found = [
                ("co-fires", _best(jaccard, n, least)),
                ("similar", _best(cosine, n, least)),
                ("refines", _best(share, n, refines)),
            ]
            for i in range(len(mine)):
                yield tuple(Neighbour(j, name, value) for name, best in found for j, value in best[i])


def _best(scores: torch.Tensor, n: int, least: float) -> list[list[tuple[int, float]]]:
    top = scores.topk(min(n, scores.shape[1]), dim=1)
    return [
        [(j, v) for j, v in zip(row, values, strict=True) if v >= least]
        for row, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


BINS_PER_BAR = BINS_PER_OCTAVE // 4
"""Number of quantile bins per bar of a record's histogram: a bar is a quarter of an octave wide."""

Weights = Sequence[tuple[str, int, float]]


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Settings of a collection: what a record set contains for each latent.

    Attributes:
        model: Name of the model, for the record set's meta.
        sae: Name of the SAE, for the record set's meta.
        control: "trained", or the kind of control that is recorded instead of the trained SAE.
        latents: Indices of the latents to write records of; all if None. Statistics and neighbours cover all latents.
        top: Number of contexts of largest activation.
        intervals: Number of octaves of activation, highest first, that get contexts.
        per_interval: Number of contexts per octave.
        zero: Number of contexts of studies in which the latent never fires.
        min_studies: A latent that is active in fewer studies has the status "rare".
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
        save_seconds: Seconds between saves, that is, the work that a kill can lose.
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
        """Modality at which the latent fires at a larger share of rows."""
        share = self._s.fired[:, latent].numpy() / np.maximum(self._s.rows, 1)
        return MODALITIES[int(share.argmax())]

    def _octaves_of(self, latent: int) -> list[int]:
        occupied = np.flatnonzero(self._by_octave[latent])[::-1]
        return occupied[: self._config.intervals].tolist()

    def _in_octave(self, latent: int, octave: int) -> list[int]:
        """Sampled studies whose peak activation is in the octave, largest first."""
        place = latent * OCTAVES + octave
        items, values = self._s.octaves.item[place], self._s.octaves.value[place]
        order = np.lexsort((items, -values))
        return [int(items[i]) for i in order if items[i] >= 0]

    def _top(self, latent: int) -> list[int]:
        return [study for study in self._s.top_study[latent].tolist() if study >= 0]

    def _zero(self, latent: int) -> list[int]:
        """Sampled studies in which the latent never fires, in sampling order."""
        order = np.argsort(self._s.zero.priority[latent])
        return [int(self._s.zero.item[latent, i]) for i in order if self._s.zero.item[latent, i] >= 0]

    def wanted(self, latent: int) -> list[int]:
        """Studies whose contexts the record needs."""
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
        """Build the record of one latent.

        Args:
            latent: Index of the latent.
            contexts: Study -> context, for all studies of `wanted`.
            neighbours: Neighbours of the latent.
            tokens: (token, id, weight) of the raised and the lowered tokens.
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
        # The outermost octaves also contain all values beyond them.
        high = 2 * low if octave < OCTAVES - 1 else max(2 * low, largest * 1.001)
        return Interval(
            low=low if octave else 0.0,
            high=high,
            fraction=int(self._by_octave[latent, octave]) / rows,
            contexts=tuple(contexts[study] for study in self._in_octave(latent, octave)),
        )

"""How latents relate to tokens, findings and each other, from weights and counts alone.

    logits_j = W_U (g * W_dec[j])                        g the gain of the final norm; its 1/rms depends on the input
    F1 = 2 J / (1 + J),  J = TP / (TP + FP + FN)         J is a proportion, so Wilson's interval of J gives F1's
    co-fires: |A and B| / |A or B| over sampled rows     refines: |A and B| / |A| for a coarser B

Everything is done in chunks of latents. It knows nothing about rows, studies or files.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from sae_lens_maira.latents.records import FindingAgreement, Neighbour
from sae_lens_maira.latents.sampling import RowSample
from sae_lens_maira.stats import f1, wilson_arrays


def token_weights(
    decoder: torch.Tensor, gain: torch.Tensor, unembed: torch.Tensor, n: int, chunk: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that each latent's decoder row raises and lowers most.

    Args:
        decoder: (m, d_in) decoder rows.
        gain: (d_in,) weight of the final norm.
        unembed: (vocabulary, d_in) weight of `lm_head`.
        n: tokens at either end.
        chunk: latents at once.

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
    """The findings that one latent agrees with best, by F1 of firing.

    Args:
        true_positive: (F,) labelled studies with the finding in which it fires.
        fired: labelled studies in which it fires.
        positives: (F,) labelled studies with the finding.
        studies: labelled studies.
        findings: F names.
        modality: "text" or "image".
        n: how many to give; those without a true positive are left out.
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
    """Neighbours of latents: in firing, in direction, and from finer to coarser levels."""

    def __init__(self, samples: Sequence[RowSample], decoder: torch.Tensor, levels: np.ndarray) -> None:
        """Take the sampled rows and the weights.

        Args:
            samples: Rows of either modality.
            decoder: (d_sae, d_in).
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
        """Neighbours of each of `latents`, in that order.

        Args:
            latents: whose neighbours.
            n: at most so many of each relation, strongest first.
            least: smallest Jaccard index and cosine that count.
            refines: smallest share of a latent's rows at which the coarser one must fire.
            chunk: latents at once.
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

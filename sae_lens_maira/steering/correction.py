"""Correct a model's errors with latents: damp those that cause false statements, amplify those of missed findings.

    h' = h + sum_suppress -share a_j W_j + sum_boost (factor - 1) a_j W_j          at the frontal patches

Both parts multiply activations that the image itself causes, so an image without them is left alone. `along` changes
only a part of the decoder rows, along a unit direction u such as a statement's mean gradient (`attribution.causes`):

    h' = h + sum_j a_j c_j,     c_j = -share (W_j . u) u  to remove it,     c_j = (factor - 1) (W_j . u) u  to boost it

Latents are ranked on studies with known errors and judged on others, by the change of the label F1 over all findings,
with random latents that change the stream as much as control.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.latents import Encoder
from sae_lens_maira.stats import bootstrap, f1
from sae_lens_maira.steering.interventions import AddVectors, Intervention, Scale
from sae_lens_maira.steering.maps import mean_patch_maps
from sae_lens_maira.steering.positions import patches
from sae_lens_maira.studies import FindingReader


@dataclass(frozen=True)
class Correction:
    """Two sets of latents and how strongly they are changed.

    Attributes:
        suppress: Latents to damp.
        share: Share of their activation that is removed, 0 to 1.
        boost: Latents to amplify.
        factor: Factor of their activation, 1 or more.
    """

    suppress: tuple[int, ...] = ()
    share: float = 1.0
    boost: tuple[int, ...] = ()
    factor: float = 1.0

    def interventions(self) -> list[Intervention]:
        """The interventions.

        Raises:
            InterventionError: Both sets are empty.
        """
        items: list[Intervention] = []
        if self.suppress:
            items.append(Scale(latents=self.suppress, strength=1 - self.share, where=patches()))
        if self.boost:
            items.append(Scale(latents=self.boost, strength=self.factor, where=patches()))
        if not items:
            raise InterventionError("The correction has no latents; rank them on studies with errors.")
        return items

    def step(self, acts: torch.Tensor, decoder: torch.Tensor) -> float:
        """Mean norm of the change over rows of activations (n, d_sae)."""
        total = torch.zeros(len(acts), decoder.shape[1])
        for latents, amount in ((self.suppress, -self.share), (self.boost, self.factor - 1)):
            total += amount * acts[:, list(latents)] @ decoder[list(latents)]
        return float(total.norm(dim=1).mean())


def along(sae: SAE[Any], latents: Sequence[int], direction: torch.Tensor, amount: float) -> AddVectors:
    """Change the part of decoder rows along a unit direction (d_model,) by a multiple of itself, at frontal patches.

    Args:
        sae: SAE whose latents are meant.
        latents: The latents.
        direction: Unit direction; made orthogonal to others by `spared`.
        amount: -1 removes the part.
    """
    rows = sae.W_dec.detach().float()[list(latents)]
    return AddVectors(
        latents=tuple(latents), vectors=amount * (rows @ direction)[:, None] * direction, where=patches()
    )


def mean_step(items: Sequence[AddVectors], acts: torch.Tensor) -> float:
    """Mean norm of the change by `items` over rows of activations (n, d_sae)."""
    steps = torch.stack([acts[:, list(one.latents)] @ one.vectors for one in items])
    return float(steps.sum(0).norm(dim=1).mean())


def spared(direction: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """(d_model,) unit part of a direction that is orthogonal to other directions.

    Raises:
        InterventionError: Nothing is left of it.
    """
    left = direction
    if others:
        basis = torch.linalg.qr(torch.stack(list(others), 1)).Q
        left = direction - basis @ (basis.T @ direction)
    if not bool(left.norm() > 1e-6):
        raise InterventionError(
            "The direction is in the span of those that are to be spared. Spare fewer statements."
        )
    return left / left.norm()


def tied_to_errors(
    rows: ActivationRows,
    encode: Encoder,
    decoder: torch.Tensor,
    wrong: np.ndarray,
    right: np.ndarray,
    n: int,
    specific: float = 3.0,
) -> tuple[int, ...]:
    """Latents that are more active in some studies than in others, largest change of the stream first.

    Latents that are active in every image encode anatomy; multiplying them breaks reports, so they are left out.

    Args:
        rows: Image rows with all patches of the frontal images.
        encode: The SAE's encoder.
        decoder: (d_sae, d_model) decoder rows.
        wrong: (n_studies,) studies whose report states the finding (to suppress it), or that have it (to boost it).
        right: (n_studies,) studies to compare with.
        n: Maximum number of latents.
        specific: Minimum ratio of a latent's mean activation in `wrong` to that in `right`.

    Returns:
        At most `n` latents; none if none is specific enough.

    Raises:
        InterventionError: There is no study on one side.
    """
    with_it, without = mean_patch_maps(rows, encode, wrong, right)
    effect = (with_it - without).norm(dim=0) * decoder.norm(dim=1)
    kept = with_it.sum(0) > specific * without.sum(0)
    order = torch.where(kept, effect, torch.zeros(())).argsort(descending=True)[:n]
    return tuple(int(j) for j in order if kept[j] and effect[j] > 0)


def random_control(
    correction: Correction, acts: torch.Tensor, decoder: torch.Tensor, seed: int, pool: int = 32
) -> Correction:
    """Matched random control: latents of similar density whose change of the stream is as large on average.

    Args:
        correction: The correction to match.
        acts: (n, d_sae) activations at patches, on the studies that are used to choose.
        decoder: (d_sae, d_model) decoder rows.
        seed: Random seed of the draw.
        pool: Number of latents of nearest density that each one is drawn from.

    Returns:
        A correction with as many latents. Its share may exceed 1, because random latents are less active.

    Raises:
        InterventionError: The random latents are never active.
    """
    rng = np.random.default_rng(seed)
    density = (acts > 0).float().mean(0)
    taken = {*correction.suppress, *correction.boost}
    drawn: list[list[int]] = [[], []]
    for mine, latents in zip(drawn, (correction.suppress, correction.boost), strict=True):
        for j in latents:
            near = [i for i in (density - density[j]).abs().argsort().tolist() if i not in taken][:pool]
            mine.append(int(rng.choice(near)))
            taken.add(mine[-1])
    control = Correction(tuple(drawn[0]), correction.share, tuple(drawn[1]), correction.factor)
    own = control.step(acts, decoder)
    if not own > 0:
        raise InterventionError(
            "The random latents are never active on these rows, so they are not a control; use another seed."
        )
    ratio = correction.step(acts, decoder) / own
    return Correction(
        control.suppress, ratio * control.share, control.boost, 1 + ratio * (control.factor - 1)
    )


def label_counts(stated: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(n, 3) true positives, false positives and false negatives per study, from (n, F) bool arrays."""
    return np.stack([(stated & truth).sum(1), (stated & ~truth).sum(1), (~stated & truth).sum(1)], axis=1)


def report_counts(texts: Sequence[str], truth: np.ndarray, reader: FindingReader) -> np.ndarray:
    """`label_counts` of reports, (n, 3) float; NaN for a report that cannot be read, which is left out of F1."""
    counts = label_counts(reader.table(texts), truth).astype(float)
    counts[[reader.stated(text) is None for text in texts]] = np.nan
    return counts


def micro_f1(counts: np.ndarray) -> float:
    """F1 over all labels of all studies (n, 3) that are not NaN; 1 if nothing is present and nothing stated."""
    return float(_micro(np.nansum(counts, 0)))


def _micro(counts: np.ndarray) -> np.ndarray:
    """Micro F1 of summed counts (..., 3)."""
    hit, false, missed = np.moveaxis(counts, -1, 0)
    return np.where(hit + false + missed > 0, f1(hit, hit + false, hit + missed), 1.0)


def f1_change(
    before: np.ndarray, after: np.ndarray, seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """Change of the micro F1 with its 95 % interval, by a paired bootstrap over studies without NaN counts.

    Raises:
        InterventionError: The two are not counts of the same studies.
    """
    if before.shape != after.shape or not len(before):
        raise InterventionError(
            f"Counts of {len(before)} and {len(after)} studies were given; compare the same studies."
        )
    known = ~np.isnan(before + after).any(1)
    if not known.any():
        raise InterventionError(f"None of the {len(before)} pairs of reports can be read, so F1 is unknown.")
    before, after = before[known], after[known]
    changes = bootstrap(lambda w: _micro(w @ after) - _micro(w @ before), len(before), draws, seed)
    return micro_f1(after) - micro_f1(before), float(changes.low), float(changes.high)


def best_of(candidates: Sequence[tuple[Correction, np.ndarray]]) -> Correction:
    """The correction of largest micro F1 times the share of readable reports; the first of equals.

    List milder corrections first.
    """
    return max(candidates, key=lambda pair: micro_f1(pair[1]) * float(1 - np.isnan(pair[1]).any(1).mean()))[0]

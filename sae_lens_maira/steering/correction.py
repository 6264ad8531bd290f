"""Correcting a model's errors by its own latents: damp those behind false statements, amplify those of missed ones.

    h' = h + sum_suppress -share a_j W_j + sum_boost (factor - 1) a_j W_j          at the frontal patches

Both parts multiply what the film itself brings, so that a film without either is left alone. Latents are ranked on
studies whose errors are known; they are judged on others, by the change of the label F1 over all findings, beside
random latents that change the stream as much. It knows nothing about how labels are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.latents import Encoder
from sae_lens_maira.stats import bootstrap, f1
from sae_lens_maira.steering.interventions import Intervention, Scale
from sae_lens_maira.steering.patches import mean_patch_maps
from sae_lens_maira.steering.schedule import patches


@dataclass(frozen=True)
class Correction:
    """Two sets of latents and how strongly they are turned.

    Attributes:
        suppress: latents to damp.
        share: how much of their activation is taken away, 0 to 1.
        boost: latents to amplify.
        factor: what their activation is multiplied by, 1 or more.
    """

    suppress: tuple[int, ...] = ()
    share: float = 1.0
    boost: tuple[int, ...] = ()
    factor: float = 1.0

    def interventions(self) -> list[Intervention]:
        """What `steering` takes.

        Raises:
            InterventionError: both sets are empty.
        """
        items: list[Intervention] = []
        if self.suppress:
            items.append(Scale(latents=self.suppress, strength=1 - self.share, where=patches()))
        if self.boost:
            items.append(Scale(latents=self.boost, strength=self.factor, where=patches()))
        if not items:
            raise InterventionError("The correction names no latent; rank them on studies with errors.")
        return items

    def step(self, acts: torch.Tensor, decoder: torch.Tensor) -> float:
        """Mean norm of the change over rows of activations (n, d_sae)."""
        total = torch.zeros(len(acts), decoder.shape[1])
        for latents, amount in ((self.suppress, -self.share), (self.boost, self.factor - 1)):
            total += amount * acts[:, list(latents)] @ decoder[list(latents)]
        return float(total.norm(dim=1).mean())


def tied_to_errors(
    rows: ActivationRows,
    encode: Encoder,
    decoder: torch.Tensor,
    wrong: np.ndarray,
    right: np.ndarray,
    n: int,
    specific: float = 3.0,
) -> tuple[int, ...]:
    """The latents that are more active in some studies than in others, those that would move the stream most first.

    Latents that every film excites hold its anatomy: to multiply them breaks reports, so they are left out.

    Args:
        rows: image rows with all patches of the frontal films.
        encode: the SAE's encoder.
        decoder: (d_sae, d_model).
        wrong: (n_studies,) studies of which the finding is stated (to suppress it), or which have it (to boost it).
        right: (n_studies,) studies to compare with.
        n: how many.
        specific: least ratio of a latent's mean activation in `wrong` to that in `right`.

    Returns:
        At most `n` latents, and none if none is specific enough.

    Raises:
        InterventionError: there is no study on one side.
    """
    with_it, without = mean_patch_maps(rows, encode, wrong, right)
    effect = (with_it - without).norm(dim=0) * decoder.norm(dim=1)
    kept = with_it.sum(0) > specific * without.sum(0)
    order = torch.where(kept, effect, torch.zeros(())).argsort(descending=True)[:n]
    return tuple(int(j) for j in order if kept[j] and effect[j] > 0)


def random_twin(
    correction: Correction, acts: torch.Tensor, decoder: torch.Tensor, seed: int, pool: int = 32
) -> Correction:
    """Random latents that fire about as often and change the stream as much on average.

    Args:
        correction: whose twin.
        acts: (n, d_sae) activations at patches, on the studies that may choose.
        decoder: (d_sae, d_model).
        seed: of the draw.
        pool: each latent's twin is drawn from so many of nearest density.

    Returns:
        A correction of as many latents. Its share may exceed 1: what random latents bring is smaller.
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
    twin = Correction(tuple(drawn[0]), correction.share, tuple(drawn[1]), correction.factor)
    own = twin.step(acts, decoder)
    if not own > 0:
        raise InterventionError("The random latents never fire on these rows, so they are no control.")
    ratio = correction.step(acts, decoder) / own
    return Correction(twin.suppress, ratio * twin.share, twin.boost, 1 + ratio * (twin.factor - 1))


def label_counts(stated: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(n, 3) true positives, false positives and false negatives of every study, from (n, F) bool arrays."""
    return np.stack([(stated & truth).sum(1), (stated & ~truth).sum(1), (~stated & truth).sum(1)], axis=1)


def micro_f1(counts: np.ndarray) -> float:
    """F1 over all labels of all studies (n, 3); 1 if there is nothing to state and nothing stated."""
    return float(_micro(counts.sum(0)))


def _micro(counts: np.ndarray) -> np.ndarray:
    """Micro F1 of summed counts (..., 3)."""
    hit, false, missed = np.moveaxis(counts, -1, 0)
    return np.where(hit + false + missed > 0, f1(hit, hit + false, hit + missed), 1.0)


def f1_change(
    before: np.ndarray, after: np.ndarray, seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """Change of the micro F1 and its 95 % bootstrap interval over studies, the same studies on both sides.

    Raises:
        InterventionError: the two are not counts of the same studies.
    """
    if before.shape != after.shape or not len(before):
        raise InterventionError(
            f"Counts of {len(before)} and {len(after)} studies were given; compare the same studies."
        )
    changes = bootstrap(lambda w: _micro(w @ after) - _micro(w @ before), len(before), draws, seed)
    return micro_f1(after) - micro_f1(before), float(changes.low), float(changes.high)


def best_of(candidates: Sequence[tuple[Correction, np.ndarray]]) -> Correction:
    """The correction of largest micro F1; the first of equals, so that milder ones should stand first."""
    return max(candidates, key=lambda pair: micro_f1(pair[1]))[0]

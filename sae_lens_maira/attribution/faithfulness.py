"""Check an attribution by ablation: remove the attributed entries, and compare with controls of equal norm.

    drop(X) = score(h) - score(h - sum of X's entries)                       nats
    causal efficiency = drop(top n) / drop(step of equal norm along the negative gradient)

The controls remove n random active entries, scaled to the same norm, and the n entries that write most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sae_lens_maira.attribution.difference import DifferenceRun
from sae_lens_maira.attribution.entries import Entries
from sae_lens_maira.attribution.residual import ResidualRun

GRADIENT_POSITIONS = 8
"""The gradient step acts at this many positions, those of the largest gradient."""
CURVE = (1, 2, 4, 8, 16, 32, 64, 128)
COMPLETE_WITHIN = 0.2
"""Largest relative error of the sum of attributions that still counts as complete."""
TIMES_RANDOM = 2.0
"""An attribution passes if its drop is at least this many times the mean drop of random entries; an edge likewise."""


@dataclass(frozen=True)
class Faithfulness:
    """Result of the ablation check of one attribution.

    Attributes:
        n: Entries that were removed.
        drop: Nats lost by removing the n entries of highest attribution.
        predicted: Sum of their attributions.
        drop_random: Mean nats lost by removing n random active entries, scaled to the same norm.
        drop_random_low, drop_random_high: Smallest and largest of these over the draws.
        drop_largest: Nats lost by removing the n entries that write most into the stream.
        drop_gradient: Nats lost by a step of the same norm along the negative gradient.
        norm: Norm of what was removed.
        deletion: (number removed, score) pairs, highest attribution first.
        insertion: (number kept, score) pairs, all other candidate entries removed.
        sum_of_attributions: Over all candidates.
        true_difference: Nats lost by removing all candidates.
    """

    n: int
    drop: float
    predicted: float
    drop_random: float
    drop_random_low: float
    drop_random_high: float
    drop_largest: float
    drop_gradient: float
    norm: float
    deletion: tuple[tuple[int, float], ...]
    insertion: tuple[tuple[int, float], ...]
    sum_of_attributions: float
    true_difference: float

    @property
    def efficiency(self) -> float:
        """Drop as a share of the drop by the gradient step of equal norm; NaN if that is 0."""
        return self.drop / self.drop_gradient if self.drop_gradient > 0 else float("nan")

    @property
    def completeness_error(self) -> float:
        """|sum of attributions - true difference| relative to the true difference (at least 0.1 nats)."""
        gap = abs(self.sum_of_attributions - self.true_difference)
        return gap / max(abs(self.true_difference), 0.1)

    @property
    def problems(self) -> list[str]:
        """Reasons not to trust the attribution; empty if it passed."""
        found = []
        if self.drop <= 0:
            found.append(f"removing the {self.n} strongest entries does not make the sentence less likely")
        elif self.drop < TIMES_RANDOM * self.drop_random:
            found.append(
                f"removing the {self.n} strongest entries takes {self.drop:.2f} nats, random entries of equal norm "
                f"{self.drop_random:.2f}"
            )
        if self.completeness_error > COMPLETE_WITHIN:
            found.append(
                f"attributions add up to {self.sum_of_attributions:.2f} nats, the true difference is "
                f"{self.true_difference:.2f}"
            )
        return found

    @property
    def passed(self) -> bool:
        """Whether the check found no problem."""
        return not self.problems


def check_faithfulness(
    run: ResidualRun | DifferenceRun,
    positions: Sequence[int],
    entries: Entries,
    order: torch.Tensor,
    values: torch.Tensor,
    gradient: torch.Tensor,
    score: float,
    n: int = 32,
    draws: int = 4,
    seed: int = 0,
    true_difference: float | None = None,
) -> Faithfulness:
    """Ablate the entries of an attribution and of its controls.

    Args:
        run: The study at the hook point.
        positions: Tokens of the sentence.
        entries: All active entries.
        order: (C,) candidates, highest attribution first.
        values: (C,) their attributions, in that order.
        gradient: (L, d_model) gradient of the sentence's score at the unedited stream.
        score: The sentence's score without an edit.
        n: Entries to remove.
        draws: Random draws.
        seed: Seed of the draws.
        true_difference: Nats lost by removing all candidates, if known already.
    """
    n = min(n, len(order), int((values > 0).sum()) or 1)
    top = order[:n]
    removed = entries.delta(top)
    norm = removed.norm()
    generator = torch.Generator().manual_seed(seed)
    largest = (entries.activation * entries.decoder.float().norm(dim=1)[entries.latent]).topk(n).indices
    sizes = [size for size in CURVE if size <= len(order)]
    everything = entries.delta(order)

    def edits() -> Iterator[torch.Tensor]:
        yield -removed
        for _ in range(draws):
            yield -entries.random_delta(n, norm, generator)
        yield -entries.delta(largest)
        yield _gradient_step(gradient, entries.position.unique(), norm)
        for size in sizes:
            yield -entries.delta(order[:size])
        for size in sizes:
            yield entries.delta(order[:size]) - everything
        yield -everything

    scores = run.scores(edits(), positions).tolist()
    drops = [score - s for s in scores]
    random = drops[1 : 1 + draws]
    after = 3 + draws
    return Faithfulness(
        n=n,
        drop=drops[0],
        predicted=float(values[:n].sum()),
        drop_random=sum(random) / draws,
        drop_random_low=min(random),
        drop_random_high=max(random),
        drop_largest=drops[1 + draws],
        drop_gradient=drops[2 + draws],
        norm=float(norm),
        deletion=((0, score), *zip(sizes, scores[after : after + len(sizes)], strict=True)),
        insertion=((0, scores[-1]), *zip(sizes, scores[after + len(sizes) : -1], strict=True)),
        sum_of_attributions=float(values.sum()),
        true_difference=drops[-1] if true_difference is None else true_difference,
    )


def _gradient_step(gradient: torch.Tensor, positions: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """(L, d_model) step of a given norm down the gradient, at the positions where the gradient is largest."""
    size = gradient[positions].norm(dim=1)
    kept = positions[size.topk(min(GRADIENT_POSITIONS, len(positions))).indices]
    step = torch.zeros_like(gradient)
    step[kept] = -gradient[kept]
    return step * (norm / step.norm().clamp(min=1e-12))

"""The methods that are compared on the phantom: ways to put a finding in, take it out, or move it to the other side.

    maps       h[p] += s sum_j (present_j[p] - absent_j[p]) W_dec[j]     over a few latents j, however they were chosen
    in place   a_j[p] = s present_j[p], or at least that, where the finding's boxes usually lie

Latents are chosen by map difference, by output effect or by agreement, on the same budget. The study's own way (one
text latent everywhere), the supervised difference of means and controls stand beside them.
"""

from collections.abc import Callable, Sequence

import torch

from sae_lens_maira.cli.steering_learned import Learned
from sae_lens_maira.phantom import FINDING_KEYS
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.steering import Ablate, Add, AtLeast, AtMost, Direction, Intervention, SetTo
from sae_lens_maira.steering.choose import by_map_effect
from sae_lens_maira.steering.evaluate import Method
from sae_lens_maira.steering.maps import LatentMap, map_directions
from sae_lens_maira.steering.positions import Schedule, everywhere, patches

STRENGTHS = (1.5, 3.0)
COUNTS = (8.0, 32.0)
BOX_SHARE = 0.1
"""A patch belongs to a finding's place if its boxes cover at least this share of it on average."""
ENERGY = 0.02
"""Directions of a difference of means below this share of the largest are left out."""

MAPS = "latents by map difference"
EFFECT = "latents by output effect"
AGREEMENT = "latents by agreement"
CAUSAL = "latent map chosen by its effect on the other half"
EXEMPLAR, POOLED = "one exemplar's latents", "mean of exemplars' latents"
RANDOM_CAUSAL = "random direction, norm and place of the chosen map"
TWINS_CAUSAL = "random latents, norm and place of the chosen map"
SET, AT_LEAST = "set in place", "at least in place"
EVERYWHERE = "text latent everywhere"
MEANS = "difference of means (supervised)"
RANDOM_DIRECTION, RANDOM_LATENTS = "random direction, equal norm", "random latents, equal density"
FLIPPED = "flipped sign"
ABLATE, AT_MOST, SUBTRACT = "ablate latents", "at most as without", "subtract latents' maps"
ABLATE_HERE = "ablate latents in place"
MEANS_OUT = "subtract difference of means (supervised)"
RANDOM_ABLATED, RANDOM_HERE = "ablate random latents", "ablate random latents in place"
OTHER, MIRRORED = "latents of the other side", "same latents, mirrored place"
MEANS_OTHER = "difference of means of the other side (supervised)"


class Bench:
    """One SAE and what was learned with it: makes methods.

    Args:
        sae: an SAE of image patches.
        learned: from `learn`.
        n_latents: budget of a method.
        text: an SAE of text positions and what was learned with it, for the study's own way.
        seed: of the random controls.
        strengths: the sweep of latents' maps.
    """

    def __init__(
        self,
        sae: MatryoshkaSAE,
        learned: Learned,
        n_latents: int = 16,
        text: tuple[MatryoshkaSAE, torch.Tensor, torch.Tensor] | None = None,
        seed: int = 0,
        strengths: tuple[float, ...] = STRENGTHS,
    ) -> None:
        self.sae, self.learned, self.n, self.text, self.seed = sae, learned, n_latents, text, seed
        self.strengths = strengths
        self.decoder = sae.W_dec.detach()

    def difference(self, finding: str) -> torch.Tensor:
        """(P, D) mean activations with the finding minus without."""
        column = FINDING_KEYS.index(finding)
        return self.learned.present[column] - self.learned.absent[column]

    def chosen(self, finding: str, how: str, n: int | None = None) -> list[int]:
        """The latents of a finding, best first.

        Args:
            finding: its key.
            how: `MAPS`, `EFFECT` or `AGREEMENT`.
            n: how many; the bench's budget if not given.
        """
        n = n or self.n
        column, difference = FINDING_KEYS.index(finding), self.difference(finding)
        if how == MAPS:
            scores = difference.norm(dim=0) * self.decoder.norm(dim=1)
        elif how == EFFECT:
            scores = by_map_effect(difference, self.learned.gradient[column], self.decoder).scores
        else:
            # Its map is what will be added, so it must have one.
            scores = self.learned.agreement[:, column] * (difference != 0).any(0)
        return scores.topk(min(n, len(scores))).indices.tolist()

    def tried(self, chosen: dict[str, tuple[LatentMap, float]]) -> list[Method]:
        """Maps that were tried on the choosing half, each at its strength, and controls of the one named `CAUSAL`.

        Args:
            chosen: map and strength by the method's name.
        """
        methods = [Method(name, m.interventions, strengths=(s,)) for name, (m, s) in chosen.items()]
        if CAUSAL in chosen:
            kept = chosen[CAUSAL][0]
            size, twins = kept.delta(self.decoder).norm(dim=1), self._twins(kept.latents)
            methods += [
                Method(
                    RANDOM_CAUSAL,
                    lambda s: [Direction(vector=self._direction(), strength=s, where=self._grid(size))],
                    control_of=CAUSAL,
                ),
                Method(
                    TWINS_CAUSAL,
                    kept.on_other_latents(twins, self.decoder).interventions,
                    control_of=CAUSAL,
                ),
            ]
        return methods

    def insertion(self, finding: str) -> list[Method]:
        """Ways to put a finding into reports that lack it, and controls."""
        difference, latents = self.difference(finding), self.chosen(finding, MAPS)
        effect = self.chosen(finding, EFFECT)
        methods = [
            self._mapped(MAPS, latents, difference),
            self._mapped(EFFECT, effect, difference),
            self._mapped(AGREEMENT, self.chosen(finding, AGREEMENT), difference),
            Method(SET, lambda s: self._in_place(finding, latents, s, SetTo), strengths=self.strengths),
            Method(
                AT_LEAST, lambda s: self._in_place(finding, latents, s, AtLeast), strengths=self.strengths
            ),
            self._means(MEANS, self.learned.means[FINDING_KEYS.index(finding)]),
            self._random_direction(latents, difference, MAPS),
            self._mapped(RANDOM_LATENTS, self._twins(latents), difference, columns=latents, control_of=MAPS),
            self._mapped(FLIPPED, latents, -difference, control_of=MAPS),
        ]
        return [*methods, *self._study_way(finding)]

    def removal(self, finding: str) -> list[Method]:
        """Ways to take a finding out of reports that state it, and controls; numbers of latents are swept."""
        difference, latents = self.difference(finding), self.chosen(finding, MAPS)
        column = FINDING_KEYS.index(finding)

        def more_active(n: float) -> list[int]:
            ranked = self.chosen(finding, MAPS, len(self.decoder))
            return [j for j in ranked if float(difference[:, j].sum()) > 0][: int(n)]

        def pressed(n: float) -> list[Intervention]:
            ceiling = self.learned.absent[column].max(dim=0).values
            return [
                AtMost(latents=(j,), strength=float(ceiling[j]), unit="raw", where=patches())
                for j in more_active(n)
            ]

        here = self._grid(self.place(finding))
        return [
            Method(
                ABLATE_HERE, lambda n: [Ablate(latents=tuple(more_active(n)), where=here)], strengths=COUNTS
            ),
            Method(
                RANDOM_HERE,
                lambda n: [Ablate(latents=tuple(self._twins(more_active(n))), where=here)],
                control_of=ABLATE_HERE,
            ),
            Method(
                ABLATE, lambda n: [Ablate(latents=tuple(more_active(n)), where=patches())], strengths=COUNTS
            ),
            Method(AT_MOST, pressed, strengths=COUNTS),
            self._mapped(SUBTRACT, latents, -difference),
            self._means(MEANS_OUT, -self.learned.means[column]),
            Method(
                RANDOM_ABLATED,
                lambda n: [Ablate(latents=tuple(self._twins(more_active(n))), where=patches())],
                control_of=ABLATE,
            ),
            self._random_direction(latents, difference, SUBTRACT),
        ]

    def moving(self, finding: str, other: str) -> list[Method]:
        """Ways to move a sided finding to the other side: its own map out, another one in."""
        own, latents = self.difference(finding), self.chosen(finding, MAPS)
        theirs, other_latents = self.difference(other), self.chosen(other, MAPS)
        mirrored = own.reshape(*self.learned.shape, -1).flip(1).reshape(own.shape)
        means = self.learned.means
        column, other_column = FINDING_KEYS.index(finding), FINDING_KEYS.index(other)
        size = (theirs[:, other_latents] @ self.decoder[other_latents]).norm(dim=1)
        out = self._maps(latents, -own)
        return [
            Method(
                OTHER, lambda s: [*out(s), *self._maps(other_latents, theirs)(s)], strengths=self.strengths
            ),
            Method(
                MIRRORED, lambda s: [*out(s), *self._maps(latents, mirrored)(s)], strengths=self.strengths
            ),
            self._means(MEANS_OTHER, means[other_column] - means[column]),
            Method(
                RANDOM_DIRECTION,
                lambda s: [*out(s), Direction(vector=self._direction(), strength=s, where=self._grid(size))],
                control_of=OTHER,
            ),
        ]

    def _grid(self, weights: torch.Tensor) -> Schedule:
        return patches(grid=weights.reshape(self.learned.shape))

    def _maps(
        self, latents: Sequence[int], grids: torch.Tensor, columns: Sequence[int] | None = None
    ) -> Callable[[float], list[Intervention]]:
        """Adds `s * grids[:, c]` to each latent, patch by patch."""
        pairs = list(zip(latents, latents if columns is None else columns, strict=True))
        # A latent that is silent on frontal films has no map there, and adds nothing.
        pairs = [(j, c) for j, c in pairs if bool(grids[:, c].any())]
        return lambda s: [
            Add(latents=(j,), strength=s, unit="raw", where=self._grid(grids[:, c])) for j, c in pairs
        ]

    def _mapped(
        self,
        name: str,
        latents: Sequence[int],
        grids: torch.Tensor,
        columns: Sequence[int] | None = None,
        control_of: str | None = None,
    ) -> Method:
        own = None if control_of else self.strengths
        return Method(name, self._maps(latents, grids, columns), control_of, own)

    def _in_place(
        self, finding: str, latents: Sequence[int], strength: float, kind: type[SetTo] | type[AtLeast]
    ) -> list[Intervention]:
        grids = self.learned.present[FINDING_KEYS.index(finding)] * self.place(finding)[:, None]
        return [
            kind(latents=(j,), strength=strength, unit="raw", where=self._grid(grids[:, j]))
            for j in latents
            if bool(grids[:, j].any())
        ]

    def place(self, finding: str) -> torch.Tensor:
        """(P,) 1 where the finding's boxes usually lie; everywhere for a finding without boxes."""
        here = (self.learned.boxes[FINDING_KEYS.index(finding)] >= BOX_SHARE).float()
        return here if bool(here.any()) else torch.ones_like(here)

    def _means(self, name: str, means: torch.Tensor) -> Method:
        return Method(
            name,
            lambda s: map_directions(means, self.learned.shape, s, tolerance=ENERGY),
            strengths=STRENGTHS,
        )

    def _random_direction(self, latents: Sequence[int], difference: torch.Tensor, control_of: str) -> Method:
        size = (difference[:, latents] @ self.decoder[latents]).norm(dim=1)
        return Method(
            RANDOM_DIRECTION,
            lambda s: [Direction(vector=self._direction(), strength=s, where=self._grid(size))],
            control_of,
        )

    def _direction(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.nn.functional.normalize(torch.randn(self.decoder.shape[1], generator=generator), dim=0)

    def _study_way(self, finding: str) -> list[Method]:
        if self.text is None:
            return []
        sae, p99, agreement = self.text
        latent = int(agreement[:, FINDING_KEYS.index(finding)].argmax())
        if not float(p99[latent]) > 0:
            return []
        make = lambda s: [Add(latents=(latent,), strength=s, where=everywhere())]  # noqa: E731
        return [Method(EVERYWHERE, make, strengths=(1.0, 3.0), sae=sae, p99=p99)]

    def _twins(self, latents: Sequence[int]) -> list[int]:
        """For each latent another one that fires about as often, none of them twice."""
        density = self.learned.density
        taken, found = set(latents), []
        for j in latents:
            order = (density - density[j]).abs().argsort().tolist()
            twin = next(i for i in order if i not in taken)
            taken.add(twin)
            found.append(twin)
        return found

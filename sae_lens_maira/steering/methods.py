"""Methods of steering, with their controls: insert a finding, remove it, or move it to the other side.

    maps       h[p] += s sum_j (present_j[p] - absent_j[p]) W_dec[j]     over a few latents j
    in place   a_j[p] = s present_j[p], or at least that, where the boxes of the finding usually are

Latents are chosen by map difference, by output effect or by agreement, with the same number of latents. They are
compared with one text latent everywhere, the supervised difference of means, and random controls.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.latents import RecordSet
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.steering import Ablate, Add, AtLeast, AtMost, Direction, Intervention, SetTo
from sae_lens_maira.steering.choose import by_map_effect
from sae_lens_maira.steering.evaluate import Method
from sae_lens_maira.steering.maps import LatentMap, map_directions, recorded_map
from sae_lens_maira.steering.positions import Schedule, everywhere, patches
from sae_lens_maira.steering.statistics import SteeringStatistics

STRENGTHS = (1.5, 3.0)
COUNTS = (8.0, 32.0)
BOX_SHARE = 0.1
"""A patch belongs to the place of a finding if its boxes cover at least this share of the patch on average."""
TOLERANCE = 0.02
"""Directions of a difference of means below this share of the largest are left out."""

MAPS = "latents by map difference"
EFFECT = "latents by output effect"
AGREEMENT = "latents by agreement"
CAUSAL = "latent map chosen by its effect on the other half"
EXEMPLAR, POOLED = "one exemplar's latents", "mean of exemplars' latents"
RANDOM_CAUSAL = "random direction, norm and place of the chosen map"
RANDOM_LATENTS_CAUSAL = "random latents, norm and place of the chosen map"
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


class MethodFactory:
    """Make methods from one SAE and the statistics that were collected with it.

    Args:
        sae: An SAE of image patches.
        statistics: Statistics of its latents.
        n_latents: Number of latents of a method.
        text: An SAE of text positions, the (D,) p99 of its latents and their (D, F) agreement with the findings of the
            statistics, for the method that steers one text latent everywhere.
        seed: Random seed of the controls.
        strengths: Strengths of the sweep of maps.
    """

    def __init__(
        self,
        sae: MatryoshkaSAE,
        statistics: SteeringStatistics,
        n_latents: int = 16,
        text: tuple[MatryoshkaSAE, torch.Tensor, torch.Tensor] | None = None,
        seed: int = 0,
        strengths: tuple[float, ...] = STRENGTHS,
    ) -> None:
        self.sae, self.statistics, self.n, self.text, self.seed = sae, statistics, n_latents, text, seed
        self.strengths = strengths
        self.decoder = sae.W_dec.detach().float().cpu()

    def difference(self, finding: str) -> torch.Tensor:
        """(P, D) mean activations with the finding minus without."""
        column = self.statistics.column(finding)
        return self.statistics.present[column] - self.statistics.absent[column]

    def chosen(self, finding: str, how: str, n: int | None = None) -> list[int]:
        """The latents of a finding, best first.

        Args:
            finding: Name of the finding.
            how: `MAPS`, `EFFECT` or `AGREEMENT`.
            n: Number of latents; the factory's own if not given.
        """
        n = n or self.n
        column, difference = self.statistics.column(finding), self.difference(finding)
        if how == MAPS:
            scores = difference.norm(dim=0) * self.decoder.norm(dim=1)
        elif how == EFFECT:
            scores = by_map_effect(difference, self.statistics.gradient[column], self.decoder).scores
        else:
            # The map of a latent is added, so it must have one.
            scores = self.statistics.agreement[:, column] * (difference != 0).any(0)
        return scores.topk(min(n, len(scores))).indices.tolist()

    def tried(self, chosen: dict[str, tuple[LatentMap, float]]) -> list[Method]:
        """Methods of maps that were tried on the selection half, and controls of the one named `CAUSAL`.

        Args:
            chosen: Map and strength by name of the method.
        """
        methods = [Method(name, m.interventions, strengths=(s,)) for name, (m, s) in chosen.items()]
        if CAUSAL in chosen:
            kept = chosen[CAUSAL][0]
            size, others = kept.delta(self.decoder).norm(dim=1), self._random_latents(kept.latents)
            methods += [
                Method(
                    RANDOM_CAUSAL,
                    lambda s: [Direction(vector=self._direction(), strength=s, where=self._grid(size))],
                    control_of=CAUSAL,
                ),
                Method(
                    RANDOM_LATENTS_CAUSAL,
                    kept.on_other_latents(others, self.decoder).interventions,
                    control_of=CAUSAL,
                ),
            ]
        return methods

    def insertion(self, finding: str) -> list[Method]:
        """Methods that insert a finding into reports that do not state it, and their controls."""
        difference, latents = self.difference(finding), self.chosen(finding, MAPS)
        # Without gradients there is no ranking by output effect.
        ranked = bool(self.statistics.gradient[self.statistics.column(finding)].any())
        effect = [self._mapped(EFFECT, self.chosen(finding, EFFECT), difference)] if ranked else []
        methods = [
            self._mapped(MAPS, latents, difference),
            *effect,
            self._mapped(AGREEMENT, self.chosen(finding, AGREEMENT), difference),
            Method(SET, lambda s: self._in_place(finding, latents, s, SetTo), strengths=self.strengths),
            Method(
                AT_LEAST, lambda s: self._in_place(finding, latents, s, AtLeast), strengths=self.strengths
            ),
            self._means(MEANS, self.statistics.means[self.statistics.column(finding)]),
            self._random_direction(latents, difference, MAPS),
            self._mapped(
                RANDOM_LATENTS, self._random_latents(latents), difference, columns=latents, control_of=MAPS
            ),
            self._mapped(FLIPPED, latents, -difference, control_of=MAPS),
        ]
        return [*methods, *self._text_latent(finding)]

    def removal(self, finding: str) -> list[Method]:
        """Methods that remove a finding from reports that state it, and controls; sweeps are over latent counts."""
        difference, latents = self.difference(finding), self.chosen(finding, MAPS)
        column = self.statistics.column(finding)

        def more_active(n: float) -> list[int]:
            ranked = self.chosen(finding, MAPS, len(self.decoder))
            return [j for j in ranked if float(difference[:, j].sum()) > 0][: int(n)]

        def limited(n: float) -> list[Intervention]:
            ceiling = self.statistics.absent[column].max(dim=0).values
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
                lambda n: [Ablate(latents=tuple(self._random_latents(more_active(n))), where=here)],
                control_of=ABLATE_HERE,
            ),
            Method(
                ABLATE, lambda n: [Ablate(latents=tuple(more_active(n)), where=patches())], strengths=COUNTS
            ),
            Method(AT_MOST, limited, strengths=COUNTS),
            self._mapped(SUBTRACT, latents, -difference),
            self._means(MEANS_OUT, -self.statistics.means[column]),
            Method(
                RANDOM_ABLATED,
                lambda n: [Ablate(latents=tuple(self._random_latents(more_active(n))), where=patches())],
                control_of=ABLATE,
            ),
            self._random_direction(latents, difference, SUBTRACT),
        ]

    def on_controls(
        self, finding: str, controls: Mapping[str, "MethodFactory"], remove: bool = False
    ) -> list[Method]:
        """The finding's map from control SAEs, added or subtracted at the norm of this SAE's own map.

        The latents of each control are chosen by the same rule, and its strength from the same sweep. Equal norm is
        over all patches together; a control without any latent that differs is left out with a warning.

        Args:
            finding: Name of the finding.
            controls: Factory of each control SAE, by name.
            remove: Subtract the map.
        """
        size, methods = self._delta(finding).norm(), []
        for name, other in controls.items():
            theirs = other._delta(finding).norm()
            if not float(theirs) > 0:
                warnings.warn(
                    f"No latent of the control {name!r} differs between studies with and without {finding!r}; "
                    "it is left out of the table.",
                    stacklevel=2,
                )
                continue
            grids = other.difference(finding) * (size / theirs) * (-1 if remove else 1)
            methods.append(
                Method(
                    f"{MAPS}, {name}",
                    other._maps(other.chosen(finding, MAPS), grids),
                    control_of=SUBTRACT if remove else MAPS,
                    strengths=self.strengths,
                    sae=other.sae,
                    p99=other.statistics.p99,
                )
            )
        return methods

    def _delta(self, finding: str) -> torch.Tensor:
        """(P, d_model) change of the stream by the map of the finding's latents, at strength 1."""
        latents = self.chosen(finding, MAPS)
        return self.difference(finding)[:, latents] @ self.decoder[latents]

    def moving(self, finding: str, other: str) -> list[Method]:
        """Methods that move a finding to the other side: its own map out, another one in."""
        own, latents = self.difference(finding), self.chosen(finding, MAPS)
        theirs, other_latents = self.difference(other), self.chosen(other, MAPS)
        mirrored = own.reshape(*self.statistics.shape, -1).flip(1).reshape(own.shape)
        means = self.statistics.means
        column, other_column = self.statistics.column(finding), self.statistics.column(other)
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
        return patches(grid=weights.reshape(self.statistics.shape))

    def _maps(
        self, latents: Sequence[int], grids: torch.Tensor, columns: Sequence[int] | None = None
    ) -> Callable[[float], list[Intervention]]:
        """Interventions that add `s * grids[:, c]` to each latent, patch by patch."""
        pairs = list(zip(latents, latents if columns is None else columns, strict=True))
        # A latent that is never active on frontal images has no map, and adds nothing.
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
        grids = self.statistics.present[self.statistics.column(finding)] * self.place(finding)[:, None]
        return [
            kind(latents=(j,), strength=strength, unit="raw", where=self._grid(grids[:, j]))
            for j in latents
            if bool(grids[:, j].any())
        ]

    def place(self, finding: str) -> torch.Tensor:
        """(P,) 1 where the finding's boxes usually are; 1 everywhere for a finding without boxes."""
        here = (self.statistics.boxes[self.statistics.column(finding)] >= BOX_SHARE).float()
        return here if bool(here.any()) else torch.ones_like(here)

    def _means(self, name: str, means: torch.Tensor) -> Method:
        return Method(
            name,
            lambda s: map_directions(means, self.statistics.shape, s, tolerance=TOLERANCE),
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

    def _text_latent(self, finding: str) -> list[Method]:
        if self.text is None:
            return []
        sae, p99, agreement = self.text
        latent = int(agreement[:, self.statistics.column(finding)].argmax())
        if not float(p99[latent]) > 0:
            return []
        make = lambda s: [Add(latents=(latent,), strength=s, where=everywhere())]  # noqa: E731
        return [Method(EVERYWHERE, make, strengths=(1.0, 3.0), sae=sae, p99=p99)]

    def _random_latents(self, latents: Sequence[int]) -> list[int]:
        """For each latent another one that is active about as often, none of them twice."""
        density = self.statistics.density
        taken, others = set(latents), []
        for j in latents:
            order = (density - density[j]).abs().argsort().tolist()
            near = next(i for i in order if i not in taken)
            taken.add(near)
            others.append(near)
        return others


RECORDED = "latents by recorded map difference"
RANDOM_RECORDED = "random direction, norm of the recorded latents"
FLIPPED_RECORDED = "recorded latents, flipped sign"
ABLATE_RECORDED = "ablate latents by recorded map difference"
RANDOM_ABLATED_RECORDED = "random direction, norm of the ablation"


def recorded_methods(
    records: RecordSet,
    finding: str,
    decoder: torch.Tensor,
    n_latents: int = 16,
    seed: int = 0,
    remove: bool = False,
    strengths: tuple[float, ...] = STRENGTHS,
) -> list[Method]:
    """Methods whose latents and maps come from latent records, so that no activation is read again.

    The map of a latent is its mean over studies with the finding minus its mean over studies without it. Latents are
    those whose map changes the stream most. Strength 1 adds the map itself.

    Args:
        records: Latent records of the SAE.
        finding: Name of the finding in the records.
        decoder: (d_sae, d_model) decoder rows of the SAE.
        n_latents: Maximum number of latents.
        seed: Random seed of the controls.
        remove: Remove the finding instead of inserting it.
        strengths: Multiples of the map.

    Raises:
        RecordError: The records hold no maps of this finding.
        InterventionError: The maps of studies with and without the finding are the same.
    """
    kept = recorded_map(records, finding, decoder, n_latents)
    if remove:
        active = tuple(j for j, grid in zip(kept.latents, kept.grids.T, strict=True) if float(grid.sum()) > 0)
        if not active:
            raise InterventionError(
                f"None of the {len(kept.latents)} latents whose maps differ most is more active with {finding!r} than "
                "without it, so there is nothing to ablate. Record an SAE with more latents, or raise --n-latents."
            )

        def ablate(n: float) -> list[Intervention]:
            return [Ablate(latents=active[: int(n)], where=patches())]

        counts = tuple(sorted({1.0, float(len(active))}))
        return [
            Method(ABLATE_RECORDED, ablate, strengths=counts),
            Method(RANDOM_ABLATED_RECORDED, ablate, control_of=ABLATE_RECORDED, control_seed=seed),
        ]

    def flipped(strength: float) -> list[Intervention]:
        return [*kept.interventions(-strength)]

    def add(strength: float) -> list[Intervention]:
        return [*kept.interventions(strength)]

    return [
        Method(RECORDED, add, strengths=strengths),
        Method(RANDOM_RECORDED, add, control_of=RECORDED, control_seed=seed),
        Method(FLIPPED_RECORDED, flipped, control_of=RECORDED),
    ]

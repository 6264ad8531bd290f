"""What is done to latents, or to the stream itself, with the reconstruction error kept.

    h' = h + (a' - a) W_dec,      a = encode(h)
    add     a' = a + s w u        set  a' = s w u       at_least  a' = max(a, s w u)
    at_most a' = a + w (min(a, s u) - a)     scale  a' = a + w (s a - a)     ablate  a' = a - w a

s is the strength, u the unit (the latent's own p99, or 1) and w the schedule's weight at the position; where w is 0
nothing happens. What a' - a does not touch, the SAE's error included, comes back bit for bit. It knows nothing about
hooks or models.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.steering.schedule import Schedule, everywhere

Strength = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """Common to all: how strong and where.

    Attributes:
        strength: one number, or one for every row of the batch.
        where: the schedule.
    """

    strength: Strength = 1.0
    where: Schedule = field(default_factory=everywhere)

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(torch.tensor(self.strength)).all()):
            raise InterventionError(f"The strength is {self.strength}; it must be finite.")

    def strengths(self, rows: int) -> torch.Tensor:
        """(rows,) strengths.

        Raises:
            InterventionError: their number is not the batch's.
        """
        given = torch.tensor(self.strength, dtype=torch.float32)
        if given.ndim and len(given) != rows:
            raise InterventionError(
                f"{len(given)} strengths were given for a batch of {rows} rows; give one number, or one a row."
            )
        return given.expand(rows).clone()

    @property
    def neutral(self) -> bool:
        """Whether it is meant to change nothing."""
        return not bool(torch.tensor(self.strength).any())


@dataclass(frozen=True, kw_only=True)
class LatentIntervention(Intervention):
    """An intervention on one or several latents, or on all that a Matryoshka level adds.

    Attributes:
        latents: their numbers; or
        level: a Matryoshka level.
        unit: "p99" counts strengths in the latent's own 99th percentile, "raw" in activations.
        if_active: leave a latent alone where it is 0.
        if_latent: (j, t): act only where latent j exceeds t, in the same unit.
    """

    latents: tuple[int, ...] = ()
    level: int | None = None
    unit: Literal["p99", "raw"] = "p99"
    if_active: bool = False
    if_latent: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.latents) == (self.level is not None):
            raise InterventionError(
                f"Latents {self.latents} and level {self.level} were given; give latents or a level, and not both."
            )
        if self.unit not in ("p99", "raw"):
            raise InterventionError(f"The unit is {self.unit!r}; it must be 'p99' or 'raw'.")
        if self.if_latent is not None and not math.isfinite(self.if_latent[1]):
            raise InterventionError(
                f"The gate opens where latent {self.if_latent[0]} exceeds {self.if_latent[1]}; it must be finite."
            )

    @property
    def is_factor(self) -> bool:
        """Whether the strength is a share or a factor, and not an activation."""
        return False

    @property
    def needs_unit(self) -> bool:
        """Whether the latents' p99 is needed."""
        return self.unit == "p99" and not (self.is_factor and self.if_latent is None)

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """New activations.

        Args:
            acts: (n, k).
            strength: (n, k), unit applied where it has one.
            weight: (n, 1).
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Add(LatentIntervention):
    """Add to the activation; it may become negative, which pushes against the direction."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See the module."""
        return acts + strength * weight


@dataclass(frozen=True, kw_only=True)
class SetTo(LatentIntervention):
    """Replace the activation. Strength 0 is a setting too: it is what `Ablate` does."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See the module."""
        return strength * weight

    @property
    def neutral(self) -> bool:
        """Never: 0 is a value."""
        return False


@dataclass(frozen=True, kw_only=True)
class AtLeast(LatentIntervention):
    """Lift the activation to a floor. Strength 0 changes nothing."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See the module."""
        return torch.maximum(acts, strength * weight)


@dataclass(frozen=True, kw_only=True)
class AtMost(LatentIntervention):
    """Press the activation under a ceiling."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See the module."""
        return acts + weight * (torch.minimum(acts, strength) - acts)

    @property
    def neutral(self) -> bool:
        """Never: 0 is a ceiling."""
        return False


@dataclass(frozen=True, kw_only=True)
class Scale(LatentIntervention):
    """Multiply the activation by the strength; 1 changes nothing."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See the module."""
        return acts + weight * (strength * acts - acts)

    @property
    def is_factor(self) -> bool:
        """Yes."""
        return True

    @property
    def neutral(self) -> bool:
        """Whether every factor is 1."""
        return bool((torch.tensor(self.strength) == 1).all())


@dataclass(frozen=True, kw_only=True)
class Ablate(LatentIntervention):
    """Take the activation away; strength is the share of it, 1 for all."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See the module."""
        return acts - weight * strength * acts

    @property
    def is_factor(self) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction(Intervention):
    """Add a direction (d_model,): h' = h + s w v, or with `relative` h' = h + s w |h| v / |v|."""

    vector: torch.Tensor
    relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            self.vector.ndim != 1
            or not bool(torch.isfinite(self.vector).all())
            or not bool(self.vector.any())
        ):
            raise InterventionError(
                f"The direction has shape {tuple(self.vector.shape)}; it must be a finite (d_model,) vector other "
                "than 0."
            )

"""Interventions on latents or on the stream itself; the SAE's reconstruction error is kept. They are saved as JSON.

    h' = h + (a' - a) W_dec,      a = encode(h)
    add     a' = a + s w u        set  a' = s w u       at_least  a' = max(a, s w u)
    at_most a' = a + w (min(a, s u) - a)     scale  a' = a + w (s a - a)     ablate  a' = a - w a
    add_vectors h' = h + s w a V,  with vectors V of the caller in place of decoder rows

s is the strength, u the unit (the p99 of the latent, or 1) and w the weight of the schedule at the position; where w
is 0 nothing happens. Strength 0 of `SetTo` and `AtMost` is a value and not a no-op.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import SAE

from sae_lens_maira.checksums import EDITED, take_checksum, with_checksum
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.io import atomic_write
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.sae import fingerprint
from sae_lens_maira.steering import positions
from sae_lens_maira.steering.positions import Schedule, everywhere

Strength = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """Base class: how strong and where.

    Attributes:
        strength: One number, or one per row of the batch.
        where: Positions and their weights.
    """

    strength: Strength = 1.0
    where: Schedule = field(default_factory=everywhere)

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(torch.tensor(self.strength)).all()):
            raise InterventionError(f"The strength is {self.strength}; it must be finite.")

    def strengths(self, rows: int) -> torch.Tensor:
        """(rows,) strengths.

        Raises:
            InterventionError: Their number is not the number of rows.
        """
        given = torch.tensor(self.strength, dtype=torch.float32)
        if given.ndim and len(given) != rows:
            raise InterventionError(
                f"{len(given)} strengths were given for a batch of {rows} rows; give one number, or one per row."
            )
        return given.expand(rows).clone()

    @property
    def neutral(self) -> bool:
        """Whether the settings are meant to change nothing."""
        return not bool(torch.tensor(self.strength).any())


@dataclass(frozen=True, kw_only=True)
class LatentIntervention(Intervention):
    """An intervention on some latents, or on all latents that a Matryoshka level adds.

    Attributes:
        latents: Indices of the latents; or
        level: A Matryoshka level.
        unit: "p99" measures strengths in the latent's 99th percentile, "raw" in activations.
        if_active: Leave a latent alone where it is 0.
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
        """Whether the strength is a share or a factor rather than an activation."""
        return False

    @property
    def needs_unit(self) -> bool:
        """Whether the p99 of the latents is needed."""
        return self.unit == "p99" and not (self.is_factor and self.if_latent is None)

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute new activations; the equations are in the module docstring.

        Args:
            acts: (n, k) activations.
            strength: (n, k) strengths, multiplied by their unit where they have one.
            weight: (n, 1) weights of the schedule.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Add(LatentIntervention):
    """Add to the activation. It may become negative, which pushes against the direction."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute a + s w u."""
        return acts + strength * weight


@dataclass(frozen=True, kw_only=True)
class SetTo(LatentIntervention):
    """Replace the activation. Strength 0 does the same as `Ablate`."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute s w u."""
        return strength * weight

    @property
    def neutral(self) -> bool:
        """Always False: 0 is a value."""
        return False


@dataclass(frozen=True, kw_only=True)
class AtLeast(LatentIntervention):
    """Raise the activation to a minimum. Strength 0 changes nothing."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute max(a, s w u)."""
        return torch.maximum(acts, strength * weight)


@dataclass(frozen=True, kw_only=True)
class AtMost(LatentIntervention):
    """Limit the activation to a maximum."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute a + w (min(a, s u) - a)."""
        return acts + weight * (torch.minimum(acts, strength) - acts)

    @property
    def neutral(self) -> bool:
        """Always False: 0 is a maximum."""
        return False


@dataclass(frozen=True, kw_only=True)
class Scale(LatentIntervention):
    """Multiply the activation by the strength; 1 changes nothing."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute a + w (s a - a)."""
        return acts + weight * (strength * acts - acts)

    @property
    def is_factor(self) -> bool:
        """Always True."""
        return True

    @property
    def neutral(self) -> bool:
        """Whether every factor is 1."""
        return bool((torch.tensor(self.strength) == 1).all())


@dataclass(frozen=True, kw_only=True)
class Ablate(LatentIntervention):
    """Remove the activation. The strength is the share that is removed; 1 removes all of it."""

    def change(self, acts: torch.Tensor, strength: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Compute a - w s a."""
        return acts - weight * strength * acts

    @property
    def is_factor(self) -> bool:
        """Always True."""
        return True


@dataclass(frozen=True, kw_only=True, eq=False)
class AddVectors(LatentIntervention):
    """Add vectors (n, d_model) to the stream in proportion to the activations of latents.

    A latent that is silent changes nothing. The activations are those before any intervention.
    """

    vectors: torch.Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vectors.ndim != 2 or not bool(torch.isfinite(self.vectors).all()):
            raise InterventionError(
                f"The vectors have shape {tuple(self.vectors.shape)}; they must be finite, (latents, d_model)."
            )

    @property
    def is_factor(self) -> bool:
        """Always True."""
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


FORMAT = "sae-lens-maira interventions 1"
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        *(Add, SetTo, AtLeast, AtMost, Scale, Ablate, AddVectors, Direction),
        *(positions.Both, positions.Either, positions.Roles, positions.Window, positions.Patches),
    )
}


@dataclass(frozen=True)
class SavedInterventions:
    """Contents of a file of interventions.

    Attributes:
        interventions: What to do, in order.
        hook_name: Hook point at which they act.
        sae: Fingerprint of the SAE whose latents are meant; None if there are only directions.
        p99: Latent -> unit, for the latents that are named and were given a unit.
        note: Free text, for example what the interventions are for.
    """

    interventions: tuple[Intervention, ...]
    hook_name: str
    sae: str | None
    p99: dict[int, float]
    note: str = ""

    def units(self, d_sae: int) -> torch.Tensor:
        """(d_sae,) float32 p99 of the named latents, 0 for the others."""
        values = torch.zeros(d_sae)
        for latent, unit in self.p99.items():
            values[latent] = unit
        return values


def save_interventions(
    path: Path | str,
    interventions: Intervention | Sequence[Intervention],
    sae: SAE[Any] | None,
    hook_name: str,
    p99: torch.Tensor | None = None,
    note: str = "",
) -> None:
    """Write interventions to a JSON file, with the fingerprint of their SAE and their hook point.

    Args:
        path: File to write; it is replaced atomically.
        interventions: What to do, in order.
        sae: SAE whose latents are meant; None if there are only directions.
        hook_name: Hook point at which they act.
        p99: (d_sae,) units of the latents; those of the named latents are saved.
        note: Free text.

    Raises:
        InterventionError: Latents are named without an SAE.
    """
    items = (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)
    acting = [item for item in items if isinstance(item, LatentIntervention)]
    if acting and sae is None:
        raise InterventionError(
            f"{type(acting[0]).__name__} acts on latents, but no SAE was given; pass the SAE they belong to."
        )
    named = {j for item in acting for j in (*item.latents, *(item.if_latent or ())[:1])}
    if sae is not None and any(item.level is not None for item in acting):
        named = set(range(sae.cfg.d_sae))
    content = {
        "format": FORMAT,
        "note": note,
        "hook_name": hook_name,
        "sae": None if sae is None else fingerprint(sae),
        "p99": {} if p99 is None else {str(j): float(p99[j]) for j in sorted(named)},
        "interventions": [_to_json(item) for item in items],
    }
    atomic_write(Path(path), json.dumps(with_checksum(content), indent=1) + "\n")


def load_interventions(path: Path | str, sae: SAE[Any] | None = None) -> SavedInterventions:
    """Read what `save_interventions` wrote.

    Args:
        path: The file.
        sae: SAE that will be used; None skips the check.

    Raises:
        InterventionError: The file cannot be read, or it was saved for another SAE.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not take_checksum(content):
            raise InterventionError(
                f"{path} has changed since it was saved. Save it again from its source. {EDITED}."
            )
        if content["format"] != FORMAT:
            raise InterventionError(
                f"{path} has the format {content['format']!r}; expected {FORMAT!r}. Save the interventions again."
            )
        saved = SavedInterventions(
            tuple(_from_json(item) for item in content["interventions"]),
            str(content["hook_name"]),
            content["sae"],
            {int(j): float(unit) for j, unit in content["p99"].items()},
            str(content["note"]),
        )
    except InterventionError:
        raise
    except (
        OSError,
        UnicodeDecodeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise InterventionError(
            f"{path} cannot be read as saved interventions ({type(error).__name__}: {error}). Give a file that "
            "save_interventions or `sae-lens-maira steer` wrote."
        ) from error
    if not all(isinstance(item, Intervention) for item in saved.interventions):
        raise InterventionError(f"{path} lists a schedule where an intervention was expected; save it again.")
    if sae is not None and saved.sae is not None and fingerprint(sae) != saved.sae:
        raise InterventionError(
            f"{path} was saved for the SAE {saved.sae[:12]} and the SAE given is {fingerprint(sae)[:12]}; its latents "
            "mean something else. Give the SAE that the interventions were made with."
        )
    return saved


def _to_json(value: Any) -> Any:
    """Plain data; a schedule or intervention becomes its fields with its class under "is"."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().float()  # every float32 is a float64, which JSON keeps digit for digit
        return {"is": "tensor", "shape": list(tensor.shape), "values": tensor.flatten().tolist()}
    if isinstance(value, frozenset):
        return {"is": "roles", "names": sorted(role.name.lower() for role in value)}
    if type(value).__name__ in _KINDS:
        return {"is": type(value).__name__} | {
            f.name: _to_json(getattr(value, f.name)) for f in fields(value)
        }
    if isinstance(value, Schedule):
        raise InterventionError(
            f"The schedule {type(value).__name__} is not one of this package's, so it cannot be saved."
        )
    return list(value) if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    kind = value["is"]
    if kind == "tensor":
        return torch.tensor(value["values"], dtype=torch.float32).reshape(value["shape"])
    if kind == "roles":
        return frozenset(TokenRole[name.upper()] for name in value["names"])
    if kind not in _KINDS:
        raise InterventionError(f"There is no intervention or schedule {kind!r}; it needs another version.")
    return _KINDS[kind](**{name: _from_json(item) for name, item in value.items() if name != "is"})

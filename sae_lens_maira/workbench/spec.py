"""Validated settings of one workbench run, and its interventions."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sae_lens_maira.errors import WorkbenchError
from sae_lens_maira.steering import Add, Intervention, Schedule
from sae_lens_maira.steering.positions import VIEWS, everywhere, patches, report

PARTS = ("prior_image", "prior_report", "lateral", "indication")
"""Parts of a study that the page can leave out."""
PLACES = ("everywhere", "report", "image", "map", "painted")
MAX_SLIDERS = 32
MAX_TOKENS = 1024


@dataclass(frozen=True)
class RunSpec:
    """One run: a study, what is left out of it, and what is steered.

    Attributes:
        study: Id of the study.
        without: Parts of the study that are left out.
        sliders: (latent, strength in its p99) pairs.
        place: "everywhere", "report", "image" (all patches of the view), "map" (each latent's own mean map) or
            "painted".
        view: Image that "image", "map" and "painted" refer to.
        grid: Rows of patch weights in 0..1, for "painted".
        control_seed: Replace every change by a random direction of equal norm, drawn with this seed.
        max_new_tokens: Token budget of the report; None for the model's budget.
    """

    study: str
    without: tuple[str, ...] = ()
    sliders: tuple[tuple[int, float], ...] = ()
    place: str = "everywhere"
    view: str = "frontal"
    grid: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    control_seed: int | None = None
    max_new_tokens: int | None = None

    @classmethod
    def of(cls, plain: Any) -> "RunSpec":
        """Check a JSON object.

        Raises:
            WorkbenchError: A field is missing, unknown or out of range.
        """
        if not isinstance(plain, Mapping) or not isinstance(plain.get("study"), str):
            raise WorkbenchError("The run names no study. Choose a study first.")
        unknown = sorted(set(plain) - set(cls.__dataclass_fields__))
        if unknown:
            raise WorkbenchError(f"The run has unknown fields {', '.join(map(repr, unknown))}.")
        without = plain.get("without", ())
        if not isinstance(without, list | tuple) or not set(map(str, without)) <= set(PARTS):
            raise WorkbenchError(
                f"The parts to leave out are {without!r}; expected some of {', '.join(PARTS)}."
            )
        place, view = plain.get("place", "everywhere"), plain.get("view", "frontal")
        if place not in PLACES or view not in tuple(VIEWS):
            raise WorkbenchError(f"There is no place {place!r} in a view {view!r}.")
        tokens, seed = plain.get("max_new_tokens"), plain.get("control_seed")
        if tokens is not None and not (_whole(tokens) and 1 <= tokens <= MAX_TOKENS):
            raise WorkbenchError(f"The token budget is {tokens!r}; expected 1 to {MAX_TOKENS}.")
        if seed is not None and not (_whole(seed) and 0 <= seed < 2**31):
            raise WorkbenchError(f"The seed of the control is {seed!r}; expected a whole number from 0.")
        grid = _grid(plain.get("grid", ()))
        if place == "painted" and not grid:
            raise WorkbenchError("Nothing is painted. Paint patches on the image, or choose another place.")
        sliders = _sliders(plain.get("sliders", ()))
        return cls(
            plain["study"], tuple(dict.fromkeys(map(str, without))), sliders, place, view, grid, seed, tokens
        )

    def interventions(self, maps: Mapping[int, torch.Tensor]) -> list[Intervention]:
        """Interventions on the stream; empty if no slider is set.

        Args:
            maps: Latent -> (rows, cols) mean map in the view, for the place "map".

        Raises:
            WorkbenchError: A latent has no map in this view.
        """
        return [
            Add(latents=(latent,), strength=strength, where=self._where(latent, maps))
            for latent, strength in self.sliders
            if strength
        ]

    def _where(self, latent: int, maps: Mapping[int, torch.Tensor]) -> Schedule:
        if self.place == "everywhere":
            return everywhere()
        if self.place == "report":
            return report()
        view: Any = self.view
        if self.place == "image":
            return patches(view)
        if self.place == "painted":
            return patches(view, torch.tensor(self.grid))
        if latent not in maps or not bool(maps[latent].max() > 0):
            raise WorkbenchError(
                f"Latent {latent} has no mean map of the {self.view} image. Choose the whole image or paint a region."
            )
        return patches(view, maps[latent] / maps[latent].max())

    def plain(self) -> dict[str, Any]:
        """The JSON object."""
        return asdict(self)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _sliders(plain: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(plain, list | tuple) or len(plain) > MAX_SLIDERS:
        raise WorkbenchError(f"The sliders must be a list of at most {MAX_SLIDERS} pairs (latent, strength).")
    found = []
    for pair in plain:
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not _whole(pair[0])
            or not _number(pair[1])
        ):
            raise WorkbenchError(f"A slider reads {pair!r}; expected a pair (latent, strength).")
        found.append((int(pair[0]), float(pair[1])))
    return tuple(found)


def _grid(plain: Any) -> tuple[tuple[float, ...], ...]:
    if not isinstance(plain, list | tuple) or len(plain) > 256:
        raise WorkbenchError("The painted mask must be a list of rows of patch weights.")
    rows = []
    for row in plain:
        good = isinstance(row, list | tuple) and 0 < len(row) <= 256 and len(row) == len(plain[0])
        if not good or not all(_number(value) and 0 <= value <= 1 for value in row):
            raise WorkbenchError("The painted mask must have rows of equal length with weights from 0 to 1.")
        rows.append(tuple(float(value) for value in row))
    return tuple(rows) if any(any(row) for row in rows) else ()


__all__ = ["PARTS", "PLACES", "RunSpec"]

"""Where an intervention acts: a weight per position, 0 where the stream is left alone.

    w (B, n)      n = prompt tokens + tokens written so far, with and without a cache

Positions are chosen by token role, by image patch (one view, a weight per patch), by place in the report and by place
in the row. `a & b` multiplies two schedules, `a | b` takes the larger weight. Places count from the first real token
of a row, so left padding changes nothing. Weights are computed on the CPU; the engine moves them to the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.maira2 import Maira2Encoding, TokenRole, resolve_roles

View = Literal["frontal", "lateral", "prior"]
VIEWS: dict[str, int] = {"frontal": 0, "lateral": 1, "prior": 2}


@dataclass(frozen=True)
class Layout:
    """Kind and place of every position, including positions that are still to be written.

    Attributes:
        roles, view, patch_row, patch_col: (B, n), as in `Maira2Encoding`.
        place: (B, n) index among the real tokens of the row, -1 at padding.
        report_place: (B, n) index among the report tokens of the row, -1 elsewhere.
    """

    roles: torch.Tensor
    view: torch.Tensor
    patch_row: torch.Tensor
    patch_col: torch.Tensor
    place: torch.Tensor
    report_place: torch.Tensor

    @classmethod
    def of(cls, encoding: Maira2Encoding, n: int | None = None) -> "Layout":
        """Layout of the first `n` positions; positions after the encoding are report tokens."""
        length = encoding.input_ids.shape[1]
        n = length if n is None else n

        def extend(values: torch.Tensor, fill: int) -> torch.Tensor:
            return torch.nn.functional.pad(values.long().cpu(), (0, max(0, n - length)), value=fill)[:, :n]

        roles = extend(encoding.roles, int(TokenRole.REPORT))
        real, report = roles != TokenRole.PAD, roles == TokenRole.REPORT
        return cls(
            roles,
            extend(encoding.view, -1),
            extend(encoding.patch_row, -1),
            extend(encoding.patch_col, -1),
            torch.where(real, real.long().cumsum(1) - 1, -1),
            torch.where(report, report.long().cumsum(1) - 1, -1),
        )


class Schedule:
    """Base class: a weight for every position."""

    def weights(self, layout: Layout) -> torch.Tensor:
        """(B, n) float32 weights, 0 where nothing happens."""
        raise NotImplementedError

    def __and__(self, other: "Schedule") -> "Schedule":
        return Both(self, other)

    def __or__(self, other: "Schedule") -> "Schedule":
        return Either(self, other)


@dataclass(frozen=True)
class Both(Schedule):
    """Product of two schedules."""

    left: Schedule
    right: Schedule

    def weights(self, layout: Layout) -> torch.Tensor:
        """(B, n) products."""
        return self.left.weights(layout) * self.right.weights(layout)


@dataclass(frozen=True)
class Either(Schedule):
    """Maximum of two schedules."""

    left: Schedule
    right: Schedule

    def weights(self, layout: Layout) -> torch.Tensor:
        """(B, n) maxima."""
        return torch.maximum(self.left.weights(layout), self.right.weights(layout))


@dataclass(frozen=True)
class Roles(Schedule):
    """All positions of some roles, weight 1."""

    roles: frozenset[TokenRole]

    def weights(self, layout: Layout) -> torch.Tensor:
        """(B, n) 0 or 1."""
        table = torch.zeros(len(TokenRole))
        table[[int(role) for role in self.roles]] = 1.0
        return table[layout.roles]


@dataclass(frozen=True)
class Window(Schedule):
    """Places `start` to `stop` (exclusive; None means open) of the row or of its report, weight 1."""

    start: int = 0
    stop: int | None = None
    of_report: bool = False

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise InterventionError(
                f"The window from {self.start} to {self.stop} contains no position; start counts from 0 and stop "
                "must be larger than start."
            )

    def weights(self, layout: Layout) -> torch.Tensor:
        """(B, n) 0 or 1."""
        place = layout.report_place if self.of_report else layout.place
        inside = place >= self.start
        return (inside if self.stop is None else inside & (place < self.stop)).float()


@dataclass(frozen=True, eq=False)
class Patches(Schedule):
    """The patches of one view, with a weight per patch.

    Args:
        view: "frontal", "lateral" or "prior"; None means every image.
        grid: (rows, cols) weights, or None for 1 everywhere.
    """

    view: View | None = "frontal"
    grid: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.view is not None and self.view not in VIEWS:
            raise InterventionError(
                f"The view is {self.view!r}; it must be one of {', '.join(VIEWS)} or None."
            )
        if self.grid is not None and (self.grid.ndim != 2 or not bool(torch.isfinite(self.grid).all())):
            raise InterventionError(
                f"The patch weights have shape {tuple(self.grid.shape)}; they must be a finite (rows, cols) tensor."
            )

    def weights(self, layout: Layout) -> torch.Tensor:
        """(B, n) weights of the view's patches."""
        here = layout.view >= 0 if self.view is None else layout.view == VIEWS[self.view]
        if self.grid is None or not bool(here.any()):
            return here.float()
        image = (int(layout.patch_row[here].max()) + 1, int(layout.patch_col[here].max()) + 1)
        if tuple(self.grid.shape) != image:
            raise InterventionError(
                f"The weights cover {tuple(self.grid.shape)} patches and the image has {image}; make them with the "
                "number of rows and columns of the image."
            )
        values = self.grid.float().cpu()[layout.patch_row.clamp(min=0), layout.patch_col.clamp(min=0)]
        return torch.where(here, values, torch.zeros(()))


def roles(which: str | TokenRole | Iterable[TokenRole | str]) -> Schedule:
    """All positions of a role preset, a role, or several roles."""
    return Roles(resolve_roles(which))


def everywhere() -> Schedule:
    """Every position except padding, including written tokens."""
    return Roles(frozenset(TokenRole) - {TokenRole.PAD})


def prompt() -> Schedule:
    """Every position before the report, including image patches."""
    return Roles(frozenset(TokenRole) - {TokenRole.PAD, TokenRole.REPORT})


def patches(view: View | None = "frontal", grid: torch.Tensor | None = None) -> Schedule:
    """The patches of a view, weighted by `grid` (rows, cols) if given."""
    return Patches(view, grid)


def report(start: int = 0, stop: int | None = None) -> Schedule:
    """Report tokens `start` to `stop`, the same positions whether teacher-forced or generated."""
    return Window(start, stop, of_report=True)


def window(start: int, stop: int | None = None) -> Schedule:
    """Real tokens `start` to `stop` of every row, counted from 0."""
    return Window(start, stop)


def box_grid(
    box: tuple[float, float, float, float], shape: tuple[int, int], image: tuple[int, int] | None = None
) -> torch.Tensor:
    """Share of every patch that a box covers.

    Args:
        box: x_min, y_min, x_max, y_max in 0..1 of the image.
        shape: Rows and columns of patches.
        image: Height and width of the image in pixels if it is not square; the model sees its central square.

    Returns:
        (rows, cols) shares in 0..1.

    Raises:
        InterventionError: The box is empty or outside of what the model sees.
    """
    x0, y0, x1, y1 = box
    if image is not None:
        height, width = image
        side = min(height, width)
        x0, x1 = ((x * width - (width - side) / 2) / side for x in (x0, x1))
        y0, y1 = ((y * height - (height - side) / 2) / side for y in (y0, y1))
    covered = _overlap(y0, y1, shape[0])[:, None] * _overlap(x0, x1, shape[1])[None]
    if not bool((covered > 0).any()):
        raise InterventionError(
            f"The box {box} covers no patch; give x_min, y_min, x_max, y_max in 0..1 with x_min < x_max and "
            "y_min < y_max, inside the square that the model sees."
        )
    return covered


def mask_grid(mask: np.ndarray | torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Average a mask or a painted array (H, W) over every patch of the square it covers: (rows, cols)."""
    painted = torch.as_tensor(np.asarray(mask), dtype=torch.float32)
    if painted.ndim != 2 or min(painted.shape) < 1:
        raise InterventionError(f"The mask has shape {tuple(painted.shape)}; expected (height, width).")
    return torch.nn.functional.adaptive_avg_pool2d(painted[None], shape)[0]


def activation_grid(mean_map: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Scale a latent's mean map (rows * cols,) or (rows, cols) so that its largest value is 1."""
    grid = mean_map.reshape(shape).float()
    top = grid.abs().max()
    if not bool(top > 0):
        raise InterventionError("The activation map is 0 everywhere, so there is no place to steer at.")
    return grid / top


def mirrored(grid: torch.Tensor) -> torch.Tensor:
    """The weights mirrored at the vertical midline."""
    return grid.flip(1)


def _overlap(low: float, high: float, n: int) -> torch.Tensor:
    edges = torch.arange(n + 1, dtype=torch.float64) / n
    covered = torch.minimum(edges[1:], torch.tensor(high).double()) - torch.maximum(
        edges[:-1], torch.tensor(low).double()
    )
    return (covered.clamp(min=0) * n).float()

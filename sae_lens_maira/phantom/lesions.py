"""What disease and devices look like on the phantom's image, and the box each one is seen in.

A `Lesion` is one finding with its drawn geometry (body coordinates, so that a prior image shows the same
lesion in the same place). `paint` adds it to an image; `lesion_box` encloses it by formula, not by threshold,
so that a box means the same at every resolution. Everything is exaggerated to stay visible at 112 px.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sae_lens_maira.phantom.anatomy import Fields, side_sign
from sae_lens_maira.phantom.canvas import Array, Canvas, ramp, smooth_course


@dataclass(frozen=True)
class Lesion:
    """One finding on one image: what, where and how large; u, v, tilt and variant are sampled for it."""

    name: str
    side: str | None = None
    size: str | None = None
    d: float = 0.0
    """Distance from the midline into `side`."""
    v: float = 0.0
    tilt: float = 0.0
    variant: int = 0

    @property
    def u(self) -> float:
        """Body coordinate across the image."""
        return 0.5 + side_sign(self.side or "left") * self.d


EFFUSION_LEVEL = {"small": 0.035, "moderate": 0.165, "large": 0.34}
"""Height of the fluid above the diaphragm dome."""
LUNG_LEFT = {"small": (0.86, 0.80), "moderate": (0.68, 0.64), "large": (0.42, 0.42)}
"""Width and height that remain of the lung next to a pneumothorax."""
CONSOLIDATION_RADIUS = {"small": 0.058, "moderate": 0.088, "large": 0.125}
NODULE_RADIUS = {"small": 0.034, "moderate": 0.042, "large": 0.050}
HEART_SCALE = 1.5
MENISCUS = 0.10
RIM = 0.34
"""Distance from the midline at which the fluid's meniscus is measured."""

PACER_LEAD = ((0.775, 0.215), (0.68, 0.175), (0.56, 0.205), (0.475, 0.30), (0.47, 0.44), (0.495, 0.57))
NECK_LINE = ((0.405, 0.015), (0.415, 0.10), (0.452, 0.20), (0.468, 0.31), (0.470, 0.425))
SUBCLAVIAN_LINE = (
    (0.225, 0.215),
    (0.30, 0.180),
    (0.385, 0.180),
    (0.448, 0.235),
    (0.468, 0.33),
    (0.470, 0.425),
)


DRAW_ORDER = (
    "cardiomegaly",
    "oedema",
    "pleural effusion",
    "pneumothorax",
    "consolidation",
    "atelectasis",
    "nodule",
    "rib fracture",
    "central venous line",
    "nasogastric tube",
    "endotracheal tube",
    "pacemaker",
)
"""Soft shadows first, bone and metal last: what is in front is painted later."""


def line_course(lesion: Lesion, dome: float) -> list[tuple[float, float]]:
    """Body points along a device's course; `dome` is the height of the left dome, above the stomach."""
    if lesion.name == "pacemaker":
        tip = (0.565 + lesion.d, 0.655 + lesion.v)
        return smooth_course([*PACER_LEAD, tip])
    if lesion.name == "endotracheal tube":
        return smooth_course([(0.497, 0.0), (0.495 + lesion.d, 0.14), (0.499, 0.275 + lesion.v)], 3)
    if lesion.name == "central venous line":
        start = NECK_LINE if lesion.variant == 0 else SUBCLAVIAN_LINE
        return smooth_course([*start[:-1], (start[-1][0], start[-1][1] + lesion.v)])
    stomach = [
        (0.545, dome + 0.03),
        (0.60 + lesion.d, dome + 0.10),
        (0.665 + lesion.d, dome + 0.115 + lesion.v),
    ]
    return smooth_course([(0.512, 0.0), (0.517, 0.2), (0.514, 0.42), (0.52, 0.6), *stomach])


LINE_WIDTH = {
    "pacemaker": 0.015,
    "endotracheal tube": 0.026,
    "central venous line": 0.017,
    "nasogastric tube": 0.017,
}


def fracture_bars(lesion: Lesion) -> list[list[tuple[float, float]]]:
    """The two displaced ends of a broken rib, as body points."""
    sign = side_sign(lesion.side or "left")
    slope, half, step = 0.42, 0.052, 0.013
    inner = [
        (lesion.u - sign * half, lesion.v - slope * half - step),
        (lesion.u - sign * 0.010, lesion.v - step),
    ]
    outer = [
        (lesion.u + sign * 0.010, lesion.v + step),
        (lesion.u + sign * half, lesion.v + slope * half + step),
    ]
    return [inner, outer]


def fluid(lesion: Lesion, fields: Fields) -> Array:
    """Fluid of a pleural effusion, 0..1: everything below a level that climbs towards the chest wall."""
    side = str(lesion.side)
    level = fields.body.dome(side) - EFFUSION_LEVEL[str(lesion.size)]
    rise = MENISCUS * np.exp((np.minimum(fields.lateral, 0.40) - RIM) / np.float32(0.075))
    own = fields.right if side == "right" else 1 - fields.right
    deep = own * ramp((0.415 - fields.lateral) / 0.05) * ramp((fields.lateral - 0.05) / 0.03)
    below = ramp((fields.canvas.v - (level - rise)) / 0.03) * ramp((0.86 - fields.canvas.v) / 0.10)
    return deep * below


def free_air(lesion: Lesion, fields: Fields) -> tuple[Array, Array]:
    """Air of a pneumothorax and the visceral line that bounds it, both 0..1."""
    side = str(lesion.side)
    wide, high = LUNG_LEFT[str(lesion.size)]
    d, v = fields.d(side), fields.canvas.v
    body = fields.body
    foot = 0.66
    reach = np.float32(wide * body.lung_width)
    height = np.float32(high * (foot - body.lung_top))
    radius = np.sqrt(np.square(np.maximum(d - 0.09, 0) / reach) + np.square(np.minimum(v - foot, 0) / height))
    lung = fields.chest[side]
    end = {"small": 0.42, "moderate": 0.58, "large": 0.80}[str(lesion.size)]
    stop = ramp((end - v) / 0.06)
    outside = ramp((radius - 1) / 0.06) * stop * lung
    edge = ramp((0.034 - np.abs(radius - 0.985)) / 0.05) * stop * lung
    return outside, edge


def coarse_noise(canvas: Canvas, rng: np.random.Generator, cells: int = 16) -> Array:
    """Smooth unit noise: a (cells, cells) normal grid, interpolated linearly to the image."""
    grid = rng.standard_normal((cells, cells)).astype(np.float32)
    knots = np.arange(cells, dtype=np.float32)
    weights = np.maximum(1 - np.abs(canvas.axis[:, None] * (cells - 1) - knots[None, :]), 0)
    return weights @ grid @ weights.T


def paint(image: Array, lesion: Lesion, fields: Fields, rng: np.random.Generator) -> None:
    """Add one finding to an image in place; the heart's size is drawn with the anatomy instead.

    Args:
        image: (size, size) float32, changed.
        lesion: The finding.
        fields: Masks of this image.
        rng: Used for texture only.
    """
    canvas = fields.canvas
    name = lesion.name
    if name == "pleural effusion":
        image += fluid(lesion, fields) * np.maximum(np.float32(fields.body.wall + 0.085) - image, 0.02)
    elif name == "pneumothorax":
        outside, edge = free_air(lesion, fields)
        image += outside * (0.04 - image) * 0.70
        image += 0.26 * edge
        if lesion.size == "large":
            image += 0.09 * (fields.lung[str(lesion.side)] - outside).clip(0)
    elif name == "consolidation":
        radius = CONSOLIDATION_RADIUS[str(lesion.size)]
        cloud = canvas.glow(lesion.u, lesion.v, radius * 0.80, radius * 0.68)
        for du, dv in ((0.5, 0.25), (-0.45, 0.35), (0.1, -0.45)):
            cloud += 0.45 * canvas.glow(
                lesion.u + du * radius, lesion.v + dv * radius, 0.42 * radius, 0.42 * radius
            )
        image += 0.30 * np.minimum(cloud, 1.1) * fields.chest[str(lesion.side)]
    elif name == "oedema":
        wings = sum(
            canvas.glow(0.5 + s * 0.135, 0.43, 0.085, 0.125)
            + 0.6 * canvas.glow(0.5 + s * 0.16, 0.55, 0.09, 0.08)
            for s in (-1, 1)
        )
        mottle = 1 + 0.22 * coarse_noise(canvas, rng)
        both = fields.lung["left"] + fields.lung["right"]
        image += 0.235 * np.minimum(np.asarray(wings), 1.15) * mottle * both
        for s in (-1, 1):
            for k in range(4):
                y = 0.565 + 0.030 * k
                image += 0.16 * canvas.curve([(0.5 + s * 0.315, y), (0.5 + s * 0.370, y + 0.006)], 0.010)
    elif name == "atelectasis":
        image += 0.34 * canvas.curve(atelectasis_course(lesion), 0.030, soft=0.5)
    elif name == "nodule":
        radius = NODULE_RADIUS[str(lesion.size)]
        image += 0.40 * canvas.ellipse(lesion.u, lesion.v, radius, radius, soft=0.30)
    elif name == "rib fracture":
        for bar in fracture_bars(lesion):
            image += 0.36 * canvas.curve(bar, 0.026, soft=0.3)
        image -= 0.30 * canvas.curve([(lesion.u, lesion.v - 0.028), (lesion.u, lesion.v + 0.028)], 0.012)
    elif name in LINE_WIDTH:
        course = line_course(lesion, fields.body.dome_left)
        line = canvas.curve(course, LINE_WIDTH[name])
        strength = 0.34 if name != "endotracheal tube" else 0.30
        image += strength * line
        if name == "endotracheal tube":
            image -= 0.12 * canvas.curve(course, 0.008)
        if name == "pacemaker":
            can = canvas.ellipse(0.795, 0.235, 0.058, 0.046, soft=0.25)
            image += 0.55 * can
            image += 0.30 * canvas.curve(course[-2:], 0.022)


def atelectasis_course(lesion: Lesion) -> list[tuple[float, float]]:
    """Middle line of a plate of collapsed lung."""
    half, sign = 0.072, side_sign(lesion.side or "left")
    return [
        (lesion.u - sign * half, lesion.v + lesion.tilt * half),
        (lesion.u + sign * half, lesion.v - lesion.tilt * half),
    ]


def lesion_box(lesion: Lesion, fields: Fields) -> tuple[float, float, float, float] | None:
    """The box of a finding on this image; None for oedema, which is everywhere."""
    canvas: Canvas = fields.canvas
    body = fields.body
    sign = side_sign(lesion.side or "left")
    name, pad = lesion.name, 0.0

    def across(d0: float, d1: float, v0: float, v1: float) -> list[tuple[float, float]]:
        return [(0.5 + sign * d, v) for d in (d0, d1) for v in (v0, v1)]

    if name == "pleural effusion":
        dome = body.dome(str(lesion.side))
        level = dome - EFFUSION_LEVEL[str(lesion.size)]
        inner = {"small": 0.14, "moderate": 0.10, "large": 0.08}[str(lesion.size)]
        points = across(inner, 0.385, level - MENISCUS, dome + 0.10)
    elif name == "pneumothorax":
        end = {"small": 0.42, "moderate": 0.58, "large": 0.78}[str(lesion.size)]
        points = across(0.08, 0.10 + body.lung_width, body.lung_top, end)
    elif name == "consolidation":
        r = 1.15 * CONSOLIDATION_RADIUS[str(lesion.size)]
        points = across(lesion.d - r, lesion.d + r, lesion.v - r, lesion.v + r)
    elif name == "nodule":
        r = NODULE_RADIUS[str(lesion.size)]
        points = across(lesion.d - r, lesion.d + r, lesion.v - r, lesion.v + r)
    elif name == "atelectasis":
        points, pad = atelectasis_course(lesion), 0.018
    elif name == "rib fracture":
        points, pad = [p for bar in fracture_bars(lesion) for p in bar], 0.014
    elif name == "cardiomegaly":
        half = body.heart_width * HEART_SCALE
        centre = body.heart_left + 0.05 * (HEART_SCALE - 1)
        points = across(
            centre - 0.92 * half - 0.03, centre + 0.97 * half, body.heart_v - 0.16, body.heart_v + 0.14
        )
    elif name == "pacemaker":
        points, pad = [*line_course(lesion, body.dome_left), (0.853, 0.235), (0.795, 0.189)], 0.005
    elif name in LINE_WIDTH:
        points, pad = line_course(lesion, body.dome_left), 0.012
    else:
        return None
    return canvas.box(points, pad)

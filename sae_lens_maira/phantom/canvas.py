"""Pixels in body coordinates: the drawing primitives of the phantom.

A `Canvas` is a square image whose pixel centres are carried back into body coordinates (u, v) by the inverse
of a small similarity,  (x, y) = c + t + s R(a) ((u, v) - c),  so that every organ is drawn once, in its own
place, at any resolution. u runs to image right (patient left), v runs down, the image is the unit square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Array = np.ndarray
Points = Sequence[tuple[float, float]]


def ramp(z: Array) -> Array:
    """Smooth step: 0 below -1/2, 1 above 1/2, cubic between; far cheaper than a logistic."""
    t = np.clip(z + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


class Canvas:
    """A (size, size) float32 image with body coordinates `u`, `v` of every pixel centre."""

    def __init__(self, size: int, shift: tuple[float, float], scale: float, angle: float):
        self.size, self.shift, self.scale, self.angle = size, shift, scale, angle
        self._cos, self._sin = math.cos(angle), math.sin(angle)
        axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
        self.axis = axis
        px = (axis - np.float32(0.5 + shift[0]))[None, :] / np.float32(scale)
        py = (axis - np.float32(0.5 + shift[1]))[:, None] / np.float32(scale)
        cos, sin = np.float32(self._cos), np.float32(self._sin)
        self.u: Array = 0.5 + cos * px + sin * py
        self.v: Array = 0.5 - sin * px + cos * py

    def place(self, points: Points) -> Array:
        """Body points (n, 2) -> image points (n, 2)."""
        p = np.asarray(points, dtype=np.float64) - 0.5
        x = 0.5 + self.shift[0] + self.scale * (self._cos * p[:, 0] - self._sin * p[:, 1])
        y = 0.5 + self.shift[1] + self.scale * (self._sin * p[:, 0] + self._cos * p[:, 1])
        return np.stack([x, y], axis=1)

    def box(self, points: Points, pad: float = 0.0) -> tuple[float, float, float, float]:
        """Tight image box of body points, widened by pad, cut to the image, rounded to 1e-4."""
        image = self.place(points)
        low = np.clip(image.min(axis=0) - pad, 0.0, 0.99)
        high = np.clip(image.max(axis=0) + pad, low + 0.01, 1.0)
        return (
            round(float(low[0]), 4),
            round(float(low[1]), 4),
            round(float(high[0]), 4),
            round(float(high[1]), 4),
        )

    def ellipse(
        self, u: float, v: float, ru: float, rv: float, soft: float = 0.3, tilt: float = 0.0
    ) -> Array:
        """Filled ellipse with a border blurred over `soft` of its radius; values 0..1."""
        du, dv = self.u - np.float32(u), self.v - np.float32(v)
        if tilt:
            cos, sin = np.float32(math.cos(tilt)), np.float32(math.sin(tilt))
            du, dv = cos * du + sin * dv, cos * dv - sin * du
        radius = np.sqrt(np.square(du / np.float32(ru)) + np.square(dv / np.float32(rv)))
        return ramp((1 - radius) / np.float32(soft))

    def glow(self, u: float, v: float, ru: float, rv: float) -> Array:
        """Gaussian blob of peak 1."""
        du, dv = (self.u - np.float32(u)) / np.float32(ru), (self.v - np.float32(v)) / np.float32(rv)
        return np.exp(np.float32(-0.5) * (du * du + dv * dv))

    def curve(self, points: Points, width: float, soft: float = 0.4) -> Array:
        """Polyline through body points, full width `width`; 0..1.

        Only the windows that a piece touches are computed, which makes a catheter cheap.
        """
        image, half = self.place(points), width * self.scale / 2
        out = np.zeros((self.size, self.size), dtype=np.float32)
        reach = half * (1 + soft) + 1.0 / self.size
        edge = max(2 * half * soft, 0.7 / self.size)
        for (x0, y0), (x1, y1) in pairwise(image):
            left = max(int((min(x0, x1) - reach) * self.size), 0)
            right = min(int((max(x0, x1) + reach) * self.size) + 1, self.size)
            top = max(int((min(y0, y1) - reach) * self.size), 0)
            bottom = min(int((max(y0, y1) + reach) * self.size) + 1, self.size)
            if right <= left or bottom <= top:
                continue
            dx, dy = np.float32(x1 - x0), np.float32(y1 - y0)
            px = self.axis[None, left:right] - np.float32(x0)
            py = self.axis[top:bottom, None] - np.float32(y0)
            along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, np.float32(1e-9)), 0, 1)
            distance = np.sqrt(np.square(px - along * dx) + np.square(py - along * dy))
            window = out[top:bottom, left:right]
            np.maximum(window, ramp((np.float32(half) - distance) / np.float32(edge)), out=window)
        return out


def smooth_course(points: Points, steps: int = 4) -> list[tuple[float, float]]:
    """Catmull-Rom curve through the points, `steps` pieces per span: catheters bend, they have no corners."""
    p = np.asarray(points, dtype=np.float64)
    padded = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    course: list[tuple[float, float]] = []
    for i in range(len(p) - 1):
        a, b, c, d = padded[i : i + 4]
        for t in np.arange(steps) / steps:
            q = 0.5 * (
                2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
            )
            course.append((float(q[0]), float(q[1])))
    course.append((float(p[-1, 0]), float(p[-1, 1])))
    return course

"""The lateral image of the phantom: front to image left, spine to the right, drawn as simply as it may be.

It shares the patient's proportions with the frontal image and repeats the findings that a lateral view really
shows (fluid in the posterior angle, a large heart, a pacemaker, a dense lung). It carries no truth of its
own: boxes belong to the frontal image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sae_lens_maira.phantom.anatomy import Body
from sae_lens_maira.phantom.canvas import Array, Canvas, ramp, smooth_course
from sae_lens_maira.phantom.lesions import (
    CONSOLIDATION_RADIUS,
    EFFUSION_LEVEL,
    HEART_SCALE,
    NODULE_RADIUS,
    Lesion,
)


def lateral_image(canvas: Canvas, body: Body, lesions: Sequence[Lesion]) -> Array:
    """Noise-free lateral image (size, size) float32 of a patient with these findings."""
    u, v = canvas.u, canvas.v
    names = {lesion.name for lesion in lesions}
    outline = np.maximum(
        canvas.ellipse(0.50, 0.62, 0.42, 0.60, soft=0.12),
        ramp((0.12 - np.abs(u - 0.52)) / 0.05) * ramp((0.3 - v) / 0.1),
    )
    image = 0.04 + (body.wall + 0.03) * outline

    spine_u = 0.735 + 0.06 * np.sin(3.0 * (v - 0.1))
    floor = (
        body.dome_right
        + 0.01
        + 0.55 * np.square(np.maximum(u - 0.40, 0))
        + 0.9 * np.square(np.maximum(0.40 - u, 0))
    )
    lung = canvas.ellipse(0.49, 0.50, body.lung_width + 0.02, 0.40, soft=0.14) * ramp((floor - v) / 0.02)
    heart_scale = HEART_SCALE if "cardiomegaly" in names else 1.0
    heart = canvas.ellipse(
        0.365 + 0.03 * (heart_scale - 1),
        body.heart_v + 0.005,
        0.118 * (0.4 + 0.6 * heart_scale),
        0.165,
        soft=0.4,
        tilt=-0.6,
    )
    aerated = lung * (1 - heart)
    image -= 0.33 * aerated
    image += 0.07 * heart * outline + 0.06 * outline * ramp((v - floor) / 0.04)

    wave = np.cos(6.2832 * (v + 0.55 * u) / (1.25 * body.rib_gap) + 6.2832 * body.rib_phase)
    image += 0.6 * body.rib_contrast * lung * ramp((wave - 0.3) / 0.6)
    image += 0.05 * aerated * canvas.glow(0.50, 0.40, 0.045, 0.05)
    image += 0.05 * aerated * ramp((0.035 - np.abs(u - 0.60 - 0.08 * np.sin(4 * (v - 0.2)))) / 0.05)  # aorta

    vertebra = 0.5 + 0.5 * ramp((np.cos(6.2832 * v / 0.062) + 0.55) / 0.5)
    image += 0.17 * ramp((0.045 - np.abs(u - spine_u)) / 0.02) * vertebra * outline
    image += 0.12 * canvas.curve(
        smooth_course([(0.235, 0.22), (0.195, 0.36), (0.185, 0.52)], 3), 0.024
    )  # sternum
    image -= 0.10 * ramp((0.018 - np.abs(u - 0.49 - 0.12 * (v - 0.1))) / 0.014) * ramp((0.36 - v) / 0.04)
    image -= 0.14 * canvas.ellipse(0.40, body.dome_left + 0.10, body.gas[1], body.gas[2], soft=0.5)

    for lesion in lesions:
        if lesion.name == "pleural effusion":
            level = body.dome_right + 0.06 - EFFUSION_LEVEL[str(lesion.size)]
            climb = 0.10 * np.exp((np.minimum(u, 0.78) - 0.74) / np.float32(0.07))
            fluid = ramp((v - (level - climb)) / 0.03) * ramp((u - 0.42) / 0.16) * lung
            image += fluid * np.maximum(0.55 - image, 0)
        elif lesion.name == "consolidation":
            radius = CONSOLIDATION_RADIUS[str(lesion.size)]
            image += 0.20 * canvas.glow(0.50 + lesion.tilt, lesion.v, radius * 0.8, radius * 0.7) * lung
        elif lesion.name == "nodule":
            radius = NODULE_RADIUS[str(lesion.size)]
            image += 0.25 * canvas.ellipse(0.50 + lesion.tilt, lesion.v, radius, radius)
        elif lesion.name == "pacemaker":
            image += 0.5 * canvas.ellipse(0.20, 0.21, 0.022, 0.05, soft=0.3)
            image += 0.3 * canvas.curve(
                smooth_course([(0.21, 0.17), (0.42, 0.18), (0.46, 0.40), (0.33, 0.66)], 4), 0.016
            )
    return image

"""The normal chest of the phantom: one patient's body, and its frontal image before any finding.

Image grey is a sum of attenuations: body wall, minus aerated lung, plus ribs, spine, heart and mediastinum.
Lungs are half-ellipses cut by a diaphragm dome; ribs are one periodic band in a curved coordinate. Image left
is the patient's right. Distances are in units of the image's side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sae_lens_maira.phantom.canvas import Array, Canvas, ramp, smooth_course


@dataclass(frozen=True)
class Body:
    """What stays the same in all images of a patient."""

    lung_width: float
    lung_top: float
    dome_right: float
    dome_left: float
    heart_width: float
    heart_left: float
    heart_v: float
    rib_gap: float
    rib_phase: float
    rib_contrast: float
    clavicle: float
    wall: float
    gas: tuple[float, float, float]
    marking_phase: float

    def dome(self, side: str) -> float:
        """Height (v) of the diaphragm's top on a side; the right one is higher."""
        return self.dome_right if side == "right" else self.dome_left


def draw_body(rng: np.random.Generator) -> Body:
    """Draw one patient."""
    r = rng.uniform
    dome = r(0.685, 0.725)
    return Body(
        lung_width=r(0.262, 0.292),
        lung_top=r(0.105, 0.135),
        dome_right=dome,
        dome_left=dome + r(0.022, 0.042),
        heart_width=r(0.122, 0.138),
        heart_left=r(0.034, 0.044),
        heart_v=dome - r(0.060, 0.080),
        rib_gap=r(0.072, 0.084),
        rib_phase=r(0, 1),
        rib_contrast=r(0.055, 0.085),
        clavicle=r(-0.012, 0.012),
        wall=r(0.43, 0.47),
        gas=(r(0.63, 0.69), r(0.045, 0.07), r(0.022, 0.035)),
        marking_phase=r(0, 6.28),
    )


@dataclass(frozen=True)
class Exposure:
    """What differs between two images of one patient: position, darkness, contrast, grain."""

    shift: tuple[float, float]
    scale: float
    angle: float
    gain: float
    bias: float
    grain: float
    tilt: float
    marker: bool


def draw_exposure(rng: np.random.Generator) -> Exposure:
    """Draw one image's exposure and the patient's position on it."""
    r = rng.uniform
    return Exposure(
        shift=(r(-0.022, 0.022), r(-0.018, 0.022)),
        scale=r(0.95, 1.06),
        angle=r(-0.045, 0.045),
        gain=r(0.90, 1.10),
        bias=r(-0.03, 0.04),
        grain=r(0.012, 0.024),
        tilt=r(-0.04, 0.04),
        marker=bool(rng.random() < 0.6),
    )


@dataclass(frozen=True)
class Fields:
    """Masks of one image that findings are drawn against; every array is (size, size) float32 in 0..1."""

    canvas: Canvas
    body: Body
    lateral: Array
    """|u - 1/2|, the distance from the midline."""
    right: Array
    """1 on the patient's right (image left)."""
    chest: dict[str, Array]
    """Hemithorax above the diaphragm, per side, heart included."""
    lung: dict[str, Array]
    """Aerated lung per side, heart excluded."""

    def d(self, side: str) -> Array:
        """Distance from the midline, positive into the given side."""
        return (0.5 - self.canvas.u) if side == "right" else (self.canvas.u - 0.5)


def side_sign(side: str) -> int:
    """+1 for the patient's left, which is image right."""
    return 1 if side == "left" else -1


def frontal_image(canvas: Canvas, body: Body, heart_scale: float, vascular: float) -> tuple[Array, Fields]:
    """Noise-free frontal image and the masks findings need.

    Args:
        canvas: The pixel grid.
        body: The patient.
        heart_scale: Width of the heart against normal; about 1.5 is plainly enlarged.
        vascular: Strength of the lung markings against normal.
    """
    u, v = canvas.u, canvas.v
    lateral = np.abs(u - 0.5)
    right = (u < 0.5).astype(np.float32)
    dome = np.where(u < 0.5, np.float32(body.dome_right), np.float32(body.dome_left))

    # Body outline: neck, sloping shoulders, flanks.
    shoulder = 0.055 + 0.42 * np.square(np.maximum(lateral - 0.10, 0))
    outline = np.maximum(ramp((v - shoulder) / 0.05), ramp((0.125 - lateral) / 0.05))
    outline = outline * ramp((0.475 - lateral) / 0.05)
    image = 0.04 + body.wall * outline
    image += 0.10 * outline * ramp((lateral - 0.40) / 0.10)

    # Hemithoraces: half-ellipses, steep towards the midline, cut below by the domes.
    centre = np.float32(0.10)
    reach = np.where(lateral > centre, np.float32(body.lung_width), np.float32(0.062))
    height = np.float32(0.62 - body.lung_top)
    radius = np.sqrt(np.square((lateral - centre) / reach) + np.square(np.minimum(v - 0.62, 0) / height))
    floor = dome + 2.1 * np.square(lateral - 0.165)
    thorax = ramp((1 - radius) / 0.10) * ramp((floor - v) / 0.018)

    heart = canvas.ellipse(
        0.5 + body.heart_left + 0.05 * (heart_scale - 1),
        body.heart_v,
        body.heart_width * heart_scale,
        0.122 * (0.6 + 0.4 * heart_scale),
        soft=0.24,
        tilt=0.5,
    )
    atrium = canvas.ellipse(0.472 - 0.05 * (heart_scale - 1), body.heart_v - 0.012, 0.062, 0.11, soft=0.35)
    heart = np.maximum(heart, atrium)
    vessels = np.maximum(
        ramp((0.052 + 0.02 * ramp((v - 0.3) / 0.3) - lateral) / 0.03) * ramp((v - 0.10) / 0.1),
        canvas.ellipse(0.555, 0.295, 0.036, 0.045, soft=0.35),
    )
    middle = np.maximum(heart, vessels * ramp((0.80 - v) / 0.1))
    aerated = thorax * (1 - middle)
    image -= 0.345 * aerated

    # Soft tissue gradients inside the image: denser mediastinum, liver, spine.
    image += 0.10 * middle * outline
    image += 0.09 * outline * ramp((v - floor) / 0.05) * (0.7 + 0.3 * right)
    hila = canvas.glow(0.405, 0.43, 0.028, 0.055) + canvas.glow(0.60, 0.41, 0.028, 0.050)
    image += 0.11 * aerated * hila

    # Lung markings: wavering rays from each hilum that thin out towards the rim.
    dv, dd = v - 0.43, lateral - 0.06
    distance = np.sqrt(dv * dv + dd * dd) + 1e-4
    angle = np.arctan2(dv, dd) + 1.5 * right
    rays = np.cos(13 * angle + body.marking_phase + 2.5 * np.sin(26 * distance + 3 * angle))
    image += (
        (0.055 * vascular)
        * aerated
        * np.maximum(rays, 0)
        * np.minimum(np.maximum(1 - distance / 0.36, 0), 9 * distance)
    )

    # Ribs: one periodic band in a coordinate that follows the posterior arc, and a fainter anterior one.
    cage = np.maximum(thorax, 0.35 * outline * ramp((0.42 - lateral) / 0.05) * ramp((0.88 - v) / 0.1))
    cage = cage * ramp((v - 0.09) / 0.06)
    posterior = (v - 1.55 * np.square(np.maximum(lateral - 0.10, 0)) + 0.10 * lateral) / body.rib_gap
    wave = np.cos(6.2832 * (posterior + body.rib_phase))
    bands = ramp((wave - 0.25) / 0.6)
    rim = ramp((wave - 0.15) / 0.3) - ramp((wave - 0.65) / 0.3)
    anterior = (v + 0.9 * lateral) / (1.18 * body.rib_gap)
    front = ramp((np.cos(6.2832 * (anterior + 0.7 * body.rib_phase)) - 0.35) / 0.5) * ramp(
        (lateral - 0.15) / 0.1
    )
    cage = cage * (1 - 0.6 * heart)
    image += body.rib_contrast * cage * (bands + 0.35 * rim) + 0.5 * body.rib_contrast * thorax * front

    # Spine with disc spaces, trachea with main bronchi, clavicles, gastric gas.
    disc = 0.7 + 0.3 * ramp((np.cos(6.2832 * v / 0.052) + 0.6) / 0.5)
    image += 0.075 * ramp((0.036 - lateral) / 0.016) * disc * ramp((v - 0.02) / 0.08)
    image -= 0.12 * ramp((0.019 - lateral) / 0.014) * ramp((0.345 - v) / 0.03)
    image -= 0.05 * canvas.curve([(0.5, 0.335), (0.44, 0.395)], 0.02)
    image -= 0.05 * canvas.curve([(0.5, 0.335), (0.575, 0.405)], 0.02)
    for sign in (-1, 1):
        dip = body.clavicle * sign
        bone = [
            (0.5 + sign * d, w + dip)
            for d, w in ((0.045, 0.185), (0.14, 0.165), (0.25, 0.135), (0.36, 0.125))
        ]
        image += 0.12 * canvas.curve(smooth_course(bone, 3), 0.030, soft=0.35)
        blade = [(0.5 + sign * d, w) for d, w in ((0.36, 0.17), (0.385, 0.30), (0.345, 0.46))]
        image += 0.035 * canvas.curve(blade, 0.05, soft=0.8)
    gas_u, gas_w, gas_h = body.gas
    image -= 0.17 * canvas.ellipse(gas_u, body.dome_left + 0.065 + gas_h, gas_w, gas_h, soft=0.5)

    chest = {"right": thorax * right, "left": thorax * (1 - right)}
    lung = {"right": aerated * right, "left": aerated * (1 - right)}
    return image, Fields(canvas=canvas, body=body, lateral=lateral, right=right, chest=chest, lung=lung)


def expose(image: Array, canvas: Canvas, exposure: Exposure, rng: np.random.Generator) -> Array:
    """Turn attenuation into an 8-bit image (size, size): gain, uneven beam, vignette, side marker, grain."""
    if exposure.marker:
        x, y = 0.10, 0.06
        image = image + 0.45 * canvas.curve([(x, y - 0.022), (x, y + 0.022)], 0.013)
        image = image + 0.30 * canvas.curve([(x, y - 0.02), (x + 0.022, y - 0.012), (x, y)], 0.011)
        image = image + 0.30 * canvas.curve([(x + 0.004, y), (x + 0.024, y + 0.022)], 0.011)
    axis = canvas.axis - 0.5
    beam = (
        1
        + exposure.tilt * axis[None, :]
        - 0.45 * (np.square(axis)[None, :] + np.square(axis)[:, None]) ** 1.5
    )
    grey = (exposure.bias + exposure.gain * image) * beam
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    # Half of the grain is shared by neighbours, as in a real emulsion.
    grain[:, 1:] += 0.5 * grain[:, :-1]
    grey += np.float32(exposure.grain) * grain * (0.6 + 0.8 * np.clip(grey, 0, 1))
    return (np.clip(grey * 1.18, 0, 1) * 255 + 0.5).astype(np.uint8)

"""What a vision model is shown of an image latent: the film as the record set keeps it, firing patches outlined.

    patch (row, col) of a rows x cols grid -> its rectangle in the square crop, drawn where activation > 0.3 of the max

Record sets keep no image of credentialed studies unless they were told to; such a study then has no picture. It knows
nothing about prompts or servers.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageDraw

from sae_lens_maira.interp.examples import Example
from sae_lens_maira.interp.windows import MARKED_FROM

COLOUR = (255, 220, 0)


def outlined(example: Example, folder: Path) -> Image.Image | None:
    """The view that holds an example's chosen patch, firing patches outlined; None where there is no such image.

    Args:
        example: of an image latent.
        folder: of the record set.
    """
    patch = example.context.patch
    if patch is None:
        return None
    path = dict(example.study.images).get(patch[0])
    heat = next((h for h in example.context.heat if h.view == patch[0]), None)
    if path is None or heat is None or not (folder / path).is_file():
        return None
    with Image.open(folder / path) as file:
        film = file.convert("RGB")
    draw = ImageDraw.Draw(film)
    height, width = film.height / heat.rows, film.width / heat.cols
    for number, value in zip(heat.patches, heat.values, strict=True):
        if value > MARKED_FROM * example.max or number == patch[1] * heat.cols + patch[2]:
            row, col = divmod(number, heat.cols)
            corner = (col * width, row * height, (col + 1) * width - 1, (row + 1) * height - 1)
            draw.rectangle(corner, outline=COLOUR)
    return film


def data_uri(film: Image.Image) -> str:
    """An image as a PNG in a `data:` address, the form in which chat messages carry it."""
    buffer = io.BytesIO()
    film.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

"""From a radiograph in any usual form to the model's pixels.

    grey -> (v - min) / (max - min) * 255 -> uint8 -> shortest edge to S, bicubic -> centre crop S x S
         -> (v / 255 - mean) / std -> three equal channels

Takes PIL images, numpy arrays, paths to picture files and DICOM files. Sixteen-bit pictures keep their range
until the min-max step (PIL's own conversion to "L" would clip them). Boxes refer to the centre crop;
`box_to_image` and `box_to_crop` map between it and the whole image. This module knows nothing about prompts
or models.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from sae_lens_maira.errors import ImageError
from sae_lens_maira.maira2.dicom import is_dicom, read_dicom

ImageSource = Any
"""A PIL image, a numpy array `(H, W)` or `(H, W, 3)`, or the path of a picture or DICOM file."""


@dataclass(frozen=True)
class ImageRecipe:
    """The numbers of the image path, read from a checkpoint's `preprocessor_config.json`.

    Args:
        size: length of the shortest edge after resizing, in pixels.
        crop: side of the centre crop, in pixels.
        mean: per channel mean subtracted after division by 255.
        std: per channel divisor.
        resample: PIL's resampling filter; 3 is bicubic.
    """

    size: int = 518
    crop: int = 518
    mean: tuple[float, float, float] = (0.5307, 0.5307, 0.5307)
    std: tuple[float, float, float] = (0.2583, 0.2583, 0.2583)
    resample: int = 3

    def to_pixels(self, image: ImageSource) -> torch.Tensor:
        """The model's pixels of one image, `(3, crop, crop)` float32.

        Raises:
            ImageError: the image cannot be read, is empty or not finite, or has no contrast.
        """
        grey = self.crop_square(Image.fromarray(stretch_contrast(read_grey(image))))
        levels = np.asarray(grey)
        # 256 possible values: normalise the table once and look pixels up.
        table = (np.arange(256, dtype=np.float32)[None] / np.float32(255) - _column(self.mean)) / _column(
            self.std
        )
        if len(set(self.mean)) == 1 and len(set(self.std)) == 1:
            return torch.from_numpy(table[0].astype(np.float32)[levels]).expand(3, -1, -1).contiguous()
        return torch.from_numpy(table.astype(np.float32)[:, levels])

    def crop_square(self, image: Image.Image) -> Image.Image:
        """Resize the shortest edge to `size` and cut the centre square out."""
        width, height = image.size
        new_width, new_height = resized_size(width, height, self.size)
        if (new_width, new_height) != (width, height):
            image = image.resize((new_width, new_height), Image.Resampling(self.resample))
        if (new_width, new_height) == (self.crop, self.crop):
            return image
        left, top = (new_width - self.crop) // 2, (new_height - self.crop) // 2
        return image.crop((left, top, left + self.crop, top + self.crop))


def read_grey(image: ImageSource) -> np.ndarray:
    """Read an image as a `(H, W)` grey array in its own range (uint8, uint16 or float).

    Raises:
        ImageError: the file or array is not a readable single image.
    """
    if isinstance(image, str | os.PathLike):
        return _read_file(Path(image))
    if isinstance(image, Image.Image):
        return _grey_of_pil(image, "the PIL image")
    if isinstance(image, np.ndarray):
        return _grey_of_array(image)
    raise ImageError(
        f"An image of type {type(image).__name__} was given; a PIL image, a numpy array or the path of a"
        " picture or DICOM file was expected. Convert it to one of these."
    )


def stretch_contrast(grey: np.ndarray) -> np.ndarray:
    """Map the darkest value to 0 and the brightest to 255, truncated to uint8.

    Raises:
        ImageError: the image is empty, not finite, or constant.
    """
    if grey.size == 0:
        raise ImageError(f"The image has shape {grey.shape} and holds no pixel; give an image with pixels.")
    low, high = grey.min(), grey.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError(
            "The image holds values that are not finite; replace NaN and infinity before encoding."
        )
    if low == high:
        raise ImageError(
            f"The image is constant (every pixel is {low}), so its contrast cannot be stretched to 0..255. A"
            " radiograph was expected; check the file, or leave the study out."
        )
    if grey.dtype in (np.uint8, np.uint16):
        # Few possible values: stretch the table, not the pixels. Same numbers, a tenth of the time.
        table = np.arange(int(np.iinfo(grey.dtype).max) + 1, dtype=np.float64)
        stretched = (table - float(low)) / (float(high) - float(low)) * 255
        return np.clip(stretched, 0, 255).astype(np.uint8)[grey]
    values = grey.astype(np.float64)
    return ((values - float(low)) / (float(high) - float(low)) * 255).astype(np.uint8)


def resized_size(width: int, height: int, shortest: int) -> tuple[int, int]:
    """Width and height after scaling the shortest edge to `shortest`; the other is truncated."""
    if width <= height:
        return shortest, int(shortest * height / width)
    return int(shortest * width / height), shortest


def box_to_image(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[float, float, float, float]:
    """Map a box from the centre square crop (0..1) to the whole image of `width` x `height` pixels (0..1)."""
    (left, top), (across, down) = _crop_in_image(width, height)
    x_min, y_min, x_max, y_max = box
    return (left + x_min * across, top + y_min * down, left + x_max * across, top + y_max * down)


def box_to_crop(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[float, float, float, float] | None:
    """Map a box from the whole image (0..1) to the centre square crop, clipped; None if it lies outside."""
    (left, top), (across, down) = _crop_in_image(width, height)
    x_min, x_max = ((value - left) / across for value in (box[0], box[2]))
    y_min, y_max = ((value - top) / down for value in (box[1], box[3]))
    if x_max <= 0 or x_min >= 1 or y_max <= 0 or y_min >= 1:
        return None
    return max(x_min, 0.0), max(y_min, 0.0), min(x_max, 1.0), min(y_max, 1.0)


def _crop_in_image(width: int, height: int) -> tuple[tuple[float, float], tuple[float, float]]:
    side = min(width, height)
    return ((width - side) / 2 / width, (height - side) / 2 / height), (side / width, side / height)


def _column(values: tuple[float, ...]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)[:, None]


def _read_file(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ImageError(f"There is no image file at {path}. Check the path in the study record.")
    if is_dicom(path):
        return read_dicom(path)
    try:
        with Image.open(path) as image:
            image.load()
            return _grey_of_pil(image, str(path))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(
            f"{path} could not be read as a picture ({error}). A whole PNG, JPEG, TIFF or DICOM file was"
            " expected; the file may be truncated or of another kind. Fetch it again or leave the study out."
        ) from error


def _grey_of_pil(image: Image.Image, name: str) -> np.ndarray:
    if getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"{name} holds {getattr(image, 'n_frames', 1)} frames; give one single image.")
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    try:
        return np.asarray(image.convert("L"))
    except OSError as error:
        raise ImageError(
            f"{name} could not be decoded ({error}); it may be truncated. Fetch it again."
        ) from error


def _grey_of_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[-1] in (3, 4) and array.dtype == np.uint8:
        return np.asarray(Image.fromarray(array).convert("L"))
    if array.ndim == 3 and array.shape[-1] == 3 and array.dtype != object:
        return array.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ImageError(
            f"An array of shape {array.shape} and dtype {array.dtype} was given; a grey (H, W) or colour (H,"
            " W, 3) image of numbers was expected. Select one image and drop further axes."
        )
    return array.astype(np.uint8) if array.dtype.kind == "b" else array

"""Convert a radiograph in any usual format to the model's pixels.

    grey -> (v - min) / (max - min) * 255 -> uint8 -> shortest edge to S, bicubic -> centre crop S x S
         -> (v / 255 - mean) / std -> three equal channels

Accepts PIL images, numpy arrays, image files and DICOM files. EXIF orientation is applied, 16-bit and 32-bit images
keep their range until the min-max step, and fully transparent or masked pixels become background (the darkest value).
Boxes refer to the centre crop; `box_to_image` and `box_to_crop` map between it and the whole image.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from sae_lens_maira.errors import ImageError
from sae_lens_maira.maira2.dicom import (
    MAX_PIXELS,
    Decoded,
    check_dicom,
    decode_dicom,
    is_dicom,
    looks_like_dicom,
)
from sae_lens_maira.maira2.pictures import grey_of_array, grey_of_pil

ImageSource = Any
"""A PIL image, a numpy array `(H, W)` or `(H, W, 3)`, or the path of an image or DICOM file."""
MAX_RATIO = 10
"""Largest ratio of an image's sides; resizing the short side of a narrow strip would make a huge image."""


@dataclass(frozen=True)
class ImageRecipe:
    """Parameters of image preprocessing, from a checkpoint's `preprocessor_config.json`.

    Args:
        size: Length of the shortest edge after resizing, in pixels.
        crop: Side of the centre crop, in pixels.
        mean: Mean per channel, subtracted after division by 255.
        std: Standard deviation per channel, the divisor.
        resample: PIL resampling filter; 3 is bicubic.
    """

    size: int = 518
    crop: int = 518
    mean: tuple[float, float, float] = (0.5307, 0.5307, 0.5307)
    std: tuple[float, float, float] = (0.2583, 0.2583, 0.2583)
    resample: int = 3

    def to_pixels(self, image: ImageSource) -> torch.Tensor:
        """Convert one image to the model's pixels, `(3, crop, crop)` float32.

        Raises:
            ImageError: The image cannot be read, is empty or not finite, or has no contrast.
        """
        grey = self.crop_square(Image.fromarray(read_stretched(image)))
        levels = np.asarray(grey)
        # Only 256 values are possible: normalise a table of them and look pixels up.
        table = (np.arange(256, dtype=np.float32)[None] / np.float32(255) - _column(self.mean)) / _column(
            self.std
        )
        if len(set(self.mean)) == 1 and len(set(self.std)) == 1:
            return torch.from_numpy(table[0].astype(np.float32)[levels]).expand(3, -1, -1).contiguous()
        return torch.from_numpy(table.astype(np.float32)[:, levels])

    def crop_square(self, image: Image.Image) -> Image.Image:
        """Resize the shortest edge to `size` and crop the centre square."""
        width, height = image.size
        new_width, new_height = resized_size(width, height, self.size)
        if (new_width, new_height) != (width, height):
            image = image.resize((new_width, new_height), Image.Resampling(self.resample))
        if (new_width, new_height) == (self.crop, self.crop):
            return image
        left, top = (new_width - self.crop) // 2, (new_height - self.crop) // 2
        return image.crop((left, top, left + self.crop, top + self.crop))


def read_grey(image: ImageSource) -> np.ndarray:
    """Read an image as a `(H, W)` grey array in its original range (integers or float64); dense tissue is bright.

    Raises:
        ImageError: The file or array is not a readable single image, or is far too large or narrow.
    """
    return _decoded(image).values


def read_stretched(image: ImageSource) -> np.ndarray:
    """Compute `stretch_contrast(read_grey(image))`, without a float array for DICOM files of at most 16 bits.

    Raises:
        ImageError: As `read_grey` and `stretch_contrast`.
    """
    codes, levels = _decoded(image)
    if levels is None:
        return stretch_contrast(codes)
    used = levels[np.bincount(codes.ravel(), minlength=len(levels)) > 0]
    low, high = _contrast(used)
    return ((np.clip(levels, low, high) - low) / (high - low) * 255).astype(np.uint8)[codes]


def check_image(path: Path) -> int:
    """Open an image or DICOM file and read only its header.

    Returns:
        Largest number of bytes that decoding takes, so that parallel readers can bound their memory.

    Raises:
        ImageError: There is no such file, it is not an image, or it is far too large or narrow.
    """
    if is_dicom(path):
        rows, columns = check_dicom(path)
        pixel_bytes = 12
    else:
        try:
            with Image.open(path) as image:
                (columns, rows), pixel_bytes = image.size, 20 if image.mode.startswith(("I", "F")) else 8
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:
            if not looks_like_dicom(path):
                raise _unreadable(path, error) from error
            (rows, columns), pixel_bytes = check_dicom(path), 12
    _check_size(rows, columns, str(path))
    return rows * columns * pixel_bytes + path.stat().st_size


def _decoded(image: ImageSource) -> Decoded:
    if isinstance(image, str | os.PathLike):
        name, decoded = str(image), _read_file(Path(image))
    elif isinstance(image, Image.Image):
        _check_size(image.height, image.width, "the PIL image")
        name, decoded = "the PIL image", Decoded(grey_of_pil(image, "the PIL image"), None)
    elif isinstance(image, np.ndarray):
        name, decoded = "the array", Decoded(grey_of_array(image), None)
    else:
        raise ImageError(
            f"An image of type {type(image).__name__} was given; a PIL image, a numpy array or the path of a"
            " image or DICOM file was expected. Convert it to one of these."
        )
    if decoded.codes.size:
        _check_size(decoded.codes.shape[0], decoded.codes.shape[1], name)
    return decoded


def _check_size(rows: int, columns: int, name: str) -> None:
    """Refuse sizes that a radiograph cannot have, before decoding or resizing."""
    if rows * columns > MAX_PIXELS:
        raise ImageError(
            f"{name} has {columns} x {rows} pixels; at most {MAX_PIXELS:,} are decoded. Make a smaller copy, or leave"
            " the study out."
        )
    if max(rows, columns) > MAX_RATIO * max(min(rows, columns), 1):
        raise ImageError(
            f"{name} has {columns} x {rows} pixels; a radiograph with sides of at most 1 : {MAX_RATIO} was expected."
            " Check the file, or leave the study out."
        )


def stretch_contrast(grey: np.ndarray) -> np.ndarray:
    """Map the darkest value to 0 and the brightest to 255, truncated to uint8.

    Raises:
        ImageError: The image is empty, not finite, or constant.
    """
    low, high = _contrast(grey)
    if grey.dtype in (np.uint8, np.uint16):
        # Few possible values: stretch a table of them and look pixels up, which gives the same numbers in a tenth of
        # the time.
        table = np.arange(int(np.iinfo(grey.dtype).max) + 1, dtype=np.float64)
        return ((np.clip(table, low, high) - low) / (high - low) * 255).astype(np.uint8)[grey]
    stretched = np.empty(grey.shape, dtype=np.uint8)
    for start in range(0, len(grey), 256):  # in strips, so that no second float array is needed
        strip = grey[start : start + 256].astype(np.float64)
        stretched[start : start + 256] = (strip - low) / (high - low) * 255
    return stretched


def _contrast(grey: np.ndarray) -> tuple[float, float]:
    """Darkest and brightest value. Raises ImageError if there is no pixel, no finite value or no contrast."""
    if grey.size == 0:
        raise ImageError(f"The image has shape {grey.shape} and has no pixels; give an image with pixels.")
    low, high = grey.min(), grey.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError(
            "The image contains values that are not finite; replace NaN and infinity before encoding."
        )
    if low == high:
        raise ImageError(
            f"The image is constant (every pixel is {low}), so its contrast cannot be stretched to 0..255. A"
            " radiograph was expected; check the file, or leave the study out."
        )
    return float(low), float(high)


def resized_size(width: int, height: int, shortest: int) -> tuple[int, int]:
    """Width and height after scaling the shortest edge to `shortest`; the other edge is rounded down."""
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
    """Map a box from the whole image (0..1) to the centre square crop, clipped; None if it is outside."""
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


def _read_file(path: Path) -> Decoded:
    if not path.is_file():
        raise ImageError(f"There is no image file at {path}. Check the path in the study record.")
    if is_dicom(path):
        return decode_dicom(path)
    try:
        with Image.open(path) as image:
            _check_size(image.height, image.width, str(path))
            return Decoded(grey_of_pil(image, str(path)), None)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ImageError):
            raise
        if isinstance(error, UnidentifiedImageError) and looks_like_dicom(path):
            return decode_dicom(path)
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ImageError:
    if path.stat().st_size == 0:
        return ImageError(f"{path} could not be read as an image: it is empty (0 bytes). Copy it again.")
    unknown = isinstance(error, UnidentifiedImageError)
    cause = (
        "it is not a PNG, JPEG, TIFF, WebP or DICOM file"
        if unknown
        else f"{error}; it is cut short or damaged"
    )
    return ImageError(
        f"{path} could not be read as an image: {cause}. Replace the file or leave the study out."
    )


LabelledBox = tuple[str, float, float, float, float]


def centre_crop(
    image: ImageSource, boxes: Sequence[LabelledBox], side: int
) -> tuple[Image.Image, tuple[LabelledBox, ...]]:
    """Crop the centre square of an image, the part that the model sees, and convert its boxes.

    Args:
        image: A whole image, or an existing crop (which is not cropped again).
        boxes: (finding, x_min, y_min, x_max, y_max) in 0..1 of `image`.
        side: Largest side in pixels; smaller images are not enlarged.

    Returns:
        The grey square and the boxes in 0..1 of it; boxes outside are left out.
    """
    grey = Image.fromarray(stretch_contrast(read_grey(image)).astype("uint8"))
    moved = [(b[0], box_to_crop((b[1], b[2], b[3], b[4]), grey.width, grey.height)) for b in boxes]
    edge = min(grey.size)
    left, top = (grey.width - edge) // 2, (grey.height - edge) // 2
    square = grey.crop((left, top, left + edge, top + edge))
    if edge > side:
        square = square.resize((side, side), Image.Resampling.LANCZOS)
    return square, tuple((name, *box) for name, box in moved if box is not None)

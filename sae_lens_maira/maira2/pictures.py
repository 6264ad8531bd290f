"""Read grey values of image files and arrays, in their original range.

Corrects errors of Pillow's conversion to "L": 16-bit images are not clipped, 16-bit colour keeps both bytes, TIFF files
whose white is zero are inverted, unsigned 32-bit values stay positive, EXIF orientation is applied, and fully
transparent or masked pixels become background (the darkest visible value).
"""

import os
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from sae_lens_maira.errors import ImageError

LUMINANCE = (0.299, 0.587, 0.114)
PHOTOMETRIC, WHITE_IS_ZERO, BITS, SAMPLE_FORMAT = 262, 0, 258, 339  # TIFF tags
ORIENTATION = 0x0112  # EXIF tag
# Layouts that Pillow can decode but does not list: big-endian 16-bit with white at zero and unsigned 32-bit, and
# little-endian unsigned 32-bit with white at zero.
for _key, _mode in {
    (b"MM", 0, (1,), 1, (16,), ()): ("I;16B", "I;16B"),
    (b"MM", 1, (1,), 1, (32,), ()): ("I", "I;32BS"),
    (b"MM", 0, (1,), 1, (32,), ()): ("I", "I;32BS"),
    (b"II", 0, (1,), 1, (32,), ()): ("I", "I;32S"),
}.items():
    TiffImagePlugin.OPEN_INFO.setdefault(_key, _mode)


def grey_of_pil(image: Image.Image, name: str) -> np.ndarray:
    """Read the grey values `(H, W)` of a PIL image, upright.

    Args:
        image: Image; it need not be loaded yet.
        name: Name for the error message.

    Raises:
        ImageError: The image has several frames, cannot be decoded, or has 16 bits per colour in a format other than
            PNG.
    """
    if getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"{name} has {getattr(image, 'n_frames', 1)} frames; give a single image.")
    try:
        grey, hidden = _grey_and_hidden(image, name)
        # Only after decoding: Pillow then has turned TIFF files upright and deleted the tag.
        orientation = image.getexif().get(ORIENTATION, 1)
    except OSError as error:
        raise ImageError(
            f"{name} could not be read: it is cut short or damaged ({error}). Replace the file."
        ) from error
    if hidden is not None and hidden.any() and not hidden.all():
        grey = np.where(hidden, grey[~hidden].min(), grey)
    return _upright(grey, int(orientation))


def _upright(grey: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1 to 8); other numbers count as upright."""
    if orientation in (2, 3):
        grey = grey[:, ::-1]
    if orientation in (3, 4):
        grey = grey[::-1]
    if orientation in (5, 6, 7, 8):
        grey = grey.T
        grey = grey[:, ::-1] if orientation in (6, 7) else grey
        grey = grey[::-1] if orientation in (7, 8) else grey
    return np.ascontiguousarray(grey)


def _grey_and_hidden(image: Image.Image, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey values, and the mask of fully transparent pixels (None if the image has no transparency)."""
    deep = _sixteen_bit_colour(image, name)
    if deep is not None:
        opaque = deep[..., -1] if deep.shape[-1] in (2, 4) else None
        grey = deep[..., 0].astype(np.float64) if deep.shape[-1] == 2 else luminance(deep)
        return grey, None if opaque is None else opaque == 0
    tags = getattr(image, "tag_v2", {})
    if tags.get(ORIENTATION, 1) in (5, 6, 7, 8):
        # Pillow maps uncompressed files to memory with width and height exchanged, which gives wrong pixels.
        image.filename = ""  # pyright: ignore[reportAttributeAccessIssue] - without a name nothing is mapped
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        if image.mode == "I" and tags.get(SAMPLE_FORMAT, (1,))[0] == 1 and tags.get(BITS, (0,))[0] == 32:
            values = values.view(np.uint32)  # Pillow reads unsigned 32-bit TIFF files as signed
        key = image.info.get("transparency")
        hidden = values == key if isinstance(key, int) else None
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            values = values.max() - values + values.min()
        return values, hidden
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "LA" else image.convert("RGBA")
        hidden = np.asarray(image.getchannel("A")) == 0
        return np.asarray(image.convert("RGB" if image.mode == "RGBA" else "L").convert("L")), hidden
    return np.asarray(image.convert("L")), None


def _sixteen_bit_colour(image: Image.Image, name: str) -> np.ndarray | None:
    """All 16 bits of a grey-alpha or colour image, `(H, W, 2..4)`; None for other images.

    Pillow keeps only the upper byte of each sample. The file is decoded a second time with a raw mode that yields the
    other byte; for grey-alpha, as 8-bit RGBA, whose pixels have the same four bytes.
    """
    tiles: Any = getattr(image, "tile", None)
    tile = tiles[0] if tiles else None
    raw = tile[3][0] if tile and isinstance(tile[3], tuple) else tile[3] if tile else None
    if tile is None or raw not in (
        "LA;16B",
        "RGB;16B",
        "RGBA;16B",
        "RGB;16L",
        "RGBA;16L",
        "RGB;16N",
        "RGBA;16N",
    ):
        return None
    source = getattr(image, "filename", "") or image.fp  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(source, str | os.PathLike) or image.format not in ("PNG", "TIFF"):
        raise ImageError(
            f"{name} has 16 bits per colour, which is read from PNG files only. Save it as a grey PNG."
        )
    if raw == "LA;16B":
        return _with_raw_mode(source, "RGBA", "RGBA").view(">u2").astype(np.uint16)
    if image.format == "TIFF" and tile[0] != "raw":
        raise ImageError(
            f"{name} is a compressed TIFF of 16 bits per colour. Save it as a grey or uncompressed file."
        )
    big = raw.endswith("B")
    other = _with_raw_mode(source, image.mode, f"{raw[:-1]}{'L' if big else 'B'}").astype(np.uint16)
    upper = np.asarray(image).astype(np.uint16)
    return (upper << 8) | other


def _with_raw_mode(source: Any, mode: str, raw: str) -> np.ndarray:
    """Decode an image with another raw mode, `(H, W, channels)` uint8."""
    with Image.open(source) as image:
        old = image.tile[0]
        image._mode = mode  # pyright: ignore[reportAttributeAccessIssue] - Pillow has no public way
        arguments = (raw, *old[3][1:]) if isinstance(old[3], tuple) else raw
        image.tile = [old._replace(args=arguments)]  # pyright: ignore[reportAttributeAccessIssue]
        return np.asarray(image)


def luminance(colour: np.ndarray) -> np.ndarray:
    """Luminance of `(H, W, 3 or 4)` RGB as float64, with the weights that Pillow uses."""
    return sum(colour[..., channel].astype(np.float64) * weight for channel, weight in enumerate(LUMINANCE))  # pyright: ignore[reportReturnType]


def grey_of_array(array: np.ndarray) -> np.ndarray:
    """Grey values of an array `(H, W)`, `(H, W, 1)`, RGB or RGBA; masked pixels become the darkest value.

    Raises:
        ImageError: The array has another shape, does not contain numbers, or is masked everywhere.
    """
    if isinstance(array, np.ma.MaskedArray):
        if np.ma.getmaskarray(array).all():
            raise ImageError(
                f"The array of shape {array.shape} is masked everywhere; give an image with pixels."
            )
        array = array.filled(array.min())
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[-1] == 4 and array.dtype.kind == "u":
        hidden = array[..., -1] == 0
        grey = grey_of_array(array[..., :3])
        return np.where(hidden, grey[~hidden].min(), grey) if hidden.any() and not hidden.all() else grey
    if array.ndim == 3 and array.shape[-1] == 3 and array.dtype == np.uint8:
        return np.asarray(Image.fromarray(array).convert("L"))
    if array.ndim == 3 and array.shape[-1] == 3 and array.dtype.kind in "iuf":
        return luminance(array)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ImageError(
            f"An array of shape {array.shape} and dtype {array.dtype} was given; a grey (H, W) or colour (H,"
            " W, 3) image of numbers was expected. Select one image and drop further axes."
        )
    return array.astype(np.uint8) if array.dtype.kind == "b" else array

"""Read a DICOM radiograph as the grey image that a viewer shows.

    stored values -> modality LUT or rescale -> VOI LUT or window -> inverted if MONOCHROME1
    padding values are excluded from this and become background, the darkest value of the image

A window or LUT that leaves no contrast (width 0, outside the data) is ignored with a warning. Colour files of one frame
are read as their luminance; files of several frames are refused. Pixels of at most 16 bits keep their stored values,
with a table of grey levels, so that no large float array is needed. Needs pydicom (the extra `dicom`).
"""

import logging
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_lens_maira.errors import ImageError
from sae_lens_maira.maira2.pictures import luminance

MAX_PIXELS = 100_000_000
"""Largest number of pixels that is decoded; the largest radiographs have about 25 million."""
MAX_INFLATED = 2 * MAX_PIXELS + (16 << 20)
"""Largest size in bytes of an inflated file: 16 bits per pixel, and other elements."""
DEFLATED = "1.2.840.10008.1.2.1.99"
logger = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """An image as codes and their levels.

    Args:
        codes: `(H, W)` array; uint16 if there are levels, else the grey values themselves.
        levels: float64 `(65536,)`, grey value of each code; None if the codes are the grey values.
    """

    codes: np.ndarray
    levels: np.ndarray | None

    @property
    def values(self) -> np.ndarray:
        """`(H, W)` grey values; dense tissue is bright."""
        return self.codes if self.levels is None else self.levels[self.codes]


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its magic bytes, or by its name if the preamble is missing."""
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


def looks_like_dicom(path: Path) -> bool:
    """Whether a file without the magic bytes has a DICOM header with an image; False without pydicom."""
    try:
        import pydicom

        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=["Rows", "Columns"])
        return bool(header.get("Rows")) and bool(header.get("Columns"))
    except Exception:  # no pydicom, or not DICOM: pydicom raises many types
        return False


def read_dicom(path: Path) -> np.ndarray:
    """Read the grey values `(H, W)` of a single-frame DICOM file; dense tissue is bright. Errors as `decode_dicom`."""
    return decode_dicom(path).values


def check_dicom(path: Path) -> tuple[int, int]:
    """Read rows and columns of a DICOM file from its header, without decoding.

    Raises:
        ImageError: Pydicom is missing, or the file is not DICOM, has no image or several frames, or is too large.
    """
    return _checked(_open(path, pixels=False), path)


def decode_dicom(path: Path) -> Decoded:
    """Decode a single-frame DICOM file.

    Raises:
        ImageError: Pydicom or a decoder is missing, or the file is damaged, too large, has several frames or no image.
    """
    dataset = _open(path, pixels=True)
    _checked(dataset, path)
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").strip().upper()
    if dataset.get("PhotometricInterpretation") != photometric:  # pydicom accepts upper case only
        dataset.PhotometricInterpretation = photometric
    try:
        stored = np.asarray(dataset.pixel_array)
        if photometric == "PALETTE COLOR":
            from pydicom.pixels.processing import apply_color_lut

            stored = apply_color_lut(stored, dataset)
        if stored.ndim == 3:
            return Decoded(luminance(stored), None)
        return _displayed(stored, dataset, photometric == "MONOCHROME1", path)
    except ImageError:
        raise
    except Exception as error:  # pydicom and its decoders raise many types
        raise ImageError(_reason(path, dataset, error)) from error


def _open(path: Path, pixels: bool) -> Any:
    try:
        import pydicom
        from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
    except ImportError as error:
        raise ImageError(
            f"{path} is a DICOM file and pydicom is not installed. Install it with"
            ' `pip install "sae-lens-maira[dicom]"`, or convert the file to PNG.'
        ) from error
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ImageError(f"{path} is empty (0 bytes). A DICOM file was expected; copy it again.")
    if _is_text(head):
        raise ImageError(
            f"{path} is a text file, not DICOM ({head[:40]!r}...). Check which file this should be."
        )
    _refuse_inflated(path)
    try:
        dataset: Any = pydicom.dcmread(path, force=True, stop_before_pixels=not pixels)
        if len(dataset) == 0:
            raise ValueError("no DICOM element was found")
        if "TransferSyntaxUID" not in dataset.file_meta:
            implicit, little = dataset.original_encoding
            explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    except Exception as error:  # pydicom raises many types
        raise ImageError(
            f"{path} could not be read as DICOM ({type(error).__name__}: {error}). It is damaged or another kind of"
            " file; check it with a DICOM viewer."
        ) from error
    return dataset


def _refuse_inflated(path: Path) -> None:
    """Raise ImageError if a deflated file inflates beyond the largest image; pydicom would inflate it in memory."""
    from pydicom.filereader import read_file_meta_info

    try:
        meta: Any = read_file_meta_info(path)
        deflated = meta.get("TransferSyntaxUID") == DEFLATED
        start = 144 + int(meta.get("FileMetaInformationGroupLength") or 0)
    except Exception:  # not a DICOM file with a preamble: pydicom raises many types
        return
    if not deflated:
        return
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file, suppress(zlib.error):  # damage is reported by pydicom
        file.seek(start)
        while size <= MAX_INFLATED and (piece := inflate.unconsumed_tail or file.read(1 << 20)):
            size += len(inflate.decompress(piece, 1 << 20))
    if size > MAX_INFLATED:
        raise ImageError(
            f"{path} inflates to more than {MAX_INFLATED:,} bytes; no radiograph is that large. Leave the study out."
        )


def _is_text(head: bytes) -> bool:
    return b"\0" not in head and all(byte in b"\t\n\r\f\x1b" or byte >= 32 for byte in head)


def _checked(dataset: Any, path: Path) -> tuple[int, int]:
    try:
        rows, columns, frames = (int(dataset.get(tag) or 0) for tag in ("Rows", "Columns", "NumberOfFrames"))
    except (TypeError, ValueError) as error:
        raise ImageError(
            f"{path} has a damaged header: its number of rows, columns or frames is not a number ({error}). Copy it"
            " again from its source."
        ) from error
    if rows * columns == 0:
        kind = getattr(dataset.get("SOPClassUID"), "name", "") or "of unknown class"
        raise ImageError(f"{path} is a DICOM file without an image ({kind}). Leave it out of the table.")
    if rows * columns > MAX_PIXELS:
        raise ImageError(
            f"{path} has {columns} x {rows} pixels; at most {MAX_PIXELS:,} are decoded. A radiograph was expected; make"
            " a smaller copy, or leave the study out."
        )
    if frames > 1:
        raise ImageError(
            f"{path} has {frames} frames; a single frame was expected. Save one frame as a file."
        )
    return rows, columns


def _reason(path: Path, dataset: Any, error: Exception) -> str:
    syntax = getattr(dataset.file_meta.get("TransferSyntaxUID"), "name", "unknown transfer syntax")
    message = str(error)
    if "missing dependencies" in message or "No module" in message:
        return (
            f"{path} is compressed as {syntax} and no installed decoder reads it. Install the decoders with"
            ' `pip install "sae-lens-maira[dicom]"`, or convert the file to PNG.'
        )
    if "decode" in message.lower() or "decompress" in message.lower():
        return (
            f"{path} is compressed as {syntax} and could not be decoded ({message.splitlines()[0][:160]}). The file is"
            " damaged or cut short, or uses a variant that the decoders do not know; convert it to PNG elsewhere."
        )
    if "PixelData" in message or "pixel data" in message.lower():
        return (
            f"{path} has a header of {dataset.get('Columns')} x {dataset.get('Rows')} pixels, but its pixel data is"
            f" missing or does not have that size ({message.splitlines()[0][:160]}). The file is cut short or damaged;"
            " copy it again from its source."
        )
    return f"{path} could not be read as a DICOM image ({type(error).__name__}: {message.splitlines()[0][:160]})."


def _displayed(stored: np.ndarray, dataset: Any, inverted: bool, path: Path) -> Decoded:
    """Codes and grey levels of stored values."""
    if stored.dtype.itemsize <= 2 and stored.dtype.kind in "iu":
        codes = stored.astype(np.int16 if stored.dtype.kind == "i" else np.uint16, copy=False).view(np.uint16)
        possible = np.arange(65536, dtype=np.uint16)
        values = possible.view(np.int16) if stored.dtype.kind == "i" else possible
        used = np.bincount(codes.ravel(), minlength=65536) > 0
    else:
        codes, values, used = None, stored, np.ones(stored.shape, dtype=bool)
    padding = _padding(values, dataset)
    shown = used & ~padding
    if not shown.any():
        raise ImageError(f"{path} contains only padding (PixelPaddingValue). Leave the study out.")
    levels = _voi(_modality(values.astype(np.float64), dataset), shown, dataset, path)
    low, high = levels[shown].min(), levels[shown].max()
    if inverted:
        levels = low + high - levels
    levels = np.where(padding, low, np.clip(levels, low, high))  # for codes that occur
    return Decoded(levels, None) if codes is None else Decoded(codes, levels)


def _padding(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Mask of the stored values that are padding, by PixelPaddingValue and PixelPaddingRangeLimit."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if value is None:
        return np.zeros(values.shape, dtype=bool)
    low, high = sorted((_signed(value, values), _signed(value if limit is None else limit, values)))
    return (values >= low) & (values <= high)


def _signed(value: Any, values: np.ndarray) -> int:
    """Convert a tag's value to the signedness of the stored values; some writers store -2000 as 63536."""
    number = int(value)
    return (
        number - 65536
        if values.dtype.kind == "i" and number > 32767 and values.dtype.itemsize <= 2
        else number
    )


def _modality(values: np.ndarray, dataset: Any) -> np.ndarray:
    sequence = dataset.get("ModalityLUTSequence")
    if sequence:
        return _looked_up(values, sequence[0], values.min() < 0)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None and intercept is None:
        return values
    return values * float(1 if slope is None else slope) + float(intercept or 0)


def _voi(values: np.ndarray, shown: np.ndarray, dataset: Any, path: Path) -> np.ndarray:
    """Apply the VOI LUT, else the first window; values are unchanged if that would leave no contrast."""
    low, high = values[shown].min(), values[shown].max()
    sequence = dataset.get("VOILUTSequence")
    if sequence:
        result = _looked_up(values, sequence[0], bool(low < 0))
        name = "the VOI LUT"
    else:
        center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
        if center is None or width is None:
            return values
        function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
        name = f"WindowCenter {center:g}, WindowWidth {width:g}"
        if not (np.isfinite(center) and np.isfinite(width)) or width < (1 if function == "LINEAR" else 1e-9):
            logger.warning("%s: the window (%s) is not valid and is ignored.", path, name)
            return values
        result = _windowed(values, center, width, function)
    if result[shown].min() == result[shown].max() and low < high:
        logger.warning(
            "%s: %s leaves no contrast in the data (%g to %g) and is ignored.", path, name, low, high
        )
        return values
    return result


def _windowed(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Apply a window (DICOM PS3.3, C.11.2.1); values are in 0..1."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0, 1)
    if width == 1:
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def _looked_up(values: np.ndarray, item: Any, signed: bool) -> np.ndarray:
    """Look values up in a LUT sequence item; values beyond its ends take the first and last entries."""
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = entries or 65536
    first = first - 65536 if signed and first > 32767 else first
    data = item.LUTData
    if isinstance(data, bytes):
        table = np.frombuffer(data, dtype=np.uint8 if len(data) == entries else "<u2")
    else:
        table = np.asarray(data if isinstance(data, list | tuple) or hasattr(data, "__len__") else [data])
    del bits  # the range of the output does not matter to the contrast stretch
    index = np.clip(np.floor(values) - first, 0, min(entries, len(table)) - 1).astype(np.int64)
    return table.astype(np.float64)[index]


def _first(value: Any) -> float | None:
    """First number of a tag with one or several values; None if it is missing or empty."""
    if value is None or value == "":
        return None
    values = value if not isinstance(value, str | int | float) and hasattr(value, "__iter__") else [value]
    return next((float(number) for number in values), None)

"""Real DICOM files against a rendering written after the standard (PS3.3, C.7.6.3, C.7.9 and C.11).

Every file of pydicom's own test set and of pydicom-data is either equal to it, or refused with a sentence that is true.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from sae_lens_maira.errors import ImageError
from sae_lens_maira.maira2.images import read_grey, read_stretched

pytestmark = pytest.mark.compat

DECODERS = find_spec("libjpeg") is not None and find_spec("openjpeg") is not None
# Counted once over all files of pydicom 3.0.2 and pydicom-data 1.0.0, with the decoders of the extra `dicom`.
EXPECTED_EQUAL, EXPECTED_REFUSED = 100, 47


def real_files() -> list[Path]:
    """All test files of both packages, without the ones that pydicom would download."""
    paths = set((Path(pydicom.data.__file__).parent / "test_files").rglob("*.dcm"))
    spec = find_spec("data_store")
    if spec is not None and spec.submodule_search_locations:
        paths |= set((Path(spec.submodule_search_locations[0]) / "data").glob("*.dcm"))
    return sorted(paths, key=lambda path: (path.name, str(path)))


def entries(item: Dataset) -> tuple[np.ndarray, int]:
    """The table of a LUT item and the first value that it maps."""
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = count or 65536
    data = item["LUTData"].value
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if len(data) >= 2 * count else "u1")
    assert bits in range(8, 17)
    return np.asarray(data, dtype=float)[:count], first


def through(table: np.ndarray, first: int, values: np.ndarray) -> np.ndarray:
    shown = np.empty(values.shape)
    shown[values < first] = table[0]
    shown[values >= first + len(table) - 1] = table[-1]
    inside = (values >= first) & (values < first + len(table) - 1)
    shown[inside] = table[(values[inside] - first).astype(int)]
    return shown


def expanded(raw: bytes, count: int, words_as: str) -> np.ndarray:
    """A segmented palette (C.7.9.2): discrete segments and linear ones from the last value."""
    words = np.frombuffer(raw, words_as).tolist()
    table: list[float] = []
    while words:
        kind, length = words[:2]
        assert kind in (0, 1)
        if kind == 0:
            table += words[2 : 2 + length]
            words = words[2 + length :]
        else:
            table += np.round(np.linspace(table[-1], words[2], length + 1)[1:]).tolist()
            words = words[3:]
    assert len(table) == (count or 65536)
    return np.asarray(table, dtype=float)


def rendered(data: Any) -> np.ndarray:
    """0..1 as displayed: the darkest shown value 0, the brightest 1, padding 0."""
    if "TransferSyntaxUID" not in data.file_meta:
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" + ("" if data.original_encoding[0] else ".1")
    stored = data.pixel_array
    photometric = data.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        channels = []
        for colour in ("Red", "Green", "Blue"):
            count, first, bits = data[f"{colour}PaletteColorLookupTableDescriptor"].value
            words_as = "u1" if bits == 8 else "<u2" if data.original_encoding[1] else ">u2"
            if f"Segmented{colour}PaletteColorLookupTableData" in data:
                table = expanded(data[f"Segmented{colour}PaletteColorLookupTableData"].value, count, words_as)
            else:
                raw = data[f"{colour}PaletteColorLookupTableData"].value
                table = np.frombuffer(raw, words_as).astype(float)
            channels.append(table[np.clip(stored.astype(int) - first, 0, (count or 65536) - 1)])
        stored = np.stack(channels, -1)
    if stored.ndim == 3:
        red, green, blue = (stored[..., channel].astype(float) for channel in range(3))
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        return (grey - grey.min()) / (grey.max() - grey.min())
    values = stored.astype(float)
    padding = np.zeros(values.shape, dtype=bool)
    if "PixelPaddingValue" in data:
        low = high = int(data.PixelPaddingValue)
        if "PixelPaddingRangeLimit" in data:
            low, high = sorted((low, int(data.PixelPaddingRangeLimit)))
        padding = (values >= low) & (values <= high)
    if "ModalityLUTSequence" in data:
        values = through(*entries(data.ModalityLUTSequence[0]), values)
    elif "RescaleSlope" in data:
        values = values * float(data.RescaleSlope) + float(data.RescaleIntercept)
    plain = values
    if data.get("VOILUTSequence"):
        values = through(*entries(data.VOILUTSequence[0]), values)
    elif data.get("WindowWidth") not in (None, ""):
        center, width = (
            float(value[0]) if not isinstance(value, str | float | int) else float(value)
            for value in (data.WindowCenter, data.WindowWidth)
        )
        below = values <= center - 0.5 - (width - 1) / 2
        above = values > center - 0.5 + (width - 1) / 2
        between = ~below & ~above
        values = np.where(above, 1.0, 0.0)
        values[between] = (plain[between] - (center - 0.5)) / max(width - 1, 1) + 0.5
        if values[~padding].min() == values[~padding].max():
            values = plain
    shown = values[~padding]
    values = (values - shown.min()) / (shown.max() - shown.min())
    values = 1 - values if photometric == "MONOCHROME1" else values
    return np.where(padding, 0.0, values)


def verdict(path: Path) -> tuple[str, str]:
    """("equal" or "refused" or "WRONG", detail) of one file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            grey = read_grey(path)
            stretched = read_stretched(path) if grey.size < 1_000_000 else None
        except ImageError as error:
            return "refused", str(error)
        wanted = rendered(dcmread(path, force=True)) if "NoMeta" not in path.name else None
    if wanted is None:
        whole = path.with_name(path.name.replace("NoMeta", ""))
        wanted = rendered(dcmread(whole)) if whole.is_file() else (grey - grey.min()) / np.ptp(grey)
    span = (grey.astype(float) - grey.min()) / float(np.ptp(grey))
    if np.abs(span - wanted).max() > 1e-9:
        return "WRONG", f"values differ by {np.abs(span - wanted).max():.3g}"
    if stretched is None:  # the large ones are decoded once only
        return "equal", ""
    off = np.abs(stretched - np.clip(wanted, 0, 1) * 255)
    return ("equal", "") if off.max() <= 1 + 1e-6 else ("WRONG", "stretched differs")


def true_sentence(path: Path, sentence: str) -> bool:
    """Whether a refusal states what an inspection of the file finds."""
    try:
        data: Any = dcmread(path, force=True)
    except Exception:
        return "could not be read as DICOM" in sentence
    if "damaged header" in sentence:
        return not str(data.get("Rows")).isdigit() or not str(data.get("NumberOfFrames", 1)).isdigit()
    if "frames" in sentence:
        return int(data.get("NumberOfFrames") or 1) > 1
    if "without an image" in sentence:
        return not data.get("Rows")
    if "no installed decoder" in sentence:
        return data.file_meta.TransferSyntaxUID.is_compressed and not DECODERS
    if (
        "could not be decoded" in sentence
        or "cut short or damaged" in sentence
        or "could not be read" in sentence
    ):
        try:
            data.pixel_array  # noqa: B018
        except Exception:
            return True
        return False
    return "constant" in sentence or "padding" in sentence or "no DICOM element" in sentence


def test_every_real_file_is_equal_to_the_standard_or_refused_with_a_true_sentence() -> None:
    found = {path: verdict(path) for path in real_files()}
    wrong = {path.name: detail for path, (kind, detail) in found.items() if kind == "WRONG"}
    untrue = {
        path.name: text
        for path, (kind, text) in found.items()
        if kind == "refused" and not true_sentence(path, text)
    }
    assert not wrong
    assert not untrue
    equal = sum(kind == "equal" for kind, _ in found.values())
    if DECODERS:
        assert (equal, len(found) - equal) == (EXPECTED_EQUAL, EXPECTED_REFUSED)
    assert equal > 40

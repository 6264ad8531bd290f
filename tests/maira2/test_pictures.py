"""Pictures mean what their files say: orientation, depth, transparency, byte order, white at zero."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sae_lens_maira.errors import ImageError
from sae_lens_maira.maira2.images import check_image, read_grey, read_stretched, stretch_contrast

pytestmark = pytest.mark.compat

RAMP = np.arange(300, 300 + 24 * 30, dtype=np.uint16).reshape(24, 30)


def png(path: Path, samples: np.ndarray, colour: int) -> Path:
    """A 16-bit PNG written by hand, row filter "Sub": samples (H, W, channels), colour type 2, 4 or 6."""
    height, width = samples.shape[:2]
    step = 2 * samples.shape[2]
    lines = []
    for row in samples.astype(">u2").reshape(height, -1):
        raw = np.frombuffer(row.tobytes(), np.uint8).astype(np.int16)
        left = np.concatenate([np.zeros(step, np.int16), raw[:-step]])
        lines.append(b"\1" + ((raw - left) % 256).astype(np.uint8).tobytes())

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(lines))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def tiff(path: Path, values: np.ndarray, photometric: int, order: Any, sample_format: int = 1) -> Path:
    """An uncompressed grey TIFF written by hand; order "<" or ">"."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = values.dtype.itemsize * 8
    height, width = values.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample_format)]
    ifd = struct.pack(f"{order}H", len(tags))
    for tag, kind, value in tags:
        ifd += struct.pack(f"{order}HHI", tag, kind, 1)
        ifd += struct.pack(
            f"{order}HH" if kind == 3 else f"{order}I", *((value, 0) if kind == 3 else (value,))
        )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    path.write_bytes(head + data + ifd + b"\0" * 4)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """The eight ways a camera stores an upright picture (EXIF 2.3, tag 274): turn each back by hand."""
    upright = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
    stored = {
        1: upright,
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: upright.T,
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    for name in ("x.png", "x.tif"):
        image.save(tmp_path / name, exif=exif)
        assert np.array_equal(read_grey(tmp_path / name), upright), name
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert np.array_equal(read_grey(Image.open(buffer)), upright)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_byte_order_and_white_at_zero(tmp_path: Path, order: str, photometric: int, dtype: Any) -> None:
    values = (RAMP if dtype is np.uint16 else RAMP % 251).astype(dtype)
    path = tiff(tmp_path / "x.tif", values, photometric, order)
    wanted = stretch_contrast(values if photometric else values.max() - values)
    assert np.abs(read_stretched(path).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_thirty_two_bits_above_two_to_the_31(tmp_path: Path, order: str) -> None:
    values = RAMP.astype(np.uint32) * 4_000_000
    assert values.max() > 2**31
    assert np.array_equal(read_grey(tiff(tmp_path / "x.tif", values, 1, order)), values)
    signed = RAMP.astype(np.int32) - 500
    assert np.array_equal(read_grey(tiff(tmp_path / "y.tif", signed, 1, order, 2)), signed)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_and_grey_alpha_keep_their_range(
    tmp_path: Path, colour: int, channels: int
) -> None:
    """Values 300 to 1,019 have three upper bytes only; all 720 levels are kept."""
    samples = np.repeat(RAMP[..., None], channels, axis=2)
    if channels in (2, 4):
        samples[..., -1] = 65535
        samples[:3, :, -1] = 0
    grey = read_grey(png(tmp_path / "x.png", samples, colour))
    wanted = RAMP.astype(float)
    if channels in (2, 4):
        wanted[:3] = wanted[3:].min()
    assert np.abs(grey - wanted).max() < 1e-6


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "PA"])
def test_pixels_behind_full_transparency_are_background(tmp_path: Path, mode: str) -> None:
    grey = np.full((20, 20), 100, dtype=np.uint8)
    grey[:5] = 255  # bright, but not visible
    grey[10:] = np.arange(60, 80)
    alpha = np.full((20, 20), 255, dtype=np.uint8)
    alpha[:5] = 0
    image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    if mode == "P":
        palette = Image.fromarray(grey).convert("P")
        palette.info["transparency"] = 255
        palette.save(tmp_path / "x.png", transparency=255)
    elif mode == "PA":
        image.save(tmp_path / "x.png")
    else:
        image.convert(mode).save(tmp_path / "x.png")
    read = read_grey(tmp_path / "x.png")
    assert (read[:5] == 60).all()
    assert np.array_equal(read[5:], grey[5:])


def test_masked_arrays_and_rgba_arrays() -> None:
    masked = np.ma.masked_equal(RAMP.copy(), 300)
    masked[0] = np.ma.masked
    assert np.array_equal(read_grey(masked), np.maximum(RAMP, RAMP[1].min()))
    with pytest.raises(ImageError, match="masked everywhere"):
        read_grey(np.ma.masked_all((4, 4)))
    colour = np.repeat((RAMP % 251).astype(np.uint8)[..., None], 4, axis=2)
    colour[..., 3] = 255
    colour[0, :, 3] = 0
    assert np.array_equal(read_grey(colour)[1:], (RAMP % 251)[1:])
    assert (read_grey(colour)[0] == (RAMP % 251)[1:].min()).all()


def test_formats_without_a_suffix_and_webp(tmp_path: Path) -> None:
    grey = (RAMP % 251).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "radiograph", "PNG")
    assert np.array_equal(read_grey(tmp_path / "radiograph"), grey)
    Image.fromarray(grey).convert("RGB").save(tmp_path / "radiograph.webp", lossless=True)
    assert np.array_equal(read_grey(tmp_path / "radiograph.webp"), grey)


@pytest.mark.parametrize(("width", "height"), [(3000, 10), (10, 3000), (11, 1)])
def test_strips_are_refused_before_they_are_resized(tmp_path: Path, width: int, height: int) -> None:
    strip = Image.fromarray(
        np.arange(width * height, dtype=np.uint32).reshape(height, width).astype(np.uint8)
    )
    strip.save(tmp_path / "x.png")
    for source in (tmp_path / "x.png", strip, np.asarray(strip)):
        with pytest.raises(ImageError, match=f"{width} x {height} pixels"):
            read_stretched(source)
    with pytest.raises(ImageError, match=f"{width} x {height} pixels"):
        check_image(tmp_path / "x.png")


def test_what_decoding_takes_is_known_from_the_header(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "x.png")
    assert check_image(tmp_path / "x.png") >= RAMP.size * 8
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(ImageError, match="not a PNG, JPEG, TIFF, WebP or DICOM file"):
        check_image(tmp_path / "text.png")

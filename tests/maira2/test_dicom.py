"""DICOM radiographs: a real chest radiograph, inversion, windows, and files that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    generate_uid,
)

from sae_lens_maira.errors import ImageError
from sae_lens_maira.maira2 import ImageRecipe, Maira2, dicom, generate_reports
from sae_lens_maira.maira2.dicom import read_dicom
from sae_lens_maira.maira2.images import check_image, read_grey, read_stretched, stretch_contrast

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def radiograph() -> Path:
    """A computed radiograph of the chest, MONOCHROME1, from pydicom-data."""
    path = get_testdata_file("RG1_UNCR.dcm", download=False)
    assert isinstance(path, str)
    return Path(path)


def write_dicom(path: Path, pixels: np.ndarray, photometric: str = "MONOCHROME2", **tags: Any) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PixelRepresentation, data.HighBit = 1, 0, 15
    data.BitsAllocated = data.BitsStored = 16
    data.PhotometricInterpretation = photometric
    data.PixelData = pixels.astype(np.uint16).tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def test_the_real_radiograph_goes_through_processor_and_model(
    tiny: Maira2, radiograph: Path, make_study: Any
) -> None:
    study = make_study(frontal=radiograph, indication="Masses.")
    encoding = tiny.processor.encode(study)
    assert encoding.pixel_values is not None
    assert encoding.pixel_values.shape == (1, 3, 56, 56)
    assert encoding.pixel_values.std() > 0.5
    assert len(generate_reports(*tiny, study, max_new_tokens=2)) == 1


def test_the_real_radiograph_shows_air_dark_and_the_mediastinum_bright(radiograph: Path) -> None:
    """The file is MONOCHROME1: uninverted, the black corners next to the neck would be white."""
    pixels = ImageRecipe().to_pixels(radiograph)[0]
    corner, spine, lung = (
        pixels[:12, :12].mean(),
        pixels[200:300, 240:280].mean(),
        pixels[100:160, 330:370].mean(),
    )
    assert corner < lung < spine


def test_monochrome1_is_monochrome2_inverted(tmp_path: Path, make_picture: Any) -> None:
    pixels = make_picture(0).astype(np.uint16) * 16
    plain = read_dicom(write_dicom(tmp_path / "a.dcm", pixels))
    inverted = read_dicom(write_dicom(tmp_path / "b.dcm", pixels, "MONOCHROME1"))
    assert np.array_equal(plain, pixels)
    assert np.array_equal(inverted, pixels.max() + pixels.min() - plain)


def test_rescale_and_window_are_applied(tmp_path: Path) -> None:
    pixels = np.linspace(0, 4000, 64, dtype=np.uint16).reshape(8, 8)
    scaled = read_dicom(write_dicom(tmp_path / "a.dcm", pixels, RescaleSlope="2", RescaleIntercept="-100"))
    assert scaled == pytest.approx(pixels * 2.0 - 100)
    windowed = read_dicom(write_dicom(tmp_path / "b.dcm", pixels, WindowCenter="2000", WindowWidth="1000"))
    assert (windowed[pixels < 1500] == windowed.min()).all()
    assert (windowed[pixels > 2500] == windowed.max()).all()
    assert np.all(np.diff(windowed.ravel()) >= 0)


def test_dicom_is_known_by_its_magic_word_not_its_name(tmp_path: Path, make_picture: Any) -> None:
    path = write_dicom(tmp_path / "radiograph", make_picture(0).astype(np.uint16))
    assert ImageRecipe(size=56, crop=56).to_pixels(path).shape == (3, 56, 56)


@pytest.mark.parametrize("name", ["emri_small.dcm", "SC_rgb_2frame.dcm"])
def test_several_frames_are_refused(name: str) -> None:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    with pytest.raises(ImageError, match="a single frame was expected"):
        read_dicom(Path(path))


def test_damaged_files_are_refused_with_a_true_sentence(tmp_path: Path, radiograph: Path) -> None:
    (tmp_path / "cut.dcm").write_bytes(radiograph.read_bytes()[:200_000])
    (tmp_path / "text.dcm").write_text("not a radiograph")
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "noise.dcm").write_bytes(bytes(range(256)) * 8)
    report = get_testdata_file("reportsi.dcm", download=False)
    assert isinstance(report, str)
    for path, words in (
        (tmp_path / "cut.dcm", "cut short or damaged"),
        (tmp_path / "text.dcm", "is a text file, not DICOM"),
        (tmp_path / "empty.dcm", r"is empty \(0 bytes\)"),
        (tmp_path / "noise.dcm", "damaged or another kind|without an image"),
        (Path(report), "without an image"),
    ):
        with pytest.raises(ImageError, match=words) as refused:
            ImageRecipe().to_pixels(path)
        assert path.name in str(refused.value)
        assert "Fetch" not in str(refused.value)


@pytest.mark.parametrize("name", ["radiograph", "radiograph.dcm", "radiograph.ima"])
@pytest.mark.parametrize("syntax", [True, False])
def test_a_file_without_preamble_or_transfer_syntax_is_read(tmp_path: Path, name: str, syntax: bool) -> None:
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    whole = write_dicom(tmp_path / "whole.dcm", pixels)
    data = dcmread(whole)
    if not syntax:
        del data.file_meta.TransferSyntaxUID
    data.preamble = None
    data.save_as(tmp_path / name, implicit_vr=False, little_endian=True, enforce_file_format=False)
    bare = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(bare[132:] if bare[128:132] == b"DICM" else bare)
    assert np.array_equal(read_grey(tmp_path / name), pixels)
    assert check_image(tmp_path / name) > 0


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"WindowCenter": "2000", "WindowWidth": "0"}, "WindowCenter 2000, WindowWidth 0"),
        ({"WindowCenter": "2000", "WindowWidth": "-5"}, "is not valid"),
        ({"WindowCenter": "90000", "WindowWidth": "100"}, "leaves no contrast in the data"),
        ({"WindowCenter": "-90000", "WindowWidth": "100"}, "leaves no contrast in the data"),
    ],
)
def test_a_window_that_shows_nothing_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tags: dict[str, str], words: str
) -> None:
    pixels = np.linspace(100, 4000, 64, dtype=np.uint16).reshape(8, 8)
    assert np.array_equal(read_dicom(write_dicom(tmp_path / "x.dcm", pixels, **tags)), pixels)
    (record,) = caplog.records
    assert words in record.getMessage()
    assert "x.dcm" in record.getMessage()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2", "Monochrome1", "monochrome2 "])
@pytest.mark.parametrize("limit", [None, 5])
def test_padding_is_background_and_takes_no_part_in_the_scaling(
    tmp_path: Path, photometric: str, limit: int | None
) -> None:
    pixels = np.linspace(1000, 4000, 64, dtype=np.uint16).reshape(8, 8)
    pixels[0, :4] = 0
    pixels[0, 4:] = 5 if limit else 0
    tags = {"PixelPaddingValue": 0} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    stretched = read_stretched(write_dicom(tmp_path / "x.dcm", pixels, photometric, **tags))
    assert (stretched[0] == 0).all()
    body = pixels[1:].astype(float)
    wanted = (body - body.min()) / (body.max() - body.min()) * 255
    wanted = 255 - wanted if "1" in photometric else wanted
    assert np.abs(stretched[1:] - wanted).max() <= 1


def test_stretching_codes_equals_stretching_values(tmp_path: Path, radiograph: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4096, (40, 50)).astype(np.uint16)
    files = [
        radiograph,
        write_dicom(tmp_path / "a.dcm", pixels, "MONOCHROME1", WindowCenter="2000", WindowWidth="1500"),
    ]
    files += [
        write_dicom(
            tmp_path / "b.dcm", pixels, PixelPaddingValue=17, RescaleSlope="0.37", RescaleIntercept="-9"
        )
    ]
    for path in files:
        assert np.array_equal(read_stretched(path), stretch_contrast(read_grey(path)))


def test_an_image_far_too_large_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "x.dcm", np.zeros((8, 8), dtype=np.uint16))
    data = dcmread(path)
    data.Rows = data.Columns = 20_000
    data.save_as(path)
    for read in (read_grey, check_image):
        with pytest.raises(ImageError, match="20000 x 20000 pixels"):
            read(path)


def test_a_deflated_file_is_bounded_before_it_is_inflated(
    tmp_path: Path, make_picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 MB of zeros in 8 kB are refused at a bound of 1 MB; pydicom, which inflates all of it, never reads them."""
    sound = write_dicom(tmp_path / "x.dcm", make_picture(0))
    data = dcmread(sound)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(tmp_path / "sound.dcm", enforce_file_format=True)
    assert np.array_equal(read_grey(tmp_path / "sound.dcm"), read_grey(sound))
    data.add_new(0x00091001, "OB", bytes(8 << 20))
    data.save_as(tmp_path / "bomb.dcm", enforce_file_format=True)
    assert (tmp_path / "bomb.dcm").stat().st_size < 100_000
    monkeypatch.setattr(dicom, "MAX_INFLATED", 1 << 20)
    monkeypatch.setattr("pydicom.dcmread", lambda *_, **__: pytest.fail("inflated"))
    for read in (read_grey, check_image):
        with pytest.raises(ImageError, match=r"bomb.dcm inflates to more than 1,048,576 bytes"):
            read(tmp_path / "bomb.dcm")

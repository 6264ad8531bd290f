"""DICOM films: a real chest radiograph, inversion, windows, and files that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from sae_lens_maira.errors import ImageError
from sae_lens_maira.maira2 import ImageRecipe, Maira2, generate_reports
from sae_lens_maira.maira2.dicom import read_dicom

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def film() -> Path:
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


def test_the_real_film_goes_through_processor_and_model(tiny: Maira2, film: Path, make_study: Any) -> None:
    study = make_study(frontal=film, indication="Masses.")
    encoding = tiny.processor.encode(study)
    assert encoding.pixel_values is not None
    assert encoding.pixel_values.shape == (1, 3, 56, 56)
    assert encoding.pixel_values.std() > 0.5
    assert len(generate_reports(*tiny, study, max_new_tokens=2)) == 1


def test_the_real_film_shows_air_dark_and_the_mediastinum_bright(film: Path) -> None:
    """The file is MONOCHROME1: uninverted, the black corners beside the neck would be white."""
    pixels = ImageRecipe().to_pixels(film)[0]
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
    path = write_dicom(tmp_path / "film", make_picture(0).astype(np.uint16))
    assert ImageRecipe(size=56, crop=56).to_pixels(path).shape == (3, 56, 56)


@pytest.mark.parametrize("name", ["emri_small.dcm", "SC_rgb.dcm", "SC_rgb_2frame.dcm"])
def test_several_frames_and_colour_are_refused(name: str) -> None:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    with pytest.raises(ImageError, match="a single grey frame was expected"):
        read_dicom(Path(path))


def test_damaged_files_are_refused(tmp_path: Path, film: Path) -> None:
    (tmp_path / "cut.dcm").write_bytes(film.read_bytes()[:200_000])
    (tmp_path / "text.dcm").write_text("not a film")
    (tmp_path / "empty.dcm").write_bytes(b"")
    for name in ("cut.dcm", "text.dcm", "empty.dcm"):
        with pytest.raises(ImageError, match=f"{name} could not be read as a DICOM image"):
            ImageRecipe().to_pixels(tmp_path / name)

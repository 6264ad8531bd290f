"""Read a DICOM radiograph as the grey picture a viewer would show.

    stored values -> modality LUT or rescale -> VOI LUT or window -> inverted if MONOCHROME1

Needs pydicom (the extra `dicom`). Files of several frames and colour files are refused: MAIRA-2 reads single
radiographs. This module knows nothing about the model's image size or contrast step.
"""

from pathlib import Path
from typing import Any

import numpy as np

from sae_lens_maira.errors import ImageError


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its magic word, or by its name where the preamble is missing."""
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


def read_dicom(path: Path) -> np.ndarray:
    """Read a single-frame grey DICOM file as a `(H, W)` float64 array, bright meaning dense.

    Raises:
        ImageError: pydicom is missing, or the file is damaged, has several frames, or is not grey.
    """
    try:
        import pydicom
        from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
    except ImportError as error:
        raise ImageError(
            f"{path} is a DICOM file and pydicom is not installed. Install it with"
            ' `pip install "sae-lens-maira[dicom]"`, or convert the file to PNG.'
        ) from error
    try:
        dataset: Any = pydicom.dcmread(path, force=True)
        frames = int(dataset.get("NumberOfFrames") or 1)
        photometric = str(dataset.get("PhotometricInterpretation", "MONOCHROME2")).upper()
        if frames > 1 or not photometric.startswith("MONOCHROME"):
            raise ImageError(
                f"{path} has {frames} frames and photometric interpretation {photometric}; a single grey"
                " frame was expected. Extract one frame and save it as a grey picture."
            )
        pixels = np.asarray(apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset))
    except ImageError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds
        raise ImageError(
            f"{path} could not be read as a DICOM image ({type(error).__name__}: {error}). A whole file whose"
            " transfer syntax the installed decoders know was expected. Fetch it again, or convert it to"
            " PNG."
        ) from error
    pixels = pixels.astype(np.float64)
    if photometric == "MONOCHROME1":  # low values are shown bright there
        pixels = pixels.max() + pixels.min() - pixels
    return pixels

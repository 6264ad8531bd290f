"""Studies of a workbench: those it was started with, and images that were dropped on its page.

Requests read it from several threads. Dropped images stay in memory and count as credentialed; the oldest are removed
when there are more than 8, or when they take more than 1 GB.
"""

import io
import itertools
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae_lens_maira.attribution.page import radiograph_png
from sae_lens_maira.errors import ImageError, WorkbenchError
from sae_lens_maira.maira2.images import read_grey
from sae_lens_maira.privacy import is_shareable
from sae_lens_maira.steering.positions import VIEWS
from sae_lens_maira.studies import Licence, Study

UPLOADS = 8
UPLOAD_BYTES = 1 << 30


class Shelf:
    """Studies by id.

    Args:
        studies: Study id -> study.
        grid: Rows and columns of patches per image.
    """

    def __init__(self, studies: Mapping[str, Study], grid: tuple[int, int]) -> None:
        self._studies, self.grid = dict(studies), grid
        self._uploads: list[str] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def __iter__(self) -> Any:
        with self._lock:
            return iter(list(self._studies))

    def __getitem__(self, name: str) -> Study:
        with self._lock:
            found = self._studies.get(name)
        if found is None:
            raise WorkbenchError(f"There is no study {name!r} in this workbench. Choose one of the list.")
        return found

    def is_upload(self, name: str) -> bool:
        """Whether a study was dropped on the page."""
        with self._lock:
            return name in self._uploads

    def is_shareable(self, name: str) -> bool:
        """Whether a study's texts may be exported; False for a study that is gone."""
        with self._lock:
            found = self._studies.get(name)
        return found is not None and is_shareable(getattr(found.licence, "value", found.licence))

    def about(self, name: str) -> dict[str, Any]:
        """Sections, views and licence of one study."""
        study = self[name]
        return {
            "id": name,
            "licence": str(getattr(study.licence, "value", study.licence)),
            "shareable": self.is_shareable(name),
            "views": list(_images(study)),
            "indication": study.indication,
            "prior_report": study.prior_report,
            "upload": self.is_upload(name),
        }

    def grids(self, name: str) -> dict[str, list[int]]:
        """View -> [rows, columns] of patches."""
        return {view: list(self.grid) for view in _images(self[name])}

    def image(self, name: str, view: str) -> bytes:
        """One image as the model sees it (centre square, contrast stretched), as PNG."""
        found = _images(self[name]).get(view)
        if found is None:
            raise WorkbenchError(f"Study {name} has no {view} image.")
        return radiograph_png(found)

    def add(self, content: bytes, indication: str = "") -> str:
        """Add an image that was dropped on the page.

        Args:
            content: A picture or DICOM file. It is decoded in memory.
            indication: Why the image was taken.

        Returns:
            Id of the new study.

        Raises:
            ImageError: Not an image, or far too large.
        """
        pixels = _decoded_in_memory(content)
        with self._lock:
            name = f"upload-{next(self._numbers)}"
            self._studies[name] = Study(
                study_id=name,
                patient_id=name,
                frontal=pixels,
                indication=indication.strip() or None,
                licence=Licence.CREDENTIALED,
            )
            self._uploads.append(name)
            while len(self._uploads) > 1 and (len(self._uploads) > UPLOADS or self._bytes() > UPLOAD_BYTES):
                self._studies.pop(self._uploads.pop(0), None)
        return name

    def _bytes(self) -> int:
        held: list[Any] = [self._studies[name].frontal for name in self._uploads]
        return sum(pixels.nbytes for pixels in held)


def _images(study: Study) -> dict[str, Any]:
    images = (study.frontal, study.lateral, study.prior_frontal)
    return {view: image for view, image in zip(VIEWS, images, strict=True) if image is not None}


def _decoded_in_memory(content: bytes) -> np.ndarray:
    """Decode a picture or DICOM file without a file on a disk, where the system has files in memory."""
    if not hasattr(os, "memfd_create"):
        from PIL import Image, UnidentifiedImageError

        try:
            return read_grey(Image.open(io.BytesIO(content)))
        except (UnidentifiedImageError, OSError) as error:
            raise ImageError(
                f"The dropped file is not a picture ({error}). On this system DICOM files are opened from a table: "
                "start with --table FILE."
            ) from error
    descriptor = os.memfd_create("upload")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        return read_grey(Path(f"/proc/self/fd/{descriptor}"))
    except ImageError as error:
        raise ImageError(str(error).replace(f"/proc/self/fd/{descriptor}", "The dropped file")) from None
    finally:
        os.close(descriptor)


__all__ = ["Shelf"]

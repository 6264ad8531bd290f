"""The page's radiographs: the centre crop that the model saw, in grey, one file per study and view.

Files are numbered, since a pseudonym may not be a file name; boxes move from the whole image into the crop. It knows
nothing about latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import atomic_file
from sae_lens_maira.latents.records import StudyInfo
from sae_lens_maira.latents.study_info import centre_crop

SIDE = 518


@dataclass(frozen=True)
class ShownStudy:
    """Image files by view, relative to the page, and boxes in 0..1 of the frontal crop."""

    paths: dict[str, str]
    boxes: tuple[tuple[str, float, float, float, float], ...]


class ImageFolder:
    """Copies every study once, when it is first asked for; several processes may copy into one folder."""

    def __init__(self, folder: Path, root: Path, studies: Sequence[str]) -> None:
        """Remember where images lie and what number each study's files have: its place among `studies`."""
        self.folder, self.root = folder, root
        self._number = {study: number for number, study in enumerate(studies)}
        self._shown: dict[str, ShownStudy] = {}

    def add(self, entry: StudyInfo) -> ShownStudy:
        """The study's images, written now if they are not there.

        Raises:
            RecordError: an image is missing.
        """
        if entry.study not in self._shown:
            self._shown[entry.study] = self._write(entry, self._number[entry.study])
        return self._shown[entry.study]

    def _write(self, entry: StudyInfo, number: int) -> ShownStudy:
        paths: dict[str, str] = {}
        boxes = entry.boxes
        for view, source in entry.images:
            path = self.root / source
            if not path.is_file():
                raise RecordError(
                    f"Study {entry.study} has a {view} image at {path}, which does not exist. Give the folder that "
                    "image paths are relative to (--image-root), or write the page without images (--images false)."
                )
            square, moved = centre_crop(path, entry.boxes if view == "frontal" else (), SIDE)
            boxes = moved if view == "frontal" else boxes
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{number:06d}-{view if view in ('frontal', 'lateral', 'prior') else 'other'}.png"
            if not (self.folder / name).exists():
                with atomic_file(self.folder / name, sync=False) as draft:
                    square.save(draft, format="PNG")
            paths[view] = f"{self.folder.name}/{name}"
        return ShownStudy(paths, boxes)

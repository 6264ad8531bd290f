"""Contexts of latents and the studies that they point to.

    (study, latent, place, value), 16 bytes, appended to the file of the latent's shard
    place >= 0: index of the shown token;    place < 0: patch -1 - place of the views one after another
    pseudonym = first 16 hex digits of SHA-256(salt, kind, id)

Activations of wanted latents are spooled to disk and then made into contexts. A study in which a latent never fires has
no entry. Memory holds one block when writing and one shard of latents when reading.

Credentialed studies never appear under their own id, and their images are not copied unless the caller asks for
it. Public and synthetic ones keep their ids, so that records can be traced to them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.records import Context, StudyInfo, StudyText
from sae_lens_maira.maira2 import Maira2Processor, TokenRole
from sae_lens_maira.maira2.images import ImageSource, box_to_crop, read_grey, stretch_contrast
from sae_lens_maira.maira2.prompts import VIEWS
from sae_lens_maira.maira2.reports import teacher_text
from sae_lens_maira.maira2.tokenization import append_reports, tokenize_prompts
from sae_lens_maira.privacy import is_shareable, private_files
from sae_lens_maira.studies import Study


class Pseudonyms:
    """Names of studies and patients; without a given salt a fresh one is drawn and kept nowhere."""

    def __init__(self, salt: str | None = None) -> None:
        self._salt = secrets.token_hex(16) if salt is None else salt

    def study(self, study: Study) -> str:
        return self._name(study, "study", study.study_id)

    def patient(self, study: Study) -> str:
        return self._name(study, "patient", study.patient_id)

    def _name(self, study: Study, kind: str, original: str) -> str:
        if is_shareable(study.licence):
            return original
        return hashlib.sha256(f"{self._salt}\0{kind}\0{original}".encode()).hexdigest()[:16]


LabelledBox = tuple[str, float, float, float, float]


def centre_crop(
    image: ImageSource, boxes: Sequence[LabelledBox], side: int
) -> tuple[Image.Image, tuple[LabelledBox, ...]]:
    """Crop the centre square of an image, which is what the model sees, and move its boxes.

    Args:
        image: A whole image, or a crop made before (which stays as it is).
        boxes: (finding, x_min, y_min, x_max, y_max) in 0..1 of `image`.
        side: largest side in pixels; smaller images are not enlarged.

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


def study_info(
    study: Study,
    names: Pseudonyms,
    findings: Sequence[str],
    labelled_by: str,
    images: tuple[tuple[str, str], ...],
) -> StudyInfo:
    """The entry of one study; boxes are those of its truth, in the crop where images are kept."""
    boxes = tuple(
        (finding.key, *finding.box)
        for finding in study.truth or ()
        if finding.present and finding.box is not None
    )
    if images and study.frontal is not None:
        boxes = centre_crop(study.frontal, boxes, side=1)[1]
    return StudyInfo(
        study=names.study(study),
        patient=names.patient(study),
        licence=study.licence.value,
        report=study.report,
        indication=study.indication,
        technique=study.technique,
        comparison=study.comparison,
        prior_report=study.prior_report,
        findings=tuple(findings),
        labelled_by=labelled_by,
        boxes=boxes,
        images=images,
        split=study.split,
    )


def save_images(study: Study, name: str, folder: Path, side: int) -> tuple[tuple[str, str], ...]:
    """Save a study's images as grey PNGs of at most `side` pixels, cropped as the model sees them.

    Args:
        study: Study with images.
        name: Its pseudonym.
        folder: Folder of the record set; the files go to `images/` in it.
        side: largest side in pixels.

    Returns:
        `(view, path relative to folder)`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    stem = hashlib.sha256(name.encode()).hexdigest()[:16]
    saved = []
    for view, image in zip(VIEWS, (study.frontal, study.lateral, study.prior_frontal), strict=True):
        if image is None:
            continue
        square, _ = centre_crop(image, (), side)
        path = f"images/{stem}-{view}.png"
        with private_files(folder):
            square.save(folder / path)
        saved.append((view, path))
    return tuple(saved)


ENTRY = np.dtype([("study", "<i4"), ("latent", "<i4"), ("place", "<i4"), ("value", "<f4")])
LATENTS_PER_SHARD = 256


class ActivationFiles:
    """Files of activations in one folder, written by one process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def append(self, entries: np.ndarray) -> None:
        """Append entries (n,) of `ENTRY`, in row order within each study."""
        shard = entries["latent"] // LATENTS_PER_SHARD
        order = np.argsort(shard, kind="stable")
        entries, shard = entries[order], shard[order]
        edges = np.r_[0, np.flatnonzero(np.diff(shard)) + 1, len(entries)]
        for start, stop in pairwise(edges.tolist()):
            if stop > start:
                with _path(self._folder, int(shard[start])).open("ab") as file:
                    file.write(entries[start:stop].tobytes())

    def sizes(self) -> dict[str, int]:
        """Bytes by file name: the argument of `cut`."""
        return {path.name: path.stat().st_size for path in self._folder.glob("activations-*")}

    def cut(self, sizes: dict[str, int]) -> None:
        """Drop what was appended since `sizes` were taken."""
        for path in self._folder.glob("activations-*"):
            with path.open("r+b") as file:
                file.truncate(sizes.get(path.name, 0))


Activations = dict[int, tuple[np.ndarray, np.ndarray]]
"""Study -> (n,) places and (n,) values of one latent's entries there, in row order."""


def read_activations(folders: Sequence[Path], latents: Sequence[int]) -> Iterator[tuple[int, Activations]]:
    """`(latent, its entries)` for ascending `latents`, one shard of latents in memory at a time.

    Args:
        folders: Folders of the processes that wrote them; no study was written by two.
        latents: ascending.
    """
    current, entries, starts = -1, np.zeros(0, ENTRY), np.zeros(1, dtype=np.int64)
    for latent in latents:
        if latent // LATENTS_PER_SHARD != current:
            current = latent // LATENTS_PER_SHARD
            paths = [_path(folder, current) for folder in folders]
            parts = [np.fromfile(path, ENTRY) for path in paths if path.is_file()]
            entries = np.concatenate([np.zeros(0, ENTRY), *parts])
            entries = entries[
                np.lexsort((entries["study"], entries["latent"]))
            ]  # stable: rows of a study keep their order
            numbers = np.arange(LATENTS_PER_SHARD + 1) + current * LATENTS_PER_SHARD
            starts = np.searchsorted(entries["latent"], numbers)
        place = latent - current * LATENTS_PER_SHARD
        own = entries[starts[place] : starts[place + 1]]
        edges = np.r_[0, np.flatnonzero(np.diff(own["study"])) + 1, len(own)]
        yield (
            latent,
            {
                int(own["study"][a]): (own["place"][a:b], own["value"][a:b])
                for a, b in pairwise(edges.tolist())
                if b > a
            },
        )


def _path(folder: Path, shard: int) -> Path:
    return folder / f"activations-{shard:05d}"


SHOWN = (
    TokenRole.INDICATION,
    TokenRole.TECHNIQUE,
    TokenRole.COMPARISON,
    TokenRole.PRIOR_REPORT,
    TokenRole.PHRASE,
    TokenRole.REPORT,
)
"""Roles whose tokens a context shows; others are shown where their activations were read."""


def study_text(
    processor: Maira2Processor, study: Study, rows: ActivationRows, grid: tuple[int, int], name: str
) -> StudyText:
    """Tokens of a study as its contexts show them, checked against the tokens that were read.

    Images are not opened.

    Args:
        processor: Processor of the model.
        study: Study with its report.
        rows: Activation rows of the study.
        grid: Rows and columns of patches.
        name: Pseudonym of the study.

    Raises:
        RecordError: The rows were read from another text.
    """
    tokenizer = processor.tokenizer
    prompt = processor.build_prompt(study)
    (row,) = append_reports(
        tokenizer,
        tokenize_prompts(tokenizer, [prompt], processor.image_token_id, processor.patches_per_side),
        [teacher_text(study, "findings", None)],
    )
    at, token = rows.position[~rows.is_image], rows.token[~rows.is_image]
    fits = (at < len(row.input_ids)) & (row.input_ids[np.minimum(at, len(row.input_ids) - 1)] == token)
    if not fits.all():
        raise RecordError(
            f"The rows of study {name} were read from another text than the study has now: {int((~fits).sum())} of "
            f"{len(at)} tokens differ, the first at position {int(at[~fits][0])}. Give the table that was harvested, "
            "or harvest it again."
        )
    read = np.zeros(len(row.input_ids), dtype=bool)
    read[at] = True
    special = np.isin(row.input_ids, tokenizer.all_special_ids)
    positions = np.flatnonzero((np.isin(row.roles, [int(role) for role in SHOWN]) & ~special) | read)
    present = (study.frontal, study.lateral, study.prior_frontal)
    plain = np.flatnonzero(~special[positions])
    return StudyText(
        study=name,
        tokens=tuple(spell(t) for t in tokenizer.convert_ids_to_tokens(row.input_ids[positions].tolist())),
        positions=tuple(positions.tolist()),
        roles=tuple(TokenRole(int(role)).name.lower() for role in row.roles[positions]),
        read=tuple(read[positions].tolist()),
        span=(int(plain[0]), int(plain[-1]) + 1) if len(plain) else (0, len(positions)),
        views=tuple((view, *grid) for view, image in zip(VIEWS, present, strict=True) if image is not None),
    )


def spell(token: str) -> str:
    """A SentencePiece token as readable text: its word mark a space, a byte its character where it is ASCII."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        code = int(token[3:5], 16)
        return chr(code) if code < 128 else token
    return token.replace("\u2581", " ")


def short(value: float) -> float:
    """Six significant digits: half the size of float32's exact decimals."""
    return float(f"{value:.6g}")


def places_of(rows: ActivationRows, text: StudyText, grid: tuple[int, int]) -> np.ndarray:
    """(n,) place of each of a study's rows, as described at the top of this module."""
    number = np.searchsorted(np.asarray(text.positions, dtype=np.int64), rows.position)
    patch = rows.view.astype(np.int64) * grid[0] * grid[1] + rows.patch_row.astype(np.int64) * grid[1]
    return np.where(rows.is_image, -1 - patch - rows.patch_col, number)


def make_context(
    texts: Mapping[str, StudyText], study: str, place: np.ndarray, value: np.ndarray, modality: str = "text"
) -> Context:
    """One latent's context in one study.

    The span shown is the whole text without special tokens at its ends, unless the latent fires at them.

    Args:
        texts: Source of the study's text.
        study: Pseudonym of the study.
        place: (n,) places of the latent's activations, in any order.
        value: (n,) activations there, above zero.
        modality: Modality of a context without activations.
    """
    text = texts[study]
    order = np.argsort(place, kind="stable")
    place, value = np.asarray(place)[order], np.asarray(value)[order]
    if len(value):
        modality = "image" if place[value.argmax()] < 0 else "text"
    first = int(np.searchsorted(place, 0))
    indices, number, strength = tuple(place[first:].tolist()), -1 - place[:first][::-1], value[:first][::-1]
    patches = []
    for view, rows, cols in text.views:
        low = VIEWS.index(view) * rows * cols
        here = slice(*np.searchsorted(number, [low, low + rows * cols]))
        patches.append(
            (tuple((number[here] - low).tolist()), tuple(short(v) for v in strength[here].tolist()))
        )
    start, end = text.span
    return Context(
        study=study,
        start=min((start, *indices[:1])),
        end=max((end, *(i + 1 for i in indices[-1:]))),
        modality=modality,
        token_indices=indices,
        token_values=tuple(short(v) for v in value[first:].tolist()),
        patches=tuple(patches),
        texts=texts,
    )

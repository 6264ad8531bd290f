"""Make the page's data for one latent: a compact form of its record, and the images of the shown studies.

    numbers     three significant digits
    roles       run-length encoded, [role, count]
    maps        activation maps, one character per patch, scaled to the map's maximum; patch numbers where few fire
    images      the centre crop that the model saw, in grey, one PNG per study and view

The data of a latent have a size limit: contexts that do not fit are dropped from the end of the longest list, and
counted. Image files are numbered, since a pseudonym may not be a valid file name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL.PngImagePlugin import PngInfo

from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.records import Interpretation, Score
from sae_lens_maira.io import atomic_file
from sae_lens_maira.latents.records import Context, LatentRecord, StudyInfo
from sae_lens_maira.privacy import image_path

IMAGE_SIDE = 518
VIEWS = ("frontal", "lateral", "prior")

# Printable ASCII characters that JSON and JavaScript do not escape.
ALPHABET = "".join(chr(code) for code in range(ord("#"), ord("~") + 1) if chr(code) not in "<\\")
_LETTERS = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)


def rounded(value: float | None, digits: int = 3) -> float | int | None:
    """Round to `digits` significant digits; whole numbers become integers."""
    if value is None:
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


@lru_cache(65536)
def readable(token: str) -> str:
    """Convert a vocabulary token to text: sentencepiece's mark becomes a space, its newline byte a newline."""
    return token.replace("▁", " ").replace("<0x0A>", "\n")


def levels(values: Sequence[float], top: float) -> str:
    """Encode every value as one character: `ALPHABET[0]` means no activation, the last character means `top`."""
    last = len(ALPHABET) - 1
    if top <= 0:
        return ALPHABET[0] * len(values)
    given = np.asarray(values, dtype=np.float64)
    number = np.where(given > 0, np.clip(np.rint(last * given / top), 1, last), 0).astype(np.intp)
    return _LETTERS[number].tobytes().decode("ascii")


def latent_page(
    record: LatentRecord,
    interpretations: Sequence[Interpretation],
    studies: dict[str, StudyInfo],
    images: ImageFolder | None,
    limit: int,
) -> dict[str, Any]:
    """Build the JSON of one record, at most `limit` bytes long.

    Raises:
        RecordError: A context refers to a study that the record set does not list, or no context fits.
    """
    lists = [
        [_context(c, studies) for c in record.top],
        *([_context(c, studies) for c in interval.contexts] for interval in record.intervals),
        [_context(c, studies) for c in record.zero],
    ]
    page: dict[str, Any] = {
        "latent": record.latent,
        "level": record.level,
        "status": record.status,
        "density": rounded(record.density),
        "max": rounded(record.max),
        "histogram": {
            "edges": [rounded(e) for e in record.histogram.edges],
            "counts": list(record.histogram.counts),
        },
        "firing": [_short(asdict(f)) | {"density": rounded(f.density)} for f in record.firing],
        "top_tokens": [[readable(t.token), t.token_id, rounded(t.weight)] for t in record.top_tokens],
        "bottom_tokens": [[readable(t.token), t.token_id, rounded(t.weight)] for t in record.bottom_tokens],
        "agreement": [_short(asdict(a)) for a in record.agreement],
        "neighbours": [[n.latent, n.relation, rounded(n.value)] for n in record.neighbours],
        "maps": [
            {
                "view": m.view,
                "rows": m.rows,
                "cols": m.cols,
                "studies": m.studies,
                "max": rounded(max(m.values, default=0.0)),
                "dense": levels(m.values, max(m.values, default=0.0)),
            }
            for m in record.maps
        ],
        "interpretations": [_interpretation(one) for one in interpretations],
        "alphabet": ALPHABET,
        "left_out": 0,
    }
    # 400 bytes per context and 2,000 in all are reserved for the studies' own entries.
    page["left_out"] = _drop_until_fits(lists, limit - _size(page) - 2_000)
    page["top"], page["zero"] = lists[0], lists[-1]
    page["intervals"] = [
        {
            "low": rounded(i.low),
            "high": rounded(i.high),
            "fraction": rounded(i.fraction),
            "contexts": contexts,
        }
        for i, contexts in zip(record.intervals, lists[1:-1], strict=True)
    ]
    shown = {context["study"] for contexts in lists for context in contexts}
    page["studies"] = {name: _study(studies[name], images) for name in sorted(shown)}
    return page


def _size(plain: Any) -> int:
    # "<" is escaped as six characters.
    text = json.dumps(plain, separators=(",", ":"))
    return len(text) + 5 * text.count("<")


def _drop_until_fits(lists: list[list[dict[str, Any]]], limit: int) -> int:
    """Drop contexts from the ends of the lists until the rest fits; return how many were dropped."""
    sizes = [[_size(context) + 400 for context in contexts] for contexts in lists]
    total, dropped = sum(map(sum, sizes)), 0
    while total > limit:
        longest = max(range(len(lists)), key=lambda i: (len(lists[i]), i))
        if not lists[longest]:
            raise RecordError(
                f"The numbers of one latent exceed its page by {total - limit} bytes before any context is added. "
                "Write the records with fewer findings, tokens or interpretations."
            )
        lists[longest].pop()
        total -= sizes[longest].pop()
        dropped += 1
    return dropped


def _context(context: Context, studies: dict[str, StudyInfo]) -> dict[str, Any]:
    if context.study not in studies:
        raise RecordError(
            f"A context refers to study {context.study!r}, which studies.jsonl does not list; the files belong to "
            "different record sets. Write the records again."
        )
    maps = []
    for one in context.maps:
        top = max(one.values, default=0.0)
        plain: dict[str, Any] = {"view": one.view, "rows": one.rows, "cols": one.cols, "max": rounded(top)}
        if 4 * len(one.patches) < one.rows * one.cols:
            plain |= {"patches": list(one.patches), "sparse": levels(one.values, top)}
        else:
            full = [0.0] * (one.rows * one.cols)
            for patch, value in zip(one.patches, one.values, strict=True):
                full[patch] = value
            plain["dense"] = levels(full, top)
        maps.append(plain)
    return {
        "study": context.study,
        "value": rounded(context.value),
        "modality": context.modality,
        "peak": context.peak,
        "patch": list(context.patch) if context.patch else None,
        "tokens": _readable(context.tokens),
        "roles": _runs(context.roles),
        "values": [
            rounded(value) if value else value if value is None else 0 for value in context.activations
        ],
        "maps": maps,
    }


@lru_cache(4096)
def _readable(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Readable tokens of a study; cached, since many latents show the same study."""
    return tuple(map(readable, tokens))


@lru_cache(4096)
def _runs(roles: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((role, len(list(run))) for role, run in groupby(roles))


def _study(entry: StudyInfo, images: ImageFolder | None) -> dict[str, Any]:
    """Make the page's entry of a study; boxes only together with the image, in coordinates of its crop."""
    shown = images.add(entry) if images is not None else None
    return {
        "findings": list(entry.findings),
        "labelled_by": entry.labelled_by,
        "licence": entry.licence,
        "images": dict(shown.paths) if shown else {},
        "boxes": [[box[0], *(rounded(v) for v in box[1:])] for box in shown.boxes] if shown else [],
    }


def _interpretation(one: Interpretation) -> dict[str, Any]:
    return {
        "explanation": one.explanation,
        "explainer": one.explainer,
        "category": one.category,
        "status": one.status,
        "control_latent": one.control_latent,
        "n_train": one.n_train,
        "n_test": one.n_test,
        "scores": [_score(score) for score in one.scores],
        "control": [_score(score) for score in one.control],
    }


def _score(score: Score) -> dict[str, Any]:
    names = ("method", "judge", "asked", "answered", "unusable", "balanced_accuracy", "low", "high")
    return _short({name: getattr(score, name) for name in names})


def _short(plain: dict[str, Any]) -> dict[str, Any]:
    """Round floats to three digits; counts stay exact."""
    return {key: rounded(value) if isinstance(value, float) else value for key, value in plain.items()}


@dataclass(frozen=True)
class ShownStudy:
    """Image files by view, relative to the page, and boxes in 0..1 of the frontal crop."""

    paths: dict[str, str]
    boxes: tuple[tuple[str, float, float, float, float], ...]


class ImageFolder:
    """Copies each study's images once, on first use; several processes may copy into the same folder.

    Args:
        folder: Folder of the copied images.
        root: Folder that the studies' image paths are relative to.
        studies: All pseudonyms; a study's position numbers its files.
        licence: Strictest licence class, written into the files' metadata.
    """

    def __init__(self, folder: Path, root: Path, studies: Sequence[str], licence: str) -> None:
        # Loads torch, which a page without images does not need, and once for all processes.
        from sae_lens_maira.maira2.images import centre_crop

        self.folder, self.root, self._crop = folder, root, centre_crop
        self._info = PngInfo()
        self._info.add_text("Licence", licence)
        self._number = {study: number for number, study in enumerate(studies)}
        self._shown: dict[str, ShownStudy] = {}

    def add(self, entry: StudyInfo) -> ShownStudy:
        """Copy the study's images if they are not there yet.

        Raises:
            RecordError: An image is missing.
            PrivacyError: An image path leaves the root folder.
        """
        if entry.study not in self._shown:
            self._shown[entry.study] = self._write(entry, self._number[entry.study])
        return self._shown[entry.study]

    def _write(self, entry: StudyInfo, number: int) -> ShownStudy:
        paths: dict[str, str] = {}
        boxes = entry.boxes
        for view, source in entry.images:
            path = image_path(self.root, source)
            if not path.is_file():
                raise RecordError(
                    f"Study {entry.study} has a {view} image at {path}, which does not exist. Give the folder that "
                    "image paths are relative to (--image-root), or write the page without images (--images false)."
                )
            square, moved = self._crop(path, entry.boxes if view == "frontal" else (), IMAGE_SIDE)
            boxes = moved if view == "frontal" else boxes
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{number:06d}-{view if view in VIEWS else 'other'}.png"
            if not (self.folder / name).exists():
                with atomic_file(self.folder / name, sync=False) as draft:
                    square.save(draft, format="PNG", pnginfo=self._info)
            paths[view] = f"{self.folder.name}/{name}"
        return ShownStudy(paths, boxes)

"""Activations of wanted latents in the studies that show them: spooled to disk, then made into contexts.

    (study, latent, place, value), 16 bytes, appended to the file of the latent's shard
    place >= 0: index of the shown token;    place < 0: patch -1 - place of the views one after another

A study in which a latent never fires has no entry, so zero contexts need no space. Memory holds one block when writing
and one shard of latents when reading.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.latents.packing import Text
from sae_lens_maira.latents.records import ActivationMap, Context
from sae_lens_maira.maira2 import Maira2Processor, TokenRole
from sae_lens_maira.maira2.prompts import VIEWS
from sae_lens_maira.maira2.reports import teacher_text
from sae_lens_maira.maira2.tokenization import append_reports, tokenize_prompts
from sae_lens_maira.studies import Study

HIT = np.dtype([("study", "<i4"), ("latent", "<i4"), ("place", "<i4"), ("value", "<f4")])
LATENTS_PER_SHARD = 256


class HitFiles:
    """Files of hits in one folder, written by one process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def append(self, hits: np.ndarray) -> None:
        """Append hits (n,) of `HIT`, in row order within each study."""
        shard = hits["latent"] // LATENTS_PER_SHARD
        order = np.argsort(shard, kind="stable")
        hits, shard = hits[order], shard[order]
        edges = np.r_[0, np.flatnonzero(np.diff(shard)) + 1, len(hits)]
        for start, stop in pairwise(edges.tolist()):
            if stop > start:
                with _path(self._folder, int(shard[start])).open("ab") as file:
                    file.write(hits[start:stop].tobytes())

    def sizes(self) -> dict[str, int]:
        """Bytes by file name: what `cut` goes back to."""
        return {path.name: path.stat().st_size for path in self._folder.glob("hits-*")}

    def cut(self, sizes: dict[str, int]) -> None:
        """Drop what was appended since `sizes` were taken."""
        for path in self._folder.glob("hits-*"):
            with path.open("r+b") as file:
                file.truncate(sizes.get(path.name, 0))


Hits = dict[int, tuple[np.ndarray, np.ndarray]]
"""Study -> (n,) places and (n,) values of one latent's hits there, in row order."""


def read_hits(folders: Sequence[Path], latents: Sequence[int]) -> Iterator[tuple[int, Hits]]:
    """`(latent, its hits)` for ascending `latents`, one shard of latents in memory at a time.

    Args:
        folders: of the processes that wrote them; no study was written by two.
        latents: ascending.
    """
    current, hits, starts = -1, np.zeros(0, HIT), np.zeros(1, dtype=np.int64)
    for latent in latents:
        if latent // LATENTS_PER_SHARD != current:
            current = latent // LATENTS_PER_SHARD
            paths = [_path(folder, current) for folder in folders]
            parts = [np.fromfile(path, HIT) for path in paths if path.is_file()]
            hits = np.concatenate([np.zeros(0, HIT), *parts])
            hits = hits[
                np.lexsort((hits["study"], hits["latent"]))
            ]  # stable: rows of a study keep their order
            numbers = np.arange(LATENTS_PER_SHARD + 1) + current * LATENTS_PER_SHARD
            starts = np.searchsorted(hits["latent"], numbers)
        place = latent - current * LATENTS_PER_SHARD
        own = hits[starts[place] : starts[place + 1]]
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
    return folder / f"hits-{shard:05d}"


SHOWN = (
    TokenRole.INDICATION,
    TokenRole.TECHNIQUE,
    TokenRole.COMPARISON,
    TokenRole.PRIOR_REPORT,
    TokenRole.PHRASE,
    TokenRole.REPORT,
)
"""Roles whose tokens a context shows; others are shown where their activations were read."""


def study_text(processor: Maira2Processor, study: Study, rows: ActivationRows, grid: tuple[int, int]) -> Text:
    """What every context of a study shows; images are not opened.

    Args:
        processor: of the model.
        study: with its report, as the rows were encoded.
        rows: the study's rows.
        grid: of patches.
    """
    tokenizer = processor.tokenizer
    prompt = processor.build_prompt(study)
    (row,) = append_reports(
        tokenizer,
        tokenize_prompts(tokenizer, [prompt], processor.image_token_id, processor.patches_per_side),
        [teacher_text(study, "findings", None)],
    )
    read = rows.position[~rows.is_image]
    shown = np.isin(row.roles, [int(role) for role in SHOWN])
    shown[read] = True
    special = np.isin(row.input_ids, tokenizer.all_special_ids)
    positions = np.flatnonzero(shown & ~special)
    hidden = np.unique(read[special[read]])
    known = np.isin(positions, read)
    present = (study.frontal, study.lateral, study.prior_frontal)

    def spelled(at: np.ndarray) -> tuple[str, ...]:
        return tuple(spell(t) for t in tokenizer.convert_ids_to_tokens(row.input_ids[at].tolist()))

    def roles(at: np.ndarray) -> tuple[str, ...]:
        return tuple(TokenRole(int(role)).name.lower() for role in row.roles[at])

    return Text(
        tokens=spelled(positions),
        positions=tuple(positions.tolist()),
        roles=roles(positions),
        silent=tuple(0.0 if was else None for was in known),
        views=tuple((view, *grid) for view, image in zip(VIEWS, present, strict=True) if image is not None),
        special=tuple(zip(hidden.tolist(), spelled(hidden), roles(hidden), strict=True)),
    )


def spell(token: str) -> str:
    """A SentencePiece token as it reads: its word mark a space, a byte its character where it is ASCII."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        code = int(token[3:5], 16)
        return chr(code) if code < 128 else token
    return token.replace("\u2581", " ")


def short(value: float) -> float:
    """Six significant digits: what is shown, at half the size of float32's exact decimals."""
    return float(f"{value:.6g}")


def places_of(rows: ActivationRows, text: Text, grid: tuple[int, int]) -> np.ndarray:
    """(n,) place of each of a study's rows as `hits` counts them; special tokens follow behind the shown ones."""
    order = np.array([*text.positions, *(position for position, _, _ in text.special)], dtype=np.int64)
    number = np.full(int(rows.position.max(initial=0)) + 1, -1, dtype=np.int64)
    number[order[order < len(number)]] = np.flatnonzero(order < len(number))
    patch = rows.kind.astype(np.int64) * grid[0] * grid[1] + rows.patch_row.astype(np.int64) * grid[1]
    return np.where(rows.is_image, -1 - patch - rows.patch_col, number[rows.position])


def build_context(
    pseudonym: str,
    text: Text,
    place: np.ndarray,
    value: np.ndarray,
    grid: tuple[int, int],
    kind: str,
) -> Context:
    """One latent's context in one study.

    Args:
        pseudonym: of the study.
        text: of the study.
        place: (n,) places of the latent's hits, in row order.
        value: (n,) its activations there.
        grid: of patches.
        kind: named in a zero context, which has no hit: the kind at which the latent fires most.
    """
    patches, image = grid[0] * grid[1], place < 0
    tokens, positions, roles, values = text.tokens, text.positions, text.roles, list(text.silent)
    patch, at = None, -1
    for i, v in zip(place[~image].tolist(), value[~image].tolist(), strict=True):
        if i < len(values):
            values[i] = short(v)
    if len(value):
        peak = int(value.argmax())
        kind, at = ("image", -1) if image[peak] else ("text", int(place[peak]))
        if image[peak]:
            number = -1 - int(place[peak])
            patch = (VIEWS[number // patches], number % patches // grid[1], number % grid[1])
        elif at >= len(tokens):
            position, token, role = text.special[at - len(tokens)]
            at = bisect_left(positions, position)
            tokens = (*tokens[:at], token, *tokens[at:])
            positions = (*positions[:at], position, *positions[at:])
            roles = (*roles[:at], role, *roles[at:])
            values.insert(at, short(float(value[peak])))
    number = -1 - place[image]
    return Context(
        study=pseudonym,
        value=short(float(value.max())) if len(value) else 0.0,
        kind=kind,
        peak=at,
        patch=patch,
        tokens=tokens,
        positions=positions,
        roles=roles,
        values=tuple(values),
        heat=tuple(_heat(view, number, value[image], grid) for view, _, _ in text.views),
    )


def _heat(view: str, number: np.ndarray, value: np.ndarray, grid: tuple[int, int]) -> ActivationMap:
    if not len(number):
        return ActivationMap(view, *grid, (), ())
    patch = number - VIEWS.index(view) * grid[0] * grid[1]
    on = (patch >= 0) & (patch < grid[0] * grid[1])
    patch, value = patch[on], value[on]
    order = np.argsort(patch)
    return ActivationMap(
        view, *grid, tuple(patch[order].tolist()), tuple(short(v) for v in value[order].tolist())
    )

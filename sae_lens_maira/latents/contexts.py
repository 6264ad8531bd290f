"""Contexts: a study's text with one latent's activations on it, and its heat on the images.

The first pass decides which latents want which studies; here the rows of one study and the wanted latents'
activations become plain `Context` records, which are spooled to disk by shard of latents, so that memory holds one
study at a time. It knows nothing about SAEs or how studies were chosen.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.latents.plain import from_plain
from sae_lens_maira.latents.records import Context, PatchHeat
from sae_lens_maira.latents.streaming import VIEWS
from sae_lens_maira.maira2 import Maira2Processor, TokenRole
from sae_lens_maira.studies import Study

SHOWN = (
    TokenRole.INDICATION,
    TokenRole.TECHNIQUE,
    TokenRole.COMPARISON,
    TokenRole.PRIOR_REPORT,
    TokenRole.PHRASE,
    TokenRole.REPORT,
)
"""Roles whose tokens a context shows; others are shown where their activations were read."""


@dataclass(frozen=True)
class StudyText:
    """A study's unpadded sequence: (L,) token ids, roles and spelled tokens, special ones marked, and its views."""

    ids: np.ndarray
    roles: np.ndarray
    tokens: tuple[str, ...]
    special: np.ndarray
    views: tuple[str, ...]


def study_text(processor: Maira2Processor, study: Study) -> StudyText:
    """Encode a study with its report, as the rows were."""
    encoding = processor.encode([study], report="teacher", padding_side="right")
    length = int(encoding.attention_mask[0].sum())
    ids = encoding.input_ids[0, :length].numpy()
    tokenizer = processor.tokenizer
    spelled = tokenizer.convert_ids_to_tokens(ids.tolist())
    special = np.isin(ids, tokenizer.all_special_ids)
    present = (study.frontal, study.lateral, study.prior_frontal)
    views = tuple(view for view, image in zip(VIEWS, present, strict=True) if image is not None)
    tokens = tuple(spell(token) for token in spelled)
    return StudyText(ids, encoding.roles[0, :length].numpy(), tokens, special, views)


def spell(token: str) -> str:
    """A SentencePiece token as it reads: its word mark a space, a byte its character where it is ASCII."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        code = int(token[3:5], 16)
        return chr(code) if code < 128 else token
    return token.replace("\u2581", " ")


def short(value: float) -> float:
    """Six significant digits: what is shown, at half the size of float32's exact decimals."""
    return float(f"{value:.6g}")


def build_context(
    pseudonym: str,
    text: StudyText,
    rows: ActivationRows,
    column: np.ndarray,
    grid: tuple[int, int],
    kind: str,
) -> Context:
    """One latent's context in one study.

    Args:
        pseudonym: of the study.
        text: the study's sequence.
        rows: its n rows.
        column: (n,) the latent's activations there.
        grid: of patches.
        kind: named in a zero context, which has no hit: the kind at which the latent fires most.
    """
    peak = int(column.argmax()) if len(column) else -1
    fires = peak >= 0 and column[peak] > 0
    image_hit = fires and bool(rows.is_image[peak])
    if fires:
        kind = "image" if image_hit else "text"
    read = rows.position[~rows.is_image]
    shown = np.isin(text.roles, [int(role) for role in SHOWN])
    shown[read] = True
    shown &= ~text.special
    if fires and not image_hit:
        shown[rows.position[peak]] = True
    positions = np.flatnonzero(shown)
    known = dict(zip(read.tolist(), column[~rows.is_image].tolist(), strict=True))
    values = tuple(short(known[p]) if p in known else None for p in positions.tolist())
    return Context(
        study=pseudonym,
        value=short(float(column[peak])) if fires else 0.0,
        kind=kind,
        peak=int(np.searchsorted(positions, rows.position[peak])) if fires and not image_hit else -1,
        patch=(VIEWS[rows.kind[peak]], int(rows.patch_row[peak]), int(rows.patch_col[peak]))
        if image_hit
        else None,
        tokens=tuple(text.tokens[p] for p in positions),
        positions=tuple(positions.tolist()),
        roles=tuple(TokenRole(int(role)).name.lower() for role in text.roles[positions]),
        values=values,
        heat=tuple(_heat(view, rows, column, grid) for view in text.views),
    )


def _heat(view: str, rows: ActivationRows, column: np.ndarray, grid: tuple[int, int]) -> PatchHeat:
    on = (rows.kind == VIEWS.index(view)) & (column > 0)
    patches = rows.patch_row[on].astype(np.int64) * grid[1] + rows.patch_col[on]
    order = np.argsort(patches)
    return PatchHeat(
        view,
        grid[0],
        grid[1],
        tuple(patches[order].tolist()),
        tuple(short(value) for value in column[on][order].tolist()),
    )


class ContextSpool:
    """Contexts on disk by shard of latents, until their records are written."""

    def __init__(self, folder: Path, latents_per_shard: int = 256) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._size = folder, latents_per_shard

    def add(self, study: int, contexts: dict[int, Context]) -> None:
        """Keep the contexts of one study, by latent."""
        shards: dict[int, list[str]] = {}
        for latent, context in contexts.items():
            line = json.dumps([latent, study, context], default=vars, separators=(",", ":"))
            shards.setdefault(latent // self._size, []).append(line + "\n")
        for shard, lines in shards.items():
            with self._path(shard).open("a", encoding="utf-8") as file:
                file.writelines(lines)

    def shards(self, latents: list[int]) -> Iterator[tuple[int, dict[int, Context]]]:
        """`(latent, {study: context})` for ascending `latents`, one shard in memory at a time."""
        current, loaded = -1, {}
        for latent in latents:
            if latent // self._size != current:
                current = latent // self._size
                loaded = self._load(current)
            yield latent, loaded.get(latent, {})

    def _load(self, shard: int) -> dict[int, dict[int, Context]]:
        loaded: dict[int, dict[int, Context]] = {}
        if self._path(shard).is_file():
            with self._path(shard).open(encoding="utf-8") as file:
                for line in file:
                    latent, study, plain = json.loads(line)
                    loaded.setdefault(latent, {})[study] = from_plain(Context, plain)
        return loaded

    def _path(self, shard: int) -> Path:
        return self._folder / f"contexts-{shard:05d}.jsonl"

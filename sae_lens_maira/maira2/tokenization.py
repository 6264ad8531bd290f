"""Tokenise whole prompts and assign every token the role of its segment.

The ids of a prompt are exactly the tokenizer's ids of the prompt's text; tokenising segments separately would give
other ids where a merge or a space marker crosses a border. Roles are assigned afterwards by character offsets: a token
belongs to the segment of its first character that is not a space (of its first character if it is all spaces). A report
is tokenised separately and appended to the prompt, so that the prompt's ids are the same with and without a report, as
in generation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sae_lens_maira.errors import PromptError
from sae_lens_maira.maira2.prompts import Prompt
from sae_lens_maira.token_roles import TokenRole


class Row(NamedTuple):
    """Positions of one study before padding: arrays of equal length, the columns of `Maira2Encoding`."""

    input_ids: np.ndarray
    roles: np.ndarray
    image_index: np.ndarray
    view: np.ndarray
    patch_row: np.ndarray
    patch_col: np.ndarray


# dtype and padding value of each column except input_ids, which is padded with the tokenizer's padding id
_COLUMNS: dict[str, tuple[type, int]] = {
    "input_ids": (np.int64, 0),
    "roles": (np.int8, int(TokenRole.PAD)),
    "image_index": (np.int8, -1),
    "view": (np.int8, -1),
    "patch_row": (np.int16, -1),
    "patch_col": (np.int16, -1),
}


def tokenize_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], image_token_id: int, patches_per_side: int
) -> list[Row]:
    """Tokenise prompts and expand every `<image>` to its patches, row by row from the top left.

    Args:
        tokenizer: Fast tokenizer.
        prompts: Prompts, one per row.
        image_token_id: Token id of `<image>`.
        patches_per_side: Patches along one side of an image; an image takes the square of this number of positions.

    Raises:
        PromptError: The tokenizer does not convert every `<image>` to one placeholder.
    """
    texts = [prompt.text for prompt in prompts]
    batch = tokenizer(
        texts,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    rows = []
    for prompt, text, ids, offsets in zip(
        prompts, texts, batch["input_ids"], batch["offset_mapping"], strict=True
    ):
        ids = np.asarray(ids, dtype=np.int64)
        roles = _roles_of_tokens(prompt, text, np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
        roles[ids == tokenizer.bos_token_id] = TokenRole.BOS
        roles[ids == image_token_id] = TokenRole.IMAGE
        kinds = [kind for kind, _ in prompt.images]
        found = int((ids == image_token_id).sum())
        if found != len(kinds):
            raise PromptError(
                f"A prompt with {len(kinds)} images was tokenised to {found} image placeholders (id"
                f" {image_token_id}). The tokenizer must have <image> as one added token with that id; use the"
                " checkpoint's own tokenizer."
            )
        rows.append(_expand(ids, roles, ids == image_token_id, kinds, patches_per_side))
    return rows


def append_reports(tokenizer: Any, rows: Sequence[Row], reports: Sequence[str]) -> list[Row]:
    """Append each report and the final `</s>` to its row, as REPORT positions."""
    batch = tokenizer(
        list(reports),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    extended = []
    for row, ids in zip(rows, batch["input_ids"], strict=True):
        tail = np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int64)
        added = {name: np.full(len(tail), fill, dtype) for name, (dtype, fill) in _COLUMNS.items()}
        added |= {"input_ids": tail, "roles": np.full(len(tail), TokenRole.REPORT, np.int8)}
        extended.append(
            Row(**{name: np.concatenate([getattr(row, name), added[name]]) for name in Row._fields})
        )
    return extended


def pad_rows(rows: Sequence[Row], pad_token_id: int, side: str) -> dict[str, torch.Tensor]:
    """Stack rows into `(B, L)` tensors, padded on the given side, with their attention mask."""
    length = max(len(row.input_ids) for row in rows)
    columns = {
        name: np.full((len(rows), length), pad_token_id if name == "input_ids" else fill, dtype)
        for name, (dtype, fill) in _COLUMNS.items()
    }
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for number, row in enumerate(rows):
        size = len(row.input_ids)
        where = slice(length - size, length) if side == "left" else slice(0, size)
        mask[number, where] = 1
        for name, column in columns.items():
            column[number, where] = getattr(row, name)
    return {name: torch.from_numpy(column) for name, column in columns.items()} | {
        "attention_mask": torch.from_numpy(mask)
    }


def _roles_of_tokens(prompt: Prompt, text: str, offsets: np.ndarray) -> np.ndarray:
    lengths = [len(segment.text) for segment in prompt.segments]
    # A token that is not a placeholder is not an image: characters of `<image>` count as the next segment's.
    roles = [int(segment.role) for segment in prompt.segments]
    for number in range(len(roles) - 2, -1, -1):
        if roles[number] == TokenRole.IMAGE:
            roles[number] = roles[number + 1]
    of_char = np.repeat(np.asarray(roles, dtype=np.int8), lengths)
    # For every character, the position of the next one that is not a space.
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    places = np.arange(len(codes))
    next_word = np.minimum.accumulate(np.where(codes == ord(" "), len(codes), places)[::-1])[::-1]
    start = np.minimum(offsets[:, 0], len(codes) - 1)
    word = next_word[start]
    return of_char[np.where(word < offsets[:, 1], word, start)]


def _expand(ids: np.ndarray, roles: np.ndarray, is_image: np.ndarray, kinds: Sequence[int], side: int) -> Row:
    repeats = np.where(is_image, side * side, 1)
    index = np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int8)
    index = np.repeat(index, repeats)
    kind = np.full(len(index), -1, dtype=np.int8)
    patch_row, patch_col = (np.full(len(index), -1, dtype=np.int16) for _ in range(2))
    at_image = index >= 0
    if kinds:
        kind[at_image] = np.asarray(kinds, dtype=np.int8)[index[at_image]]
        patches = np.arange(side * side, dtype=np.int16)
        patch_row[at_image] = np.tile(patches // side, len(kinds))
        patch_col[at_image] = np.tile(patches % side, len(kinds))
    return Row(np.repeat(ids, repeats), np.repeat(roles, repeats), index, kind, patch_row, patch_col)

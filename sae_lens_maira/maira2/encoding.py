"""Batch of encoded studies: the model's inputs, and the role of every position.

Rows are studies, columns are positions; `pixel_values` contains the images of all rows in row order. Each token has a
role. Image positions also have the image's number within the study, its view, and the row and column of the patch.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from sae_lens_maira.errors import PromptError
from sae_lens_maira.token_roles import LAST_IMAGE_PRESET, RoleFilter, TokenRole, resolve_roles


@dataclass(frozen=True, kw_only=True)
class Maira2Encoding:
    """B encoded studies of padded length L with N images in total.

    Args:
        input_ids: `(B, L)` int64.
        attention_mask: `(B, L)` int64, 0 at padding.
        pixel_values: `(N, 3, S, S)`, row by row and in prompt order within a row; None without images.
        roles: `(B, L)` int8, values of `TokenRole`.
        image_index: `(B, L)` int8, 0-based image number within the study at image positions, else -1.
        view: `(B, L)` int8, 0 frontal, 1 lateral, 2 prior at image positions, else -1.
        patch_row: `(B, L)` int16, patch row from the top at image positions, else -1.
        patch_col: `(B, L)` int16, patch column from the left at image positions, else -1.
        images_per_row: Number of images of each row.
        pad_token_id: Token id at padding.
        eos_token_id: Token id that ends a report.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor | None
    roles: torch.Tensor
    image_index: torch.Tensor
    view: torch.Tensor
    patch_row: torch.Tensor
    patch_col: torch.Tensor
    images_per_row: tuple[int, ...]
    pad_token_id: int = 0
    eos_token_id: int = 2

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward and generate: ids, mask, and pixels if there are images."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.pixel_values is not None:
            inputs["pixel_values"] = self.pixel_values
        return inputs

    def forward_inputs(self) -> dict[str, torch.Tensor]:
        """Arguments of one forward without a cache; the mask is left out if all padding is on the right.

        In a causal model, padding on the right does not change the values at real tokens, and attention without a mask
        is faster. Values at padding are then meaningless.
        """
        inputs = self.model_inputs()
        if not bool((self.attention_mask[:, 1:] > self.attention_mask[:, :-1]).any()):
            del inputs["attention_mask"]
        return inputs

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Maira2Encoding":
        """Move every tensor to `device`; `dtype` applies to the pixels only."""
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                moved[field.name] = value.to(device, dtype if field.name == "pixel_values" else None)
        return dataclasses.replace(self, **moved)

    def rows(self, start: int, stop: int) -> "Maira2Encoding":
        """Rows `start` to `stop` (exclusive) with their images; padding is kept."""
        first, last = sum(self.images_per_row[:start]), sum(self.images_per_row[:stop])
        cut: dict[str, Any] = {
            field.name: getattr(self, field.name)[start:stop]
            for field in dataclasses.fields(self)
            if field.name not in ("pixel_values", "pad_token_id", "eos_token_id")
        }
        cut["pixel_values"] = (
            self.pixel_values[first:last] if self.pixel_values is not None and last > first else None
        )
        return dataclasses.replace(self, **cut)

    def extend(self, generated_ids: torch.Tensor) -> "Maira2Encoding":
        """Append generated tokens `(B, T)`, without the prompt, as REPORT positions.

        A row's report ends with its first `</s>`; later positions are padding.

        Raises:
            PromptError: The number of rows differs, or a row is padded on the right, which would leave a gap before the
                report.
        """
        if generated_ids.ndim != 2 or generated_ids.shape[0] != len(self):
            raise PromptError(
                f"Generated ids of shape {tuple(generated_ids.shape)} do not fit an encoding of {len(self)}"
                " rows. Pass the new tokens of every row as a (rows, new tokens) tensor."
            )
        if not bool(self.attention_mask[:, -1].all()):
            raise PromptError(
                "The encoding is padded on the right, so generated tokens would come after padding. Encode"
                ' with padding_side="left" to generate.'
            )
        new = generated_ids.to(self.input_ids.device, self.input_ids.dtype)
        ended = (new == self.eos_token_id).int().cumsum(dim=1)
        kept = (ended == 0) | ((ended == 1) & (new == self.eos_token_id))

        def grow(old: torch.Tensor, added: torch.Tensor | int) -> torch.Tensor:
            tail = torch.zeros_like(new, dtype=old.dtype) + added
            return torch.cat([old, tail.to(old.dtype)], dim=1)

        return dataclasses.replace(
            self,
            input_ids=grow(self.input_ids, torch.where(kept, new, self.pad_token_id)),
            attention_mask=grow(self.attention_mask, kept.long()),
            roles=grow(self.roles, torch.where(kept, int(TokenRole.REPORT), int(TokenRole.PAD))),
            image_index=grow(self.image_index, -1),
            view=grow(self.view, -1),
            patch_row=grow(self.patch_row, -1),
            patch_col=grow(self.patch_col, -1),
        )


def role_mask(encoding: Maira2Encoding, roles: RoleFilter) -> torch.Tensor:
    """Select positions by role.

    Args:
        encoding: Batch of B rows of length L.
        roles: A preset ("content", "paper", "paper_last_image", "text_only", "image_only", "generated_only",
            "all"), a role, or several roles.

    Returns:
        A `(B, L)` bool tensor on the encoding's device.

    Raises:
        ConfigError: A name is neither a preset nor a role.
    """
    table = torch.zeros(len(TokenRole), dtype=torch.bool, device=encoding.roles.device)
    table[[int(role) for role in resolve_roles(roles)]] = True
    mask = table[encoding.roles.long()]
    if roles == LAST_IMAGE_PRESET:
        mask &= (encoding.roles != TokenRole.IMAGE) | last_image_positions(encoding.image_index)
    return mask


def last_image_positions(image_index: torch.Tensor) -> torch.Tensor:
    """Mask of the last position of each image.

    Args:
        image_index: `(..., L)` image number at image positions, -1 elsewhere.

    Returns:
        A bool tensor of the same shape.
    """
    following = torch.nn.functional.pad(image_index[..., 1:], (0, 1), value=-1)
    return (image_index >= 0) & (following != image_index)

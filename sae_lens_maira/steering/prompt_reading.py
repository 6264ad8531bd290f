"""Prompts through the model once, and prompts of unequal length as one batch again.

    read_prompts   studies -> h, keys and values over each prompt, without padding
    padded         prompts -> a left-padded encoding and h (B, L, d_model)

It knows nothing about interventions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from sae_lens_maira.maira2 import Maira2, Maira2Encoding, TokenRole
from sae_lens_maira.steering.continuation import UpperModel
from sae_lens_maira.steering.prompt_cache import Prompt, Room, position_ids_of

COLUMNS = ("input_ids", "attention_mask", "roles", "image_index", "view", "patch_row", "patch_col")


@torch.no_grad()
def read_prompts(maira: Maira2, studies: Sequence[Any], upper: UpperModel) -> list[Prompt]:
    """The prompts of one batch of studies, run to the end of the model, padding cut off.

    Args:
        maira: the model.
        studies: their prompts for the findings report are read.
        upper: the part above the hook point; its module is where h is seen.
    """
    encoding = maira.processor.encode(studies, padding_side="left").to(maira.model.device, maira.model.dtype)
    length = encoding.input_ids.shape[1]
    cache = Cache(layers=[Room(length) for _ in upper.language_model.layers])
    seen: list[torch.Tensor] = []

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = maira.model.get_submodule(upper.module).register_forward_hook(look, prepend=True)
    try:
        output: Any = maira.model(
            **encoding.model_inputs(),
            position_ids=position_ids_of(encoding.attention_mask),
            use_cache=True,
            logits_to_keep=1,
            **{upper.cache_keyword: cache},
        )
    finally:
        handle.remove()
    prompts = []
    for row in range(len(encoding)):
        real = encoding.attention_mask[row].bool()
        prompts.append(
            Prompt(
                {name: getattr(encoding, name)[row, real] for name in COLUMNS},
                seen[0][row, real].clone(),
                tuple(layer.keys[row][:, real] for layer in cache.layers),  # pyright: ignore[reportOptionalSubscript, reportAttributeAccessIssue]
                tuple(layer.values[row][:, real] for layer in cache.layers),  # pyright: ignore[reportOptionalSubscript, reportAttributeAccessIssue]
                output.logits[row, -1].clone(),
            )
        )
    return prompts


def padded(parts: Sequence[Prompt], pad_id: int, eos_id: int) -> tuple[Maira2Encoding, torch.Tensor]:
    """Left-padded encoding (without pixels) and h (B, L, d_model) of some prompts."""
    length = max(len(part.hidden) for part in parts)
    fill = {"input_ids": pad_id, "attention_mask": 0, "roles": int(TokenRole.PAD)}

    def pad(value: torch.Tensor, number: int) -> torch.Tensor:
        return nn.functional.pad(value, (length - len(value), 0), value=number)

    columns = {
        name: torch.stack([pad(part.columns[name], fill.get(name, -1)) for part in parts]) for name in COLUMNS
    }
    hidden = torch.stack([nn.functional.pad(p.hidden, (0, 0, length - len(p.hidden), 0)) for p in parts])
    encoding = Maira2Encoding(
        **columns,
        pixel_values=None,
        images_per_row=(0,) * len(parts),
        pad_token_id=pad_id,
        eos_token_id=eos_id,
    )
    return encoding, hidden


def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows (B_i, L_i, ...) of several batches in one, padded with 0 on the left."""
    length = max(part.shape[1] for part in parts)

    def pad(part: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (length - part.shape[1], 0))

    return torch.cat([pad(part) for part in parts])

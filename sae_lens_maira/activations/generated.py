"""Encodings of reports that the model writes itself, aligned as teacher-forced ones are.

Generation pads on the left; what is harvested starts at column 0, so that a row's column is its position.
The ids are the generated ones, never text that was tokenized again. It knows nothing about stores.
"""

from dataclasses import fields, replace
from typing import Any

import torch

from sae_lens_maira.maira2 import Maira2, Maira2Encoding


@torch.no_grad()
def generate_reports(maira: Maira2, prompts: Maira2Encoding, max_new_tokens: int) -> Maira2Encoding:
    """Generate greedily and return prompts and reports, padded on the right.

    Args:
        maira: the model.
        prompts: padded on the left.
        max_new_tokens: budget of a report.
    """
    model: Any = maira.model
    prompt = prompts.to(model.device, model.dtype)
    output = model.generate(
        **prompt.model_inputs(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=prompt.pad_token_id,
        eos_token_id=prompt.eos_token_id,
    )
    whole = prompt.extend(output[:, prompt.input_ids.shape[1] :])
    return _from_the_left(whole)


def _from_the_left(encoding: Maira2Encoding) -> Maira2Encoding:
    padding = (encoding.attention_mask.cumsum(1) == 0).sum(1).tolist()
    moved: dict[str, Any] = {}
    for field in fields(encoding):
        value = getattr(encoding, field.name)
        if isinstance(value, torch.Tensor) and field.name != "pixel_values":
            moved[field.name] = torch.stack(
                [row.roll(-shift) for row, shift in zip(value, padding, strict=True)]
            )
    return replace(encoding, **moved)

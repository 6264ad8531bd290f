"""Accepted inputs of all hook interfaces, converted to the model's tensors.

A study, a list of studies, an encoding, a mapping of tensors, token ids or text become the three tensors of
MAIRA-2 (ids, mask, pixels) on the model's device; anything else a tokenizer adds is dropped, since
transformers 4 refuses `token_type_ids`. Whether images and placeholders agree is checked by the model itself,
for every library alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.maira2 import Maira2Encoding

TENSORS = ("input_ids", "attention_mask", "pixel_values")


@dataclass(frozen=True)
class ModelInputs:
    """The tensors of one call, and the encoding they came from where there is one."""

    tensors: dict[str, torch.Tensor]
    """`input_ids (B, L)`, and where given `attention_mask (B, L)` and `pixel_values (N, 3, S, S)`."""
    encoding: Maira2Encoding | None = None


def gather_inputs(
    given: Any,
    processor: Any = None,
    device: torch.device | str | None = None,
    encode: Mapping[str, Any] | None = None,
    pad_token_id: int | None = None,
    **tensors: torch.Tensor | None,
) -> ModelInputs:
    """Convert any accepted input to the model's tensors.

    Args:
        given: A study or a list of studies, a `Maira2Encoding`, a mapping with `input_ids`, token ids
            `(L,)` or `(B, L)`, text or a list of texts, or None if `input_ids` is among the tensors.
        processor: The processor, needed for studies and text.
        device: Device of the tensors.
        encode: Keyword arguments of `Maira2Processor.encode`, for studies only.
        pad_token_id: Token whose runs at either end of a row are padding where no attention mask was given.
        **tensors: `input_ids`, `attention_mask`, `pixel_values` with token ids or text.

    Returns:
        The tensors and, if there is one, their encoding.

    Raises:
        HookError: An unsupported kind of input, a processor is missing, or a tensor was given twice.
    """
    extra = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    encode = {key: value for key, value in (encode or {}).items() if value is not None}
    encoding: Maira2Encoding | None = None
    if is_study(given) or (_is_list(given) and all(is_study(item) for item in given)):
        given = _need(processor, "Studies").encode(given, **encode)
    elif encode:
        raise HookError(
            f"The arguments {', '.join(sorted(encode))} say how studies are encoded, but the input is"
            f" {type(given).__name__}. Leave them out, or pass studies."
        )
    if isinstance(given, Maira2Encoding):
        encoding, found = given, dict(given.model_inputs())
    elif isinstance(given, Mapping):
        found = {name: given[name] for name in TENSORS if given.get(name) is not None}
    elif isinstance(given, torch.Tensor):
        found = {"input_ids": given[None] if given.ndim == 1 else given}
    elif isinstance(given, str) or (_is_list(given) and all(isinstance(item, str) for item in given)):
        batch = _need(processor, "Text").tokenizer(
            [given] if isinstance(given, str) else list(given), return_tensors="pt", padding=True
        )
        found = {name: batch[name] for name in ("input_ids", "attention_mask")}
    elif given is None:
        found = {}
    else:
        raise HookError(
            f"The input is {type(given).__name__}; expected a study, a list of studies, a Maira2Encoding,"
            f" a mapping with input_ids, a tensor of token ids, or text."
        )
    twice = sorted(set(found) & set(extra))
    if twice:
        raise HookError(
            f"{', '.join(twice)} came twice: inside the {type(given).__name__} and as an argument. Pass"
            " one of them."
        )
    found |= extra
    if "input_ids" not in found:
        raise HookError(
            f"The input holds {', '.join(sorted(found)) or 'nothing'} but no input_ids. Pass token ids, a"
            f" study or an encoding; images alone say nothing to a language model."
        )
    if "attention_mask" not in found and pad_token_id is not None:
        mask = _mask_of(found["input_ids"], pad_token_id)
        found |= {} if mask is None else {"attention_mask": mask}
    return ModelInputs({name: tensor.to(device) for name, tensor in found.items()}, encoding)


def _mask_of(ids: torch.Tensor, pad: int) -> torch.Tensor | None:
    """Attention mask (B, L) that leaves out runs of the pad token at either end of a row; None if there are none.

    MAIRA-2 pads with <unk>, so a pad token inside a text is a word that the tokenizer does not know.
    """
    real = ids != pad
    inside = real.cumsum(-1).bool() & real.flip(-1).cumsum(-1).flip(-1).bool()
    return None if bool(inside.all()) else inside.long()


def is_study(thing: Any) -> bool:
    """Whether something carries the images of a study."""
    return hasattr(thing, "frontal") and hasattr(thing, "indication")


def _is_list(thing: Any) -> bool:
    return isinstance(thing, Sequence) and not isinstance(thing, str) and len(thing) > 0


def _need(processor: Any, what: str) -> Any:
    if processor is None:
        raise HookError(
            f"{what} must be encoded first, and this model was wrapped without a processor. Wrap the"
            f" result of load_maira2, pass processor=, or pass an encoding."
        )
    return processor

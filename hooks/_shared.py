"""A second module tree over the same weights.

TransformerBridge puts its own components into the model that it wraps, which changes that model. The copy has its own
modules and configuration and shares every parameter and buffer with the original. This module is separate from
`bridge.py` because it also works with TransformerLens 2.17.
"""

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn

from sae_lens_maira.errors import HookError

Model = TypeVar("Model", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def share_weights(model: Model) -> Model:
    """Copy a model's modules and configuration, and share its parameters and buffers.

    Hooks are not copied, ours or others'; neither is nnsight's instrumentation. transformers installs its own
    capturing hooks again when the copy first runs. Moving or casting one of the two moves or casts both.

    Args:
        model: Any transformers model on devices of its own choosing, but not dispatched by accelerate.

    Raises:
        HookError: The model's modules carry forwards of accelerate's, which speak of the original modules.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            raise HookError(
                f"{type(module).__name__} was dispatched by accelerate (device_map), so its modules cannot be"
                " copied. Load the model without a device map, or pass in_place=True and give the model up."
            )
        memo |= {id(getattr(module, name)): OrderedDict() for name in _HOOKS if hasattr(module, name)}
        memo |= {id(value): None for value in module.__dict__.values() if _is_nnsight(value)}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        if module.__dict__.get("forward", module) is None:
            del module.__dict__["forward"]
    return copied


def _is_nnsight(value: Any) -> bool:
    return type(value).__module__.startswith("nnsight.")

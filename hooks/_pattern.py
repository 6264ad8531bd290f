"""The attention pattern as a hook point.

    pattern = softmax(q k^T * scale + mask),   z = pattern v

transformers computes the pattern inside its attention function, so no module hook can replace it. While
a hook is attached, the model's eager function gives way to this one, which does the same arithmetic and sends
the pattern through the hooks on its way. Fused kernels (sdpa, flash) never form a pattern; asking for one
there is an error.
"""

from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sae_lens_maira.errors import HookError

HOOKED_EAGER = "maira2_hooked_eager"

_listeners: WeakKeyDictionary[nn.Module, OrderedDict[int, Any]] = WeakKeyDictionary()


def hooked_eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention whose pattern passes through the listeners of `module`.

    Args:
        module: The attention module that calls.
        query: `(B, heads, L, d_head)`, rotated.
        key: `(B, kv_heads, L seen, d_head)`, rotated.
        value: `(B, kv_heads, L seen, d_head)`.
        attention_mask: Additive, broadcastable to `(B, heads, L, L seen)`.
        scaling: Factor on the scores.
        dropout: Probability, in training only.

    Returns:
        `(B, L, heads, d_head)` and the pattern `(B, heads, L, L seen)`.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, :, : key.shape[-2]]
    # Softmax in fp32, as transformers does: bf16 sums over thousands of positions lose mass.
    pattern = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    pattern = nn.functional.dropout(pattern, p=dropout, training=module.training)
    for live in list(_listeners.get(module, OrderedDict()).values()):
        pattern = live.pass_on(pattern)
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


ALL_ATTENTION_FUNCTIONS.register(HOOKED_EAGER, hooked_eager_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(HOOKED_EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def is_eager(module: nn.Module) -> bool:
    """Whether an attention module forms its pattern."""
    config: Any = module.config
    return config._attn_implementation in ("eager", HOOKED_EAGER)


def require_eager(module: nn.Module, name: str) -> None:
    """Raise HookError unless the attention module forms its pattern."""
    if not is_eager(module):
        config: Any = module.config
        raise HookError(
            f"Hook point {name!r} needs eager attention, but the model runs {config._attn_implementation!r},"
            f" whose fused kernel never forms the pattern. Call model.set_attn_implementation('eager') first;"
            f" it keeps heads x L x L floats per layer."
        )


def listen_to_pattern(module: nn.Module, live: Any) -> RemovableHandle:
    """Send the pattern of an attention module through `live.pass_on` until the handle is removed."""
    listeners = _listeners.setdefault(module, OrderedDict())
    handle = _PatternHandle(listeners, module)
    listeners[handle.id] = live
    _switch(module)
    return handle


class _PatternHandle(RemovableHandle):
    """A torch handle that also gives the model its own attention back with the last listener."""

    def __init__(self, listeners: Any, module: nn.Module) -> None:
        super().__init__(listeners)
        self.module = module

    def remove(self) -> None:
        super().remove()
        _switch(self.module)


def _switch(module: nn.Module) -> None:
    config: Any = module.config
    shared = [m for m in _listeners if m.config is config and _listeners[m]]
    config._attn_implementation = HOOKED_EAGER if shared else "eager"

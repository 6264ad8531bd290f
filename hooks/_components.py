"""Bridge components that TransformerLens lacks: the Dinov2 tower, its blocks, the projector, cached
attention.

TransformerLens' vision components want CLIP's or SigLIP's modules and an output with `last_hidden_state`. A
Dinov2Backbone returns feature maps, and transformers 5 collects those in hooks on the tower's blocks: a
bridge that edits a block's output outside the block comes too late. So these components hook the original
modules from inside.
"""

from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge.generalized_components import VisionProjectionBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
    PositionEmbeddingsAttentionBridge,
)


class Dinov2BlockBridge(GeneralizedComponent):
    """One Dinov2 block: `hook_in`, `hook_out`, and what attention and MLP add, after their layer scales."""

    is_list_item = True
    hook_aliases = {  # noqa: RUF012 - TransformerLens declares it so
        "hook_resid_pre": "hook_in",
        "hook_resid_post": "hook_out",
        "hook_attn_out": "layer_scale1.hook_out",
        "hook_mlp_out": "layer_scale2.hook_out",
    }

    def __init__(self, name: str) -> None:
        super().__init__(
            name,
            submodules={
                scale: GeneralizedComponent(name=scale) for scale in ("layer_scale1", "layer_scale2")
            },
        )

    def set_original_component(self, original_component: nn.Module) -> None:
        """Take over a block and hook it from inside."""
        super().set_original_component(original_component)

        def enter(_: nn.Module, args: tuple[Any, ...]) -> Any:
            return (self.hook_in(args[0]), *args[1:])

        def leave(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self.hook_out(output[0]), *output[1:])
            return self.hook_out(output)

        original_component.register_forward_pre_hook(enter)
        original_component.register_forward_hook(leave, prepend=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; its hooks fire inside."""
        return self._modules["_original_component"](*args, **kwargs)  # pyright: ignore[reportOptionalCall]


class Dinov2TowerBridge(GeneralizedComponent):
    """The backbone: pixels `(N, 3, S, S)` at `hook_in`, its feature map `(N, 1 + P, d)` at `hook_out`."""

    hook_aliases = {  # noqa: RUF012 - TransformerLens declares it so
        "hook_embed": "embeddings.hook_out",
        "hook_vision_embed": "embeddings.hook_out",
        "hook_vision_out": "hook_out",
    }

    def __init__(self, name: str, layer: int) -> None:
        super().__init__(
            name,
            submodules={
                "embeddings": GeneralizedComponent(name="embeddings"),
                "blocks": Dinov2BlockBridge(name="encoder.layer"),
            },
        )
        self._layer = layer

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone on pixels and pass the chosen feature map through `hook_out`."""
        tower: Any = self._modules["_original_component"]
        output = tower(self.hook_in(pixel_values), *args, **kwargs)
        maps = list(output.feature_maps)
        maps[self._layer] = self.hook_out(maps[self._layer])
        output.feature_maps = tuple(maps)
        return output


def projector_bridge(name: str, layers: int) -> VisionProjectionBridge:
    """The projector as a component, with one component per layer of its Sequential."""
    parts: dict[str, Any] = {str(i): GeneralizedComponent(name=f"layers.{i}") for i in range(layers)}
    return VisionProjectionBridge(name=name, submodules=parts)


class CachedAttentionBridge(PositionEmbeddingsAttentionBridge):
    """Llama's attention, bridged, that finds the KV cache under either of transformers' names.

    transformers 5.24 passes the cache to attention as `cache`; TransformerLens 3.9 looks for
    `past_key_values`, finds none, and lets every token after the first attend to itself alone, without a
    warning.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens', with the cache."""
        cache = kwargs.pop("cache", None)
        if cache is not None:
            kwargs.setdefault("past_key_values", cache)
        return super().forward(*args, **kwargs)

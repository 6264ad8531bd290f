"""MAIRA-2 under TransformerLens' TransformerBridge (TransformerLens 3.9 and newer).

`to_bridge(model)` gives SAELens' bridge class over a weight-sharing copy of the model, with this package's names
working everywhere. `boot_transformers` is never called: it refuses architectures from outside and may run
`pip install torchvision`. The adapter is registered by entry point and by call. TransformerLens 2.17 has no bridge:
importing this module there is an error with that message.
"""

from typing import Any

from sae_lens_maira.errors import HookError
from sae_lens_maira.maira2 import Maira2, Maira2ForConditionalGeneration, Maira2Processor
from sae_lens_maira.maira2.versions import has_transformer_bridge

if not has_transformer_bridge():
    raise HookError(
        "The installed TransformerLens is older than 3 and has no TransformerBridge. Use"
        " sae_lens_maira.hooks.HookedMaira2, which offers the same names there, or install"
        " transformer-lens>=3.9."
    )

from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter

from sae_lens_maira.hooks._bridged import BridgedMaira2
from sae_lens_maira.hooks._components import CachedAttentionBridge, Dinov2TowerBridge, projector_bridge
from sae_lens_maira.hooks._shared import share_weights

ARCHITECTURE = "Maira2ForConditionalGeneration"


class Maira2ArchitectureAdapter(LlavaArchitectureAdapter):
    """LLaVA's adapter with MAIRA-2's vision tower and projector; published MAIRA-2's sizes until `fit`."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        assert self.component_mapping is not None
        attention = self.component_mapping["blocks"].submodules["attn"]
        # The parent has wired it; only how it finds the cache differs.
        attention.__class__ = CachedAttentionBridge
        self.fit(projector_layers=4, feature_layer=-1)

    def fit(self, projector_layers: int, feature_layer: int) -> None:
        """Set what TransformerLens' configuration does not carry.

        Args:
            projector_layers: Linear layers of the projector.
            feature_layer: Index of the backbone's feature map that the projector reads.
        """
        assert self.component_mapping is not None
        self.component_mapping["vision_encoder"] = Dinov2TowerBridge("model.vision_tower", feature_layer)
        self.component_mapping["vision_projector"] = projector_bridge(
            "model.multi_modal_projector", 2 * projector_layers - 1
        )


def register_adapter() -> None:
    """Make the adapter known to TransformerLens, as the package's entry point does."""
    # Entry points first: found later, ours would look like an attempt to override this registration.
    ArchitectureAdapterFactory.discover_entry_points()
    ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, Maira2ArchitectureAdapter)


def to_bridge(
    model: Maira2 | Maira2ForConditionalGeneration,
    processor: Maira2Processor | None = None,
    model_name: str = "microsoft/maira-2",
    in_place: bool = False,
) -> BridgedMaira2:
    """Bridge a loaded MAIRA-2.

    The bridge computes attention itself, eagerly, and keeps heads x L x L floats per layer: 2.1 GB in fp32 at
    4,096 positions. Its logits equal those of the model under eager attention.

    Args:
        model: The result of `load_maira2`, or the model.
        processor: Its processor; taken from `model` if that is a `Maira2`.
        model_name: What `cfg.model_name` says.
        in_place: Whether the bridge's components go into the model itself, which then is not a plain
            transformers model any more; False works on a copy that shares the weights.

    Returns:
        The bridge; SAELens' `SAETransformerBridge` is its base class.

    Raises:
        HookError: The model cannot be copied.
    """
    if isinstance(model, Maira2):
        model, processor = model.model, processor or model.processor
    register_adapter()
    shared = model if in_place else share_weights(model)
    shared.set_attn_implementation("eager")
    config: Any = shared.config

    def fit(adapter: Any) -> None:
        adapter.fit(config.projector_n_layers, config.vision_feature_layer)

    bridge: Any = build_bridge_from_module(
        shared,
        ARCHITECTURE,
        hf_config=config,
        model_name=model_name,
        post_adapter_hook=fit,
    )
    return BridgedMaira2.take_over(bridge, processor)

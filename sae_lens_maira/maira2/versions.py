"""Differences between the supported versions of transformers and TransformerLens, one function each. transformers 4.56
and 5 differ in how checkpoint keys are renamed, in what `get_image_features` returns and in the name of the rotary
settings in a saved configuration.

TransformerLens 2.17 has no TransformerBridge. No other module checks a version number.
"""

import inspect
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version

TRANSFORMERS = Version(version("transformers"))
TRANSFORMERS_5 = Version("5.0.0.dev0") <= TRANSFORMERS

# Published prefix -> module path. No escapes: transformers 4.56 writes the left sides as literal text when it saves.
# Order matters: the first pattern that matches is used.
KEY_RENAMES: dict[str, str] = {
    "^language_model.lm_head": "lm_head",
    "^language_model.model": "model.language_model",
    "^vision_tower": "model.vision_tower",
    "^multi_modal_projector": "model.multi_modal_projector",
}


def cache_keyword() -> str:
    """Name of the key-value cache argument of a model's forward: `cache` in new versions of transformers 5."""
    from transformers import LlavaModel

    return "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else "past_key_values"


def has_transformer_bridge() -> bool:
    """Whether the installed TransformerLens has the TransformerBridge (3.x)."""
    return Version("3.0.0") <= Version(version("transformer-lens"))


def register_key_renames(model_type: str) -> None:
    """Register the renames of the published keys of `model_type` with transformers 5.

    transformers 4.56 reads the class attribute `_checkpoint_conversion_mapping` instead.
    """
    if not TRANSFORMERS_5:
        return
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renames = [WeightRenaming(source_patterns=old, target_patterns=new) for old, new in KEY_RENAMES.items()]
    register_checkpoint_conversion_mapping(model_type, list(renames), overwrite=True)


def image_features_result(features: list[torch.Tensor], backbone_output: Any) -> Any:
    """Wrap features per image, each `(patches, d)`, in the format that this version's `LlavaModel.forward` expects."""
    if not TRANSFORMERS_5:
        return features
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    result = BaseModelOutputWithPooling(last_hidden_state=backbone_output.feature_maps[-1])
    result["pooler_output"] = features
    return result


def portable_text_config(text_config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite the rotary settings of a text configuration for the installed transformers.

    A configuration saved by transformers 5 has `rope_parameters`, which 4.56 silently ignores, so that positions would
    not be scaled. transformers 5 reads both names.
    """
    rope = text_config.get("rope_parameters")
    if TRANSFORMERS_5 or not rope:
        return text_config
    rewritten = {key: value for key, value in text_config.items() if key != "rope_parameters"}
    rope = dict(rope)
    if "rope_theta" in rope:
        rewritten["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        rewritten["rope_scaling"] = rope
    return rewritten


def declare_processor_parts(processor_class: Any) -> None:
    """Declare the classes of a processor's parts: transformers 4 needs this, transformers 5 warns about it."""
    if not TRANSFORMERS_5:
        processor_class.image_processor_class = "AutoImageProcessor"
        processor_class.tokenizer_class = "AutoTokenizer"

"""Everything that differs between the supported versions of the host libraries, and nothing else.

transformers 4.56 and 5 disagree on how checkpoint keys are renamed, on what `get_image_features` returns and
on the name of the rotary settings in a saved configuration; TransformerLens 2.17 has no TransformerBridge.
Each difference is one function here, so that no other module asks for a version number. This module knows
nothing about MAIRA-2 beyond the names of its parts.
"""

import inspect
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version

TRANSFORMERS = Version(version("transformers"))
TRANSFORMERS_5 = Version("5.0.0.dev0") <= TRANSFORMERS

# Published prefix -> live module path. No escapes: transformers 4.56 writes the left sides back as literal
# text when it saves. Order matters: the first pattern that fits wins.
KEY_RENAMES: dict[str, str] = {
    "^language_model.lm_head": "lm_head",
    "^language_model.model": "model.language_model",
    "^vision_tower": "model.vision_tower",
    "^multi_modal_projector": "model.multi_modal_projector",
}


def cache_keyword() -> str:
    """The name under which a model's forward takes the key-value cache: `cache` in new transformers 5."""
    from transformers import LlavaModel

    return "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else "past_key_values"


def has_transformer_bridge() -> bool:
    """Whether the installed TransformerLens has the TransformerBridge (3.x)."""
    return Version("3.0.0") <= Version(version("transformer-lens"))


def register_key_renames(model_type: str) -> None:
    """Tell transformers 5 how the published keys of `model_type` are called in the live module.

    transformers 4.56 reads the class attribute `_checkpoint_conversion_mapping` instead and needs nothing
    here.
    """
    if not TRANSFORMERS_5:
        return
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renames = [WeightRenaming(source_patterns=old, target_patterns=new) for old, new in KEY_RENAMES.items()]
    register_checkpoint_conversion_mapping(model_type, list(renames), overwrite=True)


def image_features_result(features: list[torch.Tensor], backbone_output: Any) -> Any:
    """Wrap per-image features, each `(patches, d)`, as this version's `LlavaModel.forward` reads them."""
    if not TRANSFORMERS_5:
        return features
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    result = BaseModelOutputWithPooling(last_hidden_state=backbone_output.feature_maps[-1])
    result["pooler_output"] = features
    return result


def portable_text_config(text_config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite the rotary settings of a text configuration for the installed transformers.

    A configuration saved by transformers 5 holds `rope_parameters`, which 4.56 silently ignores: the model
    would run with unscaled positions. transformers 5 reads both spellings.
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
    """Name the parts' classes on a processor class: transformers 4 wants it, transformers 5 warns of it."""
    if not TRANSFORMERS_5:
        processor_class.image_processor_class = "AutoImageProcessor"
        processor_class.tokenizer_class = "AutoTokenizer"

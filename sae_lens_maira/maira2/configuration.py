"""Configuration of MAIRA-2; the defaults are those of the published model.

`Maira2Config()` has the shape of Vicuna-7B-v1.5 with 207 added tokens and linear position scaling by 1.5, a Dinov2
ViT-B/14 at 518 px, and a projector of four linear layers. Unknown keys of a published `config.json` are kept as
attributes. Keywords that a *user* writes are checked by `make_config`.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from transformers import Dinov2Config, LlamaConfig, LlavaConfig

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.maira2.versions import portable_text_config

MAIRA2_TEXT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32207,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 1.5},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

MAIRA2_VISION: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 518,
    "patch_size": 14,
    "out_features": ["stage12"],
    "apply_layernorm": True,
    "reshape_hidden_states": False,
}


class Maira2Config(LlavaConfig):
    """Configuration of `Maira2ForConditionalGeneration`.

    Args:
        text_config: Llama configuration, or a dict of its keys; None for MAIRA-2's.
        vision_config: Dinov2 configuration, or a dict of its keys; None for MAIRA-2's.
        image_token_index: Token id of `<image>`.
        image_seq_length: Number of patches per image, 37 x 37 at 518 px.
        projector_n_layers: Number of linear layers in the projector.
        projector_hidden_act: Activation function between these layers.
        multimodal_projector_bias: Whether these layers have a bias.
        vision_feature_layer: Index into the backbone's feature maps.
        vision_feature_select_strategy: "default" drops the CLS position, "full" keeps it.
        tie_word_embeddings: Must be False; MAIRA-2's output head is a separate matrix.
        **kwargs: Further keys of a `config.json`; unknown keys are kept and ignored.
    """

    model_type = "maira2"

    if TYPE_CHECKING:  # transformers declares these as dicts, which they are only before __init__
        text_config: Any = None
        vision_config: Any = None

    def __init__(
        self,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        vision_config: Dinov2Config | dict[str, Any] | None = None,
        image_token_index: int = 32204,
        image_seq_length: int = 1369,
        projector_n_layers: int = 4,
        projector_hidden_act: str = "gelu",
        multimodal_projector_bias: bool = True,
        vision_feature_layer: int = -1,
        vision_feature_select_strategy: Literal["default", "full"] = "default",
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if text_config is None or isinstance(text_config, Mapping):
            text_config = LlamaConfig(**_without_type(portable_text_config(dict(text_config or MAIRA2_TEXT))))
        if vision_config is None or isinstance(vision_config, Mapping):
            vision_config = Dinov2Config(**_without_type(dict(vision_config or MAIRA2_VISION)))
        kwargs.setdefault("pad_token_id", text_config.pad_token_id)
        super().__init__(
            text_config=text_config,
            vision_config=vision_config,
            image_token_index=image_token_index,
            image_seq_length=image_seq_length,
            projector_hidden_act=projector_hidden_act,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            multimodal_projector_bias=multimodal_projector_bias,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.projector_n_layers = projector_n_layers

    @property
    def patches_per_side(self) -> int:
        """Number of patches along one side of the square image, 37 for MAIRA-2."""
        return self.vision_config.image_size // self.vision_config.patch_size


def make_config(**overrides: Any) -> Maira2Config:
    """Build a `Maira2Config` from keywords, and refuse unknown ones.

    `text_config` and `vision_config` may be dicts; their values replace MAIRA-2's.

    Raises:
        ConfigError: A keyword is unknown; the message names the closest known one.
    """
    known = set(Maira2Config.__init__.__code__.co_varnames[1:11]) | {"pad_token_id", "dtype"}
    check_keywords(overrides, known, "Maira2Config")
    for name, base in (("text_config", MAIRA2_TEXT), ("vision_config", MAIRA2_VISION)):
        part = overrides.get(name)
        if isinstance(part, Mapping):
            section = LlamaConfig() if name == "text_config" else Dinov2Config()
            check_keywords(part, set(section.to_dict()) | set(base), name)
            overrides[name] = {**base, **part}
    return Maira2Config(**overrides)


def check_keywords(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `ConfigError` with the closest match for the first keyword of `given` that is not in `known`."""
    known = sorted(known)
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}" if close else f"known are {', '.join(known)}"
            raise ConfigError(
                f"{what} was given the unknown key {key!r}; {hint}? Correct the spelling or remove the key."
            )


def _without_type(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "model_type"}

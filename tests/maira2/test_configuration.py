"""`Maira2Config()` is MAIRA-2 itself: parameters, names, rotary scaling, tolerance for unknown keys."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, Dinov2Config, LlamaConfig

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.maira2 import Maira2Config, Maira2ForConditionalGeneration, make_config, register

pytestmark = pytest.mark.compat


def published_names(layers: int = 32, blocks: int = 12) -> set[str]:
    """The tensor names of the published checkpoint."""
    names = {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"}
    names |= {"language_model.model.norm.weight"}
    for layer in range(layers):
        parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [
            f"mlp.{part}_proj" for part in ("gate", "up", "down")
        ]
        parts += ["input_layernorm", "post_attention_layernorm"]
        names |= {f"language_model.model.layers.{layer}.{part}.weight" for part in parts}
    embeddings = ["cls_token", "mask_token", "position_embeddings"]
    embeddings += [f"patch_embeddings.projection.{end}" for end in ("weight", "bias")]
    names |= {f"vision_tower.embeddings.{name}" for name in embeddings}
    for block in range(blocks):
        parts = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        parts += ["attention.output.dense", "norm1", "norm2", "mlp.fc1", "mlp.fc2"]
        ends = [f"{part}.{end}" for part in parts for end in ("weight", "bias")]
        ends += ["layer_scale1.lambda1", "layer_scale2.lambda1"]
        names |= {f"vision_tower.encoder.layer.{block}.{end}" for end in ends}
    names |= {f"vision_tower.layernorm.{end}" for end in ("weight", "bias")}
    names |= {f"multi_modal_projector.layers.{i}.{end}" for i in (0, 2, 4, 6) for end in ("weight", "bias")}
    return names


def test_the_default_model_has_the_published_parameters() -> None:
    with torch.device("meta"):
        model = Maira2ForConditionalGeneration(Maira2Config())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert len(sizes) == 522
    assert sum(sizes.values()) == 6_880_185_600
    parts = {"vision_tower": 86_580_480, "multi_modal_projector": 53_493_760}
    for part, wanted in parts.items():
        assert sum(size for name, size in sizes.items() if name.startswith(f"model.{part}.")) == wanted
    language = sum(
        size for name, size in sizes.items() if "language_model" in name or name.startswith("lm_head")
    )
    assert language == 6_740_111_360
    assert sizes["model.vision_tower.embeddings.position_embeddings"] == 1370 * 768
    for path in ("model.language_model.layers.31", "model.multi_modal_projector.layers.6", "lm_head"):
        model.get_submodule(path)


def test_a_model_of_full_depth_saves_exactly_the_published_names(tmp_path: Path) -> None:
    """Same depth as MAIRA-2, small widths: the written keys are the 522 of the published layout."""
    config = make_config(
        text_config={
            "vocab_size": 32,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        vision_config={"hidden_size": 8, "num_attention_heads": 2, "image_size": 28},
    )
    Maira2ForConditionalGeneration(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = set(file.keys())
    assert written == published_names()
    assert len(written) == 522


def test_default_values() -> None:
    """The defaults are those of the published config.json."""
    config: Any = Maira2Config()
    assert (config.model_type, config.image_token_index, config.image_seq_length) == ("maira2", 32204, 1369)
    assert (config.projector_n_layers, config.projector_hidden_act) == (4, "gelu")
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "default")
    assert (config.pad_token_id, config.tie_word_embeddings, config.patches_per_side) == (0, False, 37)
    text, vision = config.text_config, config.vision_config
    assert (text.vocab_size, text.rms_norm_eps, text.max_position_embeddings) == (32207, 1e-5, 4096)
    assert (vision.image_size, vision.patch_size, vision.apply_layernorm) == (518, 14, True)
    assert list(vision.out_features) == ["stage12"]
    assert not vision.reshape_hidden_states


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 1.5}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.5}, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 1.5, "rope_theta": 10000.0}},
    ],
    ids=["published", "transformers 4", "transformers 5"],
)
def test_positions_are_scaled_whichever_version_wrote_the_configuration(rope: dict[str, Any]) -> None:
    """inv_freq / 1.5: what transformers 5 wrote must not turn into unscaled positions under 4.56."""
    text = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "model_type": "llama"}
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    vision |= {"out_features": ["stage1"], "reshape_hidden_states": False, "model_type": "dinov2"}
    config = Maira2Config.from_dict({"text_config": text | rope, "vision_config": vision})
    assert isinstance(config, Maira2Config)
    rotary: Any = Maira2ForConditionalGeneration(config).model.language_model.rotary_emb
    wanted = 10000.0 ** -(torch.arange(0, 8, 2) / 8) / 1.5
    torch.testing.assert_close(rotary.inv_freq, wanted)


def test_configurations_survive_writing_and_reading(tmp_path: Path) -> None:
    config: Any = make_config(text_config={"num_hidden_layers": 3}, projector_n_layers=2, image_token_index=7)
    config.save_pretrained(tmp_path)
    register()
    read: Any = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, Maira2Config)
    same = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    assert {key: value for key, value in read.to_dict().items() if key != "_name_or_path"} == same
    assert (read.text_config.num_hidden_layers, read.projector_n_layers, read.image_token_index) == (3, 2, 7)


def test_unknown_keys_of_a_published_file_are_kept_and_ignored(tmp_path: Path) -> None:
    raw = Maira2Config().to_dict()
    raw |= {
        "auto_map": {"AutoConfig": "configuration_maira2.Maira2Config"},
        "hidden_size": 4096,
        "a_new_key": [1],
    }
    raw["text_config"]["another_new_key"] = True
    (tmp_path / "config.json").write_text(json.dumps(raw, default=str))
    register()
    config: Any = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, Maira2Config)
    assert config.a_new_key == [1]


def test_parts_may_be_configuration_objects() -> None:
    text, vision = LlamaConfig(num_hidden_layers=2), Dinov2Config(num_hidden_layers=2)
    config: Any = Maira2Config(text_config=text, vision_config=vision)
    assert config.text_config.num_hidden_layers == config.vision_config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"projector_layers": 3}, "did you mean 'projector_n_layers'"),
        (
            {"text_config": {"hidden_sizes": 3}},
            "text_config was given the unknown key 'hidden_sizes'.*'hidden_size'",
        ),
        ({"vision_config": {"patchsize": 3}}, "did you mean 'patch_size'"),
    ],
)
def test_an_unknown_key_from_a_user_is_refused_with_the_closest_match(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**overrides)

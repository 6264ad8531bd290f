"""The table of hook points: its names, what they resolve to, and what a wrong name says."""

from typing import Any

import pytest
from torch import nn

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import SPECS, HookedMaira2, PointTable

pytestmark = pytest.mark.compat


@pytest.fixture
def table(tiny: Any) -> PointTable:
    return PointTable(tiny.model.config)


@pytest.mark.parametrize(
    ("asked", "canonical"),
    [
        ("blocks.3.hook_resid_post", "blocks.3.hook_resid_post"),
        ("blocks.3.hook_out", "blocks.3.hook_resid_post"),
        ("blocks.0.hook_in", "blocks.0.hook_resid_pre"),
        ("model.language_model.layers.2", "blocks.2.hook_resid_post"),
        ("model.language_model.layers.2.self_attn", "blocks.2.hook_attn_out"),
        ("model.language_model.layers.2.self_attn.q_proj", "blocks.2.attn.hook_q"),
        ("blocks.1.attn.hook_out", "blocks.1.hook_attn_out"),
        ("blocks.1.mlp.gate.hook_out", "blocks.1.mlp.hook_pre"),
        ("embed", "hook_embed"),
        ("embed.hook_out", "hook_embed"),
        ("ln_final", "ln_final.hook_out"),
        ("unembed", "unembed.hook_out"),
        ("lm_head", "unembed.hook_out"),
        ("model.vision_tower", "vision_encoder.hook_out"),
        ("model.vision_tower.encoder.layer.1", "vision_encoder.blocks.1.hook_resid_post"),
        ("hook_vision_proj_out", "vision_projector.hook_out"),
        ("model.multi_modal_projector.layers.4", "vision_projector.4.hook_out"),
    ],
)
def test_every_kind_of_name_finds_its_point(table: PointTable, asked: str, canonical: str) -> None:
    assert table.resolve(asked).name == canonical


def test_names_and_aliases_are_unique_and_lead_home(table: PointTable) -> None:
    assert len(set(table.names)) == len(table.names)
    assert not set(table.aliases) & set(table.names), "an alias shadows a canonical name"
    for alias, name in table.aliases.items():
        assert table.resolve(alias).name == name


def test_the_table_covers_the_models_numbers(table: PointTable) -> None:
    assert table.counts == {"block": 4, "vision block": 3, "projector layer": 7}
    per_block = sum(spec.counted_by == "block" for spec in SPECS)
    assert sum(name.startswith("blocks.") for name in table.names) == 4 * per_block


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("blocks.1.hook_resid_pst", "blocks.1.hook_resid_post"),
        ("blocks.4.hook_resid_post", "0 to 3"),
        ("vision_encoder.blocks.3.hook_out", "this model has 3"),
        ("model.language_model.layers.9", "0 to 3"),
        ("blocks.0.ln1.hook_scale", "never leaves"),
        ("blocks.0.attn.hook_result", "hook_z"),
        ("ln_final.hook_normalized", "hook_out"),
        ("layer 3", "names` lists them all"),
    ],
)
def test_a_wrong_name_says_what_would_be_right(table: PointTable, asked: str, message: str) -> None:
    with pytest.raises(HookError, match=r"\.") as caught:
        table.resolve(asked)
    assert message in str(caught.value)
    assert repr(asked) in str(caught.value)


def test_stop_and_width_of_points(table: PointTable) -> None:
    assert table.resolve("blocks.2.hook_resid_pre").stop == 3
    assert table.resolve("vision_projector.2.hook_out").stop == 0
    assert table.resolve("unembed").stop is None
    assert table.width("blocks.0.attn.hook_z") == 64
    assert table.width("vision_encoder.hook_out") == 32
    assert table.width("blocks.0.mlp.hook_post") == 96
    assert table.width("blocks.0.attn.hook_pattern") is None


def test_widths_are_those_of_the_values(hooked_eager: HookedMaira2, encoding: Any) -> None:
    _, cache = hooked_eager.run_with_cache(encoding)
    assert sum(hooked_eager.points.width(name) is not None for name in cache) > 20
    for name, value in cache.items():
        width = hooked_eager.points.width(name)
        if width is not None:
            per_head = bool(hooked_eager.points.resolve(name).spec.heads)
            assert value.flatten(-2).shape[-1] == width if per_head else value.shape[-1] == width, name


def test_a_model_without_the_modules_is_refused(tiny: Any) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = tiny.model.config
            self.model = nn.Module()
            self.model.add_module("vision_model", nn.Linear(2, 2))

    with pytest.raises(HookError, match=r"no module 'model\.language_model.*vision_model"):
        HookedMaira2(Other())  # pyright: ignore[reportArgumentType]

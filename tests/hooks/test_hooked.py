"""HookedMaira2's caches and early stop: what is kept, under which names, and how far the model runs."""

from typing import Any

import pytest
import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import HookedMaira2

pytestmark = pytest.mark.compat

RESID = "blocks.1.hook_resid_post"


# Caches


def test_a_cache_holds_the_named_tensors_and_nothing_else(hooked: HookedMaira2, encoding: Any) -> None:
    names = [RESID, "blocks.2.attn.hook_z"]
    before = {name: live.calls for name, live in hooked.live.items()}
    _, cache = hooked.run_with_cache(encoding, names_filter=names)
    assert list(cache) == names
    assert {name for name, live in hooked.live.items() if live.calls > before[name]} == set(names)
    held = sum(value.untyped_storage().nbytes() for value in cache.values())
    assert held == sum(value.numel() * value.element_size() for value in cache.values())


def test_names_asked_for_are_keys_of_the_cache(hooked: HookedMaira2, encoding: Any) -> None:
    """SAELens reads the cache under the name its configuration has, alias or not."""
    asked = ["model.language_model.layers.1", "blocks.1.hook_out", RESID]
    _, cache = hooked.run_with_cache(encoding, names_filter=asked)
    assert set(cache) == set(asked)
    assert all(cache[name] is cache[RESID] for name in asked)


def test_a_function_chooses_names(hooked: HookedMaira2, encoding: Any) -> None:
    _, cache = hooked.run_with_cache(encoding, names_filter=lambda name: name.endswith("hook_resid_post"))
    assert [name for name in cache if name.startswith("blocks")] == [
        f"blocks.{i}.hook_resid_post" for i in range(4)
    ]


def test_caches_move_on_demand(hooked: HookedMaira2, encoding: Any) -> None:
    logits, cache = hooked.run_with_cache(encoding, names_filter=RESID, device="meta")
    assert cache[RESID].device.type == "meta"
    assert logits.device.type == "cpu"


def test_activation_cache_object(hooked: HookedMaira2, encoding: Any) -> None:
    """TransformerLens' own cache object reads ours with its short names."""
    _, cache = hooked.run_with_cache(encoding, return_cache_object=True)
    assert torch.equal(cache["resid_post", 1], cache[RESID])
    total = cache["resid_pre", 1] + cache["attn_out", 1] + cache["mlp_out", 1]
    assert torch.allclose(total, cache["resid_post", 1], atol=1e-4)
    assert cache.accumulated_resid(layer=2).shape[0] == 3


def test_pos_slice_and_remove_batch_dim(hooked: HookedMaira2, study: Any) -> None:
    _, whole = hooked.run_with_cache(study, names_filter=[RESID, "blocks.1.attn.hook_q"])
    _, last = hooked.run_with_cache(
        study, names_filter=[RESID, "blocks.1.attn.hook_q"], pos_slice=-1, remove_batch_dim=True
    )
    assert set(last) == set(whole) == {RESID, "blocks.1.attn.hook_q"}
    for name, value in last.items():
        assert torch.equal(value, whole[name][0, -1:]), name


# Stopping


@pytest.mark.parametrize("layer", [0, 2, 4, -1])
def test_stop_at_layer_returns_the_residual_stream(hooked: HookedMaira2, encoding: Any, layer: int) -> None:
    _, cache = hooked.run_with_cache(encoding)
    wanted = layer % 4 if layer < 0 else layer
    expected = cache[f"blocks.{wanted}.hook_resid_pre"] if wanted < 4 else cache["blocks.3.hook_resid_post"]
    with torch.no_grad():
        assert torch.equal(hooked(encoding, stop_at_layer=layer), expected)


def test_stop_at_layer_stops(hooked: HookedMaira2, encoding: Any, torch_hooks: Any) -> None:
    """Blocks from `stop_at_layer` on do not run."""
    ran = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(hooked.model.get_submodule("model.language_model.layers").children())
    ]
    hooked.run_with_cache(encoding, names_filter=RESID, stop_at_layer=2)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert torch_hooks(hooked.model) == 0


def test_a_stopped_run_leaves_later_runs_alone(hooked: HookedMaira2, encoding: Any) -> None:
    with torch.no_grad():
        before = hooked.model(**encoding.model_inputs(), output_hidden_states=True)
        hooked(encoding, stop_at_layer=1)
        after = hooked.model(**encoding.model_inputs(), output_hidden_states=True)
    assert len(after.hidden_states) == len(before.hidden_states) == 5
    assert torch.equal(before.logits, after.logits)


def test_a_vision_blocks_number_is_no_decoder_layer(hooked: HookedMaira2, encoding: Any) -> None:
    """SAELens takes the first number of the hook's name for the layer to stop at."""
    from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

    for name in ("vision_encoder.blocks.2.hook_resid_post", "vision_projector.6.hook_out"):
        stop = extract_stop_at_layer_from_tlens_hook_name(name)
        _, whole = hooked.run_with_cache(encoding, names_filter=name)
        _, stopped = hooked.run_with_cache(encoding, names_filter=[name], stop_at_layer=stop)
        assert torch.equal(whole[name], stopped[name])


def test_stops_that_cannot_be_meant(hooked: HookedMaira2, encoding: Any) -> None:
    with pytest.raises(HookError, match="4 blocks"):
        hooked(encoding, stop_at_layer=5)
    with pytest.raises(HookError, match=r"before blocks\.1\.hook_resid_post could fire"):
        hooked.run_with_cache(encoding, names_filter=RESID, stop_at_layer=1)
    with pytest.raises(HookError, match=r"unembed\.hook_out could fire"):
        hooked.run_with_cache(encoding, names_filter=["unembed"], stop_at_layer=4)

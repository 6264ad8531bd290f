"""Activation caches of HookedMaira2 and the bridge: every name, and decompositions that add up, images included."""

import copy
from typing import Any

import pytest
import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.maira2.versions import has_transformer_bridge

pytestmark = pytest.mark.compat

RESID = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def gained(eager: Maira2) -> Maira2:
    """The small model with norms whose gains are not one."""
    model = copy.deepcopy(eager.model)
    for name, parameter in model.named_parameters():
        if "language_model" in name and "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return Maira2(model, eager.processor)


@pytest.fixture(scope="module", params=["hooked", "bridge"] if has_transformer_bridge() else ["hooked"])
def run(request: pytest.FixtureRequest, gained: Maira2, encoding: Any) -> Any:
    """(host, logits, cache, positions that are not padding)."""
    host: Any = HookedMaira2(gained)
    if request.param == "bridge":
        from sae_lens_maira.hooks import to_bridge

        host = to_bridge(gained)
    with torch.no_grad():
        logits, cache = host.run_with_cache(encoding, return_cache_object=True)
    return host, logits, cache, encoding.attention_mask.bool()


def test_names_aliases_and_shorthand_find_the_same_value(run: Any) -> None:
    _, _, cache, _ = run
    value = cache[RESID]
    for key in ("blocks.1.hook_out", "model.language_model.layers.1", ("resid_post", 1), ("resid_post", -3)):
        assert torch.equal(cache[key], value), key
    assert cache["q", 2].shape[-2:] == (4, 16)
    with pytest.raises(KeyError):
        cache["blocks.9.hook_resid_post"]


def test_the_stream_is_the_sum_of_its_parts_at_image_positions_too(run: Any) -> None:
    """TransformerLens takes hook_embed, where the image tokens are still placeholders."""
    _, _, cache, _ = run
    parts, labels = cache.decompose_resid(return_labels=True)
    torch.testing.assert_close(parts.sum(0), cache["resid_post", 3], atol=1e-4, rtol=1e-4)
    assert labels[:2] == ["embed", "0_attn_out"]
    assert not torch.equal(cache["hook_embed"], cache["resid_pre", 0]), "hook_embed itself is untouched"
    for expand in (True, False):
        full = cache.get_full_resid_decomposition(expand_neurons=expand)
        torch.testing.assert_close(full.sum(0), cache["resid_post", 3], atol=1e-4, rtol=1e-4)
    early = cache.decompose_resid(layer=2, mlp_input=True, apply_ln=True).sum(0)
    torch.testing.assert_close(early, cache["blocks.2.ln2.hook_out"], atol=1e-4, rtol=1e-4)


def test_direct_logit_attribution_adds_up_to_the_logits(run: Any) -> None:
    host, logits, cache, real = run
    tokens = torch.full(logits.shape[:2], 7)
    attributed = cache.logit_attrs(cache.decompose_resid(), tokens).sum(0)
    assert (attributed - logits[..., 7])[real].abs().max() < 1e-4
    if has_transformer_bridge():
        projected = cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=host.W_U[:, 7])
        assert (projected.sum(0) - logits[..., 7])[real].abs().max() < 1e-4


def test_heads_and_accumulated_streams(run: Any) -> None:
    host, logits, cache, real = run
    heads, labels = cache.stack_head_results(layer=1, return_labels=True)
    torch.testing.assert_close(heads.sum(0), cache["attn_out", 0], atol=1e-4, rtol=1e-4)
    assert labels == ["L0H0", "L0H1", "L0H2", "L0H3"]
    streams = cache.accumulated_resid(incl_mid=True)
    assert torch.equal(streams[1], cache["resid_mid", 0])
    assert len(streams) == 9
    last = cache.accumulated_resid(apply_ln=True)[-1] @ host.W_U
    assert (last - logits)[real].abs().max() < 1e-4


def test_a_decomposition_without_the_embedding_is_refused(run: Any, encoding: Any) -> None:
    host = run[0]
    names = ["hook_embed", *(f"blocks.{i}.hook_{part}_out" for i in range(4) for part in ("attn", "mlp"))]
    _, cache = host.run_with_cache(encoding, names_filter=names, return_cache_object=True)
    with pytest.raises(HookError, match=r"does not contain blocks\.0\.hook_resid_pre"):
        cache.decompose_resid()


def test_text_of_tokens(run: Any) -> None:
    """Strings of tokens are the same from a text, from its ids and in a batch."""
    host = run[0]
    text = "The heart size is normal."
    ids = host.to_tokens(text)
    strings = host.to_str_tokens(text)
    assert strings[:2] == ["<s>", "The"]
    assert host.to_str_tokens(ids) == strings
    assert host.to_str_tokens([text, text]) == [strings, strings]
    assert host.to_string(ids[0]).endswith(text)
    assert host.to_string(ids) == [host.to_string(ids[0])]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_returns_the_values_of_generated_tokens(
    gained: Maira2, prompt: Any, studies: Any, use_cache: bool
) -> None:
    """Position i of the cache belongs to token i: the values of a later run over the whole text."""
    hooked = HookedMaira2(gained)
    names = [RESID, "blocks.1.hook_out", "vision_projector.hook_out", "blocks.2.attn.hook_z"]
    ids, cache = hooked.generate(
        prompt, 6, names_filter=names, device="cpu", eos_token_id=None, use_cache=use_cache
    )
    assert torch.equal(ids, hooked.generate(prompt, 6, eos_token_id=None))
    whole = prompt.extend(ids[:, prompt.input_ids.shape[1] :])
    _, later = hooked.run_with_cache(whole, names_filter=names)
    real = whole.attention_mask.bool()[:, :-1]
    for name in (RESID, "blocks.2.attn.hook_z"):
        assert cache[name].shape[:2] == (2, ids.shape[1] - 1)
        assert (cache[name] - later[name][:, :-1])[real].abs().max() < 1e-3
    assert torch.equal(cache["blocks.1.hook_out"], cache[RESID])
    assert torch.equal(cache["vision_projector.hook_out"], later["vision_projector.hook_out"])
    reports, _ = hooked.generate(
        studies[0], 4, return_type="reports", names_filter=lambda name: name == RESID
    )
    assert len(reports) == 1
    with pytest.raises(HookError, match="num_beams > 1"):
        hooked.generate(prompt, 2, names_filter=RESID, num_beams=2)
    with pytest.raises(HookError, match="hook_pattern"):
        hooked.generate(prompt, 2, names_filter="blocks.0.attn.hook_pattern")
    assert not any(live.active for live in hooked.live.values())

"""The bridge: a weight-sharing copy of the model, registered without boot_transformers, with names that always work."""

# pyright: reportPossiblyUnboundVariable=false
# nnsight's traces may swallow exceptions by their type; they do not.

import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_maira.errors import HookError, PromptError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.maira2.versions import has_transformer_bridge

RESID = "blocks.1.hook_resid_post"
TEXT = torch.ones(1, 4, dtype=torch.long)


@pytest.mark.compat
def test_without_a_bridge_the_import_says_so() -> None:
    if has_transformer_bridge():
        from sae_lens_maira.hooks import to_bridge

        assert callable(to_bridge)
        return
    with pytest.raises(HookError, match="has no TransformerBridge"):
        __import__("sae_lens_maira.hooks.bridge")


@pytest.mark.compat
def test_the_entry_point_is_declared() -> None:
    names = {point.name: point.value for point in entry_points(group="transformer_lens.architectures")}
    assert names["Maira2ForConditionalGeneration"] == "sae_lens_maira.hooks.bridge:Maira2ArchitectureAdapter"


def test_transformer_lens_finds_the_adapter_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any call of ours, and neither way of registering warns about the other."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    from sae_lens_maira.hooks.bridge import Maira2ArchitectureAdapter, register_adapter

    for first, second in (
        (ArchitectureAdapterFactory.discover_entry_points, register_adapter),
        (register_adapter, ArchitectureAdapterFactory.discover_entry_points),
    ):
        adapters = dict(ArchitectureAdapterFactory._adapters)
        adapters.pop("Maira2ForConditionalGeneration", None)
        monkeypatch.setattr(ArchitectureAdapterFactory, "_adapters", adapters)
        monkeypatch.setattr(ArchitectureAdapterFactory, "_entry_points_discovered", False)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            first()
            assert adapters["Maira2ForConditionalGeneration"] is Maira2ArchitectureAdapter
            second()


def test_no_source_of_ours_boots() -> None:
    """boot_transformers refuses outside architectures and may run pip install torchvision."""
    import sae_lens_maira.hooks as package

    sources = list(Path(str(package.__file__)).parent.glob("*.py"))
    assert len(sources) > 10
    for path in sources:
        calls = [line for line in path.read_text().splitlines() if ".boot_transformers(" in line]
        assert not calls, path


def test_the_model_is_left_alone_and_the_weights_are_shared(
    processor: Any, tiny: Maira2, encoding: Any
) -> None:
    from sae_lens_maira.hooks import to_bridge

    keys = list(tiny.model.state_dict())
    types = [type(module) for module in tiny.model.modules()]
    with torch.no_grad():
        before = tiny.model(**encoding.model_inputs()).logits
    bridge = to_bridge(tiny)
    with torch.no_grad():
        assert torch.equal(tiny.model(**encoding.model_inputs()).logits, before)
        # Eager and fused attention agree to rounding, but for what padding looks at.
        real = encoding.attention_mask.bool()
        assert (bridge(encoding) - before)[real].abs().max() <= 1e-4 * before.abs().max()
    assert list(tiny.model.state_dict()) == keys
    assert [type(module) for module in tiny.model.modules()] == types
    assert tiny.model.config.text_config._attn_implementation == "sdpa"
    ours = {parameter.data_ptr() for parameter in tiny.model.parameters()}
    extra = [p.numel() for p in bridge.original_model.parameters() if p.data_ptr() not in ours]
    assert sum(extra) <= tiny.model.config.text_config.vocab_size, (
        "the unembedding's bias of zeros is new, no more"
    )


def test_values_are_those_of_plain_torch_hooks(bridge: Any, encoding: Any, reference: Any) -> None:
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(encoding)
        assert torch.equal(bridge(encoding), reference.logits)
    assert torch.equal(logits, reference.logits)
    reference.assert_same(dict(cache.items()))


def test_bridge_generates_transformers_greedy_ids(eager: Maira2, bridge: Any, prompt: Any) -> None:
    """Under transformers 5.24 TransformerLens 3.9 alone loses the KV cache and writes other tokens."""
    with torch.no_grad():
        expected = eager.model.generate(**prompt.model_inputs(), max_new_tokens=8, do_sample=False)
        assert torch.equal(bridge.generate(prompt, 8), expected)
        tensors = prompt.model_inputs()
        ids = tensors.pop("input_ids")
        found = bridge.hf_generate(ids, **tensors, max_new_tokens=8, do_sample=False, return_type="tokens")
    assert torch.equal(found, expected)


def test_the_tokenizer_is_the_callers_own(bridge: Any, eager: Maira2) -> None:
    """Given to TransformerLens' builder it would be loaded again from a path that it may not have."""
    assert bridge.tokenizer is eager.processor.tokenizer
    assert bridge.processor is eager.processor
    assert bridge.to_tokens("The heart size is normal.")[0, 0] == eager.processor.tokenizer.bos_token_id


def test_in_place_gives_the_model_up(processor: Any, eager: Maira2, encoding: Any) -> None:
    from sae_lens_maira.hooks import to_bridge
    from sae_lens_maira.hooks._shared import share_weights

    model = share_weights(eager.model)
    bridge = to_bridge(model, processor, in_place=True)
    assert bridge.original_model is model
    with torch.no_grad():
        assert torch.equal(bridge(encoding), eager.model(**encoding.model_inputs()).logits)


def test_a_hooked_and_traced_model_can_be_bridged(eager: Maira2, encoding: Any) -> None:
    """Hooks and nnsight's instrumentation stay with the original."""
    from sae_lens_maira.hooks import Maira2NNsight, to_bridge

    traced, hooked, seen = Maira2NNsight(eager), HookedMaira2(eager), []
    with torch.no_grad():
        expected = hooked(encoding)
        with hooked.hooks([(RESID, lambda x, hook: seen.append(1))]):
            bridge = to_bridge(eager)
            assert torch.equal(bridge(encoding), expected)
            assert seen == []
            hooked(encoding)
        with traced.trace(encoding):
            value = traced.resid_post[1].save()
    assert seen == [1]
    assert value.shape[0] == 3


def test_a_dispatched_model_is_refused(eager: Maira2) -> None:
    from sae_lens_maira.hooks import to_bridge
    from sae_lens_maira.hooks._shared import share_weights

    model = share_weights(eager.model)
    object.__setattr__(model.lm_head, "_hf_hook", object())
    with pytest.raises(HookError, match="dispatched by accelerate"):
        to_bridge(model)


def test_aliases_work_where_saelens_loses_them(bridge: Any, encoding: Any) -> None:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    assert isinstance(bridge, SAETransformerBridge)
    seen = []
    with torch.no_grad():
        for name in (RESID, "blocks.1.hook_out", "model.language_model.layers.1", "hook_embed"):
            _, cache = bridge.run_with_cache(encoding, names_filter=[name])
            assert name in cache
            bridge.run_with_hooks(encoding, fwd_hooks=[(name, lambda x, hook: seen.append(1))])
        bridge.add_hook(RESID, lambda x, hook: seen.append(1))
        bridge(encoding)
        bridge.reset_hooks()
        bridge(encoding)
    assert len(seen) == 5


def test_stop_at_layer(bridge: Any, encoding: Any) -> None:
    """The output is the residual stream after the last block that ran, bit for bit."""
    with torch.no_grad():
        out, cache = bridge.run_with_cache(encoding, names_filter=[RESID], stop_at_layer=2)
    assert torch.equal(out, cache[RESID])


def test_unknown_and_silent_hooks_are_errors(bridge: Any, encoding: Any) -> None:
    """TransformerLens' bridge lets both pass."""
    quiet = [("vision_projector.hook_out", lambda x, hook: x)]
    with pytest.raises(HookError, match="Unknown hook point"):
        bridge.run_with_hooks(encoding, fwd_hooks=[("blocks.1.resid", lambda x, hook: x)])
    with pytest.raises(HookError, match="Unknown hook point"):
        bridge.run_with_cache(encoding, names_filter="blocks.1.resid")
    with pytest.raises(HookError, match="Unknown hook point"):
        bridge.add_hook("blocks.1.resid", lambda x, hook: x)
    with pytest.raises(HookError, match="never fired"):
        bridge.run_with_hooks(TEXT, fwd_hooks=quiet)
    with pytest.raises(HookError, match="never fired"), bridge.hooks(quiet):
        bridge.generate(TEXT, 2)
    with pytest.raises(HookError, match="never fired"):
        bridge.run_with_cache(TEXT, names_filter=["vision_projector.hook_out"])


def test_images_and_placeholders_must_agree(bridge: Any, prompt: Any) -> None:
    for call in (bridge, bridge.run_with_cache, bridge.generate):
        with pytest.raises(PromptError, match="no pixel_values"):
            call(prompt.input_ids)
        with pytest.raises(PromptError, match="image placeholders"):
            call(TEXT, pixel_values=prompt.pixel_values)
        with pytest.raises(PromptError, match="image placeholders"):
            call(prompt.input_ids, pixel_values=prompt.pixel_values[1:])


def test_generation_without_a_cache_would_lose_the_images(bridge: Any, prompt: Any) -> None:
    with pytest.raises(HookError, match="first token only"):
        bridge.generate(prompt, 2, use_past_kv_cache=False)


def test_after_an_exception_in_a_hook_none_remains(bridge: Any, encoding: Any) -> None:
    def boom(x: torch.Tensor, hook: Any) -> None:
        raise RuntimeError("boom")

    with torch.no_grad():
        before = bridge(encoding)
        with pytest.raises(RuntimeError, match="boom"):
            bridge.run_with_hooks(encoding, fwd_hooks=[(RESID, boom)])
        assert torch.equal(bridge(encoding), before)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_gradients_flow_to_every_point(bridge: Any, encoding: Any, hooked_eager: HookedMaira2) -> None:
    caught: dict[str, torch.Tensor] = {}
    names = hooked_eager.points.names

    def keep(asked: str) -> Any:
        return lambda grad, hook: caught.update({asked: grad.clone()})

    with bridge.hooks(bwd_hooks=[(name, keep(name)) for name in names]):
        bridge(encoding).logsumexp(-1).sum().backward()
    bridge.zero_grad()
    assert set(caught) == set(names)
    assert all(gradient.abs().sum() > 0 for gradient in caught.values())


def test_resid_mid_is_an_sae_free_zone(bridge: Any) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=64))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_mid"
    with pytest.raises(HookError, match="Use HookedMaira2"):
        bridge.add_sae(sae)


def test_studies_are_inputs(bridge: Any, hooked_eager: HookedMaira2, studies: Any) -> None:
    """Logits and generated tokens of studies equal those of HookedMaira2, bit for bit."""
    with torch.no_grad():
        assert torch.equal(bridge(studies, report="teacher"), hooked_eager(studies, report="teacher"))
    assert torch.equal(bridge.generate(studies[:2], 4), hooked_eager.generate(studies[:2], 4))

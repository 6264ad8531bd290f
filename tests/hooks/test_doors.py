"""One name, one tensor: every door gives what a plain torch hook gives, bit for bit, in fp32 and eager attention."""

from typing import Any

import pytest
import torch

from sae_lens_maira.hooks import SPECS, HookedMaira2, Maira2NNsight, PointTable
from sae_lens_maira.maira2 import Maira2, Maira2Encoding
from sae_lens_maira.maira2.versions import has_transformer_bridge

pytestmark = [
    pytest.mark.compat,
    # transformers 5.24 renames a keyword that TransformerLens 3.9 still uses.
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]


def by_torch_hooks(maira2: Maira2, encoding: Maira2Encoding) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the value at every point, by hooks written out here."""
    model, found, handles = maira2.model, {}, []
    table = PointTable(model.config)

    def keep(name: str, value: Any) -> None:
        point = table.points[name]
        value = value[0] if isinstance(value, tuple) and point.spec.tap != "pattern" else value
        if point.spec.tap == "pattern":
            value = value[1]
        if point.spec.tap == "feature_map":
            value = value.feature_maps[-1]
        if point.spec.heads:
            value = value.reshape(*value.shape[:-1], 4, 16)
        found[name] = value.detach().clone()

    for name, point in table.points.items():
        module = model.get_submodule(point.module)
        if point.spec.tap == "input":
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _, __, out, name=name: keep(name, out)))
    try:
        with torch.no_grad():
            logits = model(**encoding.model_inputs()).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, found


@pytest.fixture(scope="module")
def reference(eager: Maira2, encoding: Maira2Encoding) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return by_torch_hooks(eager, encoding)


@pytest.fixture(scope="module")
def nnsight_model(eager: Maira2) -> Maira2NNsight:
    return Maira2NNsight(eager)


@pytest.fixture(scope="module")
def bridge(eager: Maira2) -> Any:
    if not has_transformer_bridge():
        pytest.skip("TransformerLens 2.17 has no bridge")
    from sae_lens_maira.hooks import to_bridge

    return to_bridge(eager)


def assert_same(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert set(reference) <= set(found)
    for name, value in reference.items():
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


def test_hooked_maira2(eager: Maira2, encoding: Maira2Encoding, reference: Any) -> None:
    logits, cache = HookedMaira2(eager).run_with_cache(encoding)
    assert torch.equal(logits, reference[0])
    assert_same(cache, reference[1])


def test_nnsight(nnsight_model: Maira2NNsight, encoding: Maira2Encoding, reference: Any) -> None:
    found = {}
    with torch.no_grad(), nnsight_model.trace(encoding):
        for name in nnsight_model.points.names:
            found[name] = nnsight_model.at[name].save()
        out = nnsight_model.output.save()
    assert torch.equal(out.logits, reference[0])
    assert_same(found, reference[1])


def test_bridge(bridge: Any, encoding: Maira2Encoding, reference: Any) -> None:
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(encoding)
        assert torch.equal(bridge(encoding), reference[0])
    assert torch.equal(logits, reference[0])
    assert_same(dict(cache.items()), reference[1])


def test_transformers_hidden_states(eager: Maira2, encoding: Maira2Encoding, reference: Any) -> None:
    with torch.no_grad():
        out = eager.model(**encoding.model_inputs(), output_hidden_states=True)
    for i in range(4):
        assert torch.equal(out.hidden_states[i], reference[1][f"blocks.{i}.hook_resid_pre"])
    assert torch.equal(out.hidden_states[4], reference[1]["ln_final.hook_out"])


# The last vision block: transformers 5 collects its output in a hook, behind which an edit would be lost.
EDITED = [spec.name.replace("{i}", "1" if spec.counted_by == "block" else "2") for spec in SPECS]


@pytest.mark.parametrize("point", EDITED)
def test_an_edit_is_the_same_edit_through_every_door(
    eager: Maira2,
    nnsight_model: Maira2NNsight,
    encoding: Maira2Encoding,
    reference: Any,
    point: str,
    request: pytest.FixtureRequest,
) -> None:
    def edit(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        return value * 1.5

    with torch.no_grad():
        hooked = HookedMaira2(eager).run_with_hooks(encoding, fwd_hooks=[(point, edit)])
        assert not torch.equal(hooked, reference[0]), "the edit changed nothing"
        if not point.endswith(("hook_resid_mid", "hook_pattern")):  # nnsight can only read these two
            with nnsight_model.trace(encoding):
                nnsight_model.at[point] = edit(nnsight_model.at[point])
                out = nnsight_model.output.save()
            assert torch.equal(out.logits, hooked)
        if has_transformer_bridge():
            bridge = request.getfixturevalue("bridge")
            assert torch.equal(bridge.run_with_hooks(encoding, fwd_hooks=[(point, edit)]), hooked)


def test_no_hook_no_difference(tiny: Maira2, encoding: Maira2Encoding) -> None:
    """Wrapped by HookedMaira2 and nnsight at once, the model under sdpa gives transformers' own logits."""
    with torch.no_grad():
        before = tiny.model(**encoding.model_inputs()).logits
        hooked, traced = HookedMaira2(tiny), Maira2NNsight(tiny)
        assert torch.equal(hooked(encoding), before)
        assert torch.equal(traced(**encoding.model_inputs()).logits, before)
        assert torch.equal(tiny.model(**encoding.model_inputs()).logits, before)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_gives_transformers_greedy_ids(
    eager: Maira2, nnsight_model: Maira2NNsight, prompt: Maira2Encoding, use_cache: bool
) -> None:
    with torch.no_grad():
        expected = eager.model.generate(
            **prompt.model_inputs(), max_new_tokens=8, do_sample=False, use_cache=use_cache
        )
    assert torch.equal(HookedMaira2(eager).generate(prompt, 8, use_cache=use_cache), expected)
    assert torch.equal(nnsight_model.generate(prompt, max_new_tokens=8, use_cache=use_cache), expected)


def test_bridge_generates_transformers_greedy_ids(eager: Maira2, bridge: Any, prompt: Maira2Encoding) -> None:
    """Under transformers 5.24 TransformerLens 3.9 alone loses the KV cache and writes other tokens."""
    with torch.no_grad():
        expected = eager.model.generate(**prompt.model_inputs(), max_new_tokens=8, do_sample=False)
        assert torch.equal(bridge.generate(prompt, 8), expected)
        tensors = prompt.model_inputs()
        ids = tensors.pop("input_ids")
        found = bridge.hf_generate(ids, **tensors, max_new_tokens=8, do_sample=False, return_type="tokens")
    assert torch.equal(found, expected)


def test_steering_every_token_is_the_same_through_every_door(
    eager: Maira2, nnsight_model: Maira2NNsight, prompt: Maira2Encoding, request: pytest.FixtureRequest
) -> None:
    name, vector = "blocks.1.hook_resid_post", torch.randn(64) * 3
    hooked = HookedMaira2(eager)
    plain = hooked.generate(prompt, 8)
    with hooked.hooks([(name, lambda x, hook: x + vector)]):
        steered = hooked.generate(prompt, 8)
    assert not torch.equal(steered, plain)
    assert torch.equal(nnsight_model.generate_edited(prompt, {name: lambda x, _: x + vector}, 8), steered)
    if has_transformer_bridge():
        bridge = request.getfixturevalue("bridge")
        with torch.no_grad(), bridge.hooks([(name, lambda x, hook: x + vector)]):
            assert torch.equal(bridge.generate(prompt, 8), steered)

"""One name, one tensor: every interface gives what a torch hook gives, bit for bit, in fp32 and eager attention."""

# pyright: reportPossiblyUnboundVariable=false
# nnsight's traces may swallow exceptions by their type; they do not.

from typing import Any

import pytest
import torch

from sae_lens_maira.hooks import SPECS, HookedMaira2, Maira2NNsight
from sae_lens_maira.maira2 import Maira2, Maira2Encoding
from sae_lens_maira.maira2.versions import has_transformer_bridge

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def nnsight_model(eager: Maira2) -> Maira2NNsight:
    return Maira2NNsight(eager)


def test_hooked_maira2(eager: Maira2, encoding: Maira2Encoding, reference: Any) -> None:
    """Logits and every hook point equal those of plain torch hooks, bit for bit."""
    logits, cache = HookedMaira2(eager).run_with_cache(encoding)
    assert torch.equal(logits, reference.logits)
    reference.assert_same(cache)


def test_nnsight(nnsight_model: Maira2NNsight, encoding: Maira2Encoding, reference: Any) -> None:
    """Logits and every hook point equal those of plain torch hooks, bit for bit."""
    found = {}
    with torch.no_grad(), nnsight_model.trace(encoding):
        for name in nnsight_model.points.names:
            found[name] = nnsight_model.at[name].save()
        out = nnsight_model.output.save()
    assert torch.equal(out.logits, reference.logits)
    reference.assert_same(found)


def test_transformers_hidden_states(eager: Maira2, encoding: Maira2Encoding, reference: Any) -> None:
    with torch.no_grad():
        out = eager.model(**encoding.model_inputs(), output_hidden_states=True)
    for i in range(4):
        assert torch.equal(out.hidden_states[i], reference.values[f"blocks.{i}.hook_resid_pre"])
    assert torch.equal(out.hidden_states[4], reference.values["ln_final.hook_out"])


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
        assert not torch.equal(hooked, reference.logits), "the edit changed nothing"
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
    inputs: Any = encoding.model_inputs()
    with torch.no_grad():
        before = tiny.model(**inputs).logits
        hooked, traced = HookedMaira2(tiny), Maira2NNsight(tiny)
        assert torch.equal(hooked(encoding), before)
        assert torch.equal(traced(**inputs).logits, before)
        assert torch.equal(tiny.model(**inputs).logits, before)


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

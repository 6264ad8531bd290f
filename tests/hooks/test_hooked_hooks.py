"""HookedMaira2's hooks: they fire or it is an error, their edits count, and none remains."""

from typing import Any

import pytest
import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.hooks._shared import share_weights
from sae_lens_maira.maira2 import Maira2

pytestmark = pytest.mark.compat

RESID = "blocks.1.hook_resid_post"


def test_unknown_names_are_refused_everywhere(hooked: HookedMaira2, encoding: Any) -> None:
    def hook(x: torch.Tensor, hook: Any) -> None: ...

    with pytest.raises(HookError, match="Unknown hook point"):
        hooked.run_with_hooks(encoding, fwd_hooks=[("blocks.1.resid", hook)])
    with pytest.raises(HookError, match="Unknown hook point"):
        hooked.run_with_cache(encoding, names_filter=["blocks.1.resid"])
    with pytest.raises(HookError, match="Unknown hook point"):
        hooked.add_hook("blocks.1.resid", hook)


def test_a_hook_that_never_fires_is_an_error(hooked: HookedMaira2, encoding: Any, torch_hooks: Any) -> None:
    text = torch.ones(1, 4, dtype=torch.long)
    vision = "vision_projector.hook_out"
    quiet = [(vision, lambda x, hook: x)]
    with pytest.raises(HookError, match="only when the model sees pixel_values"):
        hooked.run_with_hooks(text, fwd_hooks=quiet)
    with pytest.raises(HookError, match="only when the model sees pixel_values"), hooked.hooks(quiet):
        hooked.generate(text, 2)
    with pytest.raises(HookError, match="never fired"), hooked.hooks([(RESID, lambda x, hook: x)]):
        pass
    with pytest.raises(HookError, match="never fired"):
        hooked.run_with_cache(text, names_filter=vision)
    with pytest.raises(HookError, match="never fired"):
        hooked.run_with_hooks(encoding, fwd_hooks=[(RESID, lambda x, hook: x)], stop_at_layer=1)
    hooked.add_hook(vision, lambda x, hook: x)
    try:
        with pytest.raises(HookError, match="never fired"):
            hooked(text)
        with pytest.raises(HookError, match="never fired"):
            hooked.generate(text, 2)
        hooked(encoding)
    finally:
        hooked.reset_hooks()
    hooked(text)
    assert torch_hooks(hooked.model) == 0


def test_hooks_chosen_by_a_function_may_stay_silent(hooked: HookedMaira2) -> None:
    seen = []
    text = torch.ones(1, 4, dtype=torch.long)
    hooked.run_with_hooks(text, fwd_hooks=[(lambda name: True, lambda x, hook: seen.append(hook.name))])
    assert RESID in seen
    assert not any(name.startswith("vision") for name in seen)


def test_vision_hooks_fire_once_and_block_hooks_for_every_token(hooked: HookedMaira2, prompt: Any) -> None:
    shapes: dict[str, list[tuple[int, ...]]] = {"vision_projector.hook_out": [], RESID: []}
    pairs = [(name, lambda x, hook: shapes[hook.name].append(tuple(x.shape))) for name in shapes]
    with hooked.hooks(pairs):
        hooked.generate(prompt, 4, eos_token_id=None)
    length = prompt.input_ids.shape[1]
    assert shapes["vision_projector.hook_out"] == [(3, 16, 64)]
    assert shapes[RESID] == [(2, length, 64)] + [(2, 1, 64)] * 3


@pytest.mark.parametrize("way", ["run_with_hooks", "hooks", "run_with_cache", "generate"])
def test_after_an_exception_in_a_hook_none_remains(
    hooked: HookedMaira2, encoding: Any, prompt: Any, way: str, torch_hooks: Any
) -> None:
    def boom(x: torch.Tensor, hook: Any) -> None:
        raise RuntimeError("boom")

    before = hooked(encoding)
    pairs = [(RESID, boom), ("blocks.2.attn.hook_q", lambda x, hook: x)]

    def in_context() -> None:
        with hooked.hooks(pairs):
            {"hooks": hooked, "run_with_cache": hooked.run_with_cache}[way](encoding)

    def generate() -> None:
        with hooked.hooks(pairs):
            hooked.generate(prompt, 2)

    def run_with_hooks() -> None:
        hooked.run_with_hooks(encoding, fwd_hooks=pairs)

    run = {"generate": generate, "run_with_hooks": run_with_hooks}.get(way, in_context)
    with pytest.raises(RuntimeError, match="boom"):
        run()
    assert torch_hooks(hooked.model) == 0
    assert not any(live.active for live in hooked.live.values())
    assert torch.equal(hooked(encoding), before)


def test_a_hook_must_keep_the_shape(hooked: HookedMaira2, encoding: Any) -> None:
    with pytest.raises(HookError, match=r"returned \(3, \d+, 32\), but the value there has shape"):
        hooked.run_with_hooks(encoding, fwd_hooks=[(RESID, lambda x, hook: x[..., :32])])
    with pytest.raises(HookError, match="returned str"):
        hooked.run_with_hooks(encoding, fwd_hooks=[(RESID, lambda x, hook: "x")])


def test_in_place_edits_count(hooked: HookedMaira2, encoding: Any) -> None:
    def in_place(x: torch.Tensor, hook: Any) -> None:
        x[:, -1] += 1

    def returned(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[:, -1] += 1
        return x

    for name in (RESID, "blocks.1.attn.hook_z", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_pre"):
        with torch.no_grad():
            one = hooked.run_with_hooks(encoding, fwd_hooks=[(name, in_place)])
            other = hooked.run_with_hooks(encoding, fwd_hooks=[(name, returned)])
        assert torch.equal(one, other), name
        assert not torch.equal(one, hooked(encoding)), name


def test_an_edit_at_resid_mid_reaches_stream_and_mlp(hooked: HookedMaira2, encoding: Any) -> None:
    """resid_mid + v equals attn_out + v, and post equals mid + mlp_out, edited or not."""
    vector = torch.randn(64)

    def steer(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x + vector

    with torch.no_grad(), hooked.hooks([("blocks.1.hook_resid_mid", steer)]):
        logits, cache = hooked.run_with_cache(
            encoding, names_filter=[RESID, "blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid"]
        )
    total = cache["blocks.1.hook_resid_mid"] + cache["blocks.1.hook_mlp_out"]
    assert torch.equal(cache[RESID], total)
    with torch.no_grad():
        other = hooked.run_with_hooks(encoding, fwd_hooks=[("blocks.1.hook_attn_out", steer)])
    assert torch.allclose(logits, other, atol=1e-3)


def test_hooks_before_and_after_the_first_forward_are_alike(eager: Maira2, encoding: Any) -> None:
    """transformers 5 installs capturing hooks in the first forward; ours must stand before them either way."""
    fresh = HookedMaira2(Maira2(share_weights(eager.model), eager.processor))  # has never run
    pair = [("vision_encoder.blocks.2.hook_resid_post", lambda x, hook: x * 2)]
    with torch.no_grad():
        first = fresh.run_with_hooks(encoding, fwd_hooks=pair)
        second = fresh.run_with_hooks(encoding, fwd_hooks=pair)
        plain = fresh(encoding)
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)

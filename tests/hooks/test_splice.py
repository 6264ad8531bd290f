"""SAEs in the model: the error-term identity, the points inside, several at once, and chosen positions."""

import copy
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
)

from sae_lens_maira.errors import HookError, SAEError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import TokenRole, role_mask

pytestmark = pytest.mark.compat

RESID = "blocks.1.hook_resid_post"
ACTS = f"{RESID}.hook_sae_acts_post"


def make_sae(hook_name: str = RESID, d_in: int = 64, seed: int = 0) -> SAE[Any]:
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=2 * d_in))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sae.cfg.metadata.hook_name = hook_name
    return sae


@pytest.mark.parametrize(
    "hook_name",
    [
        RESID,
        "blocks.1.hook_out",
        "model.language_model.layers.1",
        "blocks.2.attn.hook_z",
        "blocks.1.mlp.hook_post",
    ],
)
def test_with_the_error_term_nothing_changes(host: Any, encoding: Any, hook_name: str) -> None:
    d_in = host.points.width(hook_name)
    sae = make_sae(hook_name, d_in)
    if hook_name.endswith("hook_z"):
        sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=128, reshape_activations="hook_z"))
        sae.cfg.metadata.hook_name = hook_name
    with torch.no_grad():
        plain = host(encoding)
        with_error = host.run_with_saes(encoding, saes=sae, use_error_term=True)
        without = host.run_with_saes(encoding, saes=sae)
        assert (with_error - plain).abs().max() <= 1e-5 * plain.abs().max()
        assert (without - plain).abs().max() > 0.01
        assert torch.equal(host(encoding), plain)
    assert host.acts_to_saes == {}


def test_heads_are_split_again_where_an_sae_has_left(host: Any, encoding: Any) -> None:
    """SAELens' bridge puts a bare hook point back, and values there would lose their heads for good."""
    name = "blocks.2.attn.hook_z"
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128, reshape_activations="hook_z"))
    sae.cfg.metadata.hook_name = name
    with torch.no_grad():
        _, before = host.run_with_cache(encoding, names_filter=[name])
        host.run_with_saes(encoding, saes=sae)
        host.add_sae(sae)
        host.run_with_saes(encoding, saes=copy.deepcopy(sae))  # covers the first, which comes back
        host.reset_saes()
        _, after = host.run_with_cache(encoding, names_filter=[name])
    assert torch.equal(after[name], before[name])


def test_a_bf16_stream_comes_back_exactly(eager: Any, encoding: Any) -> None:
    """An fp32 SAE in a bf16 model: with the error term the logits are the model's own."""
    half = HookedMaira2(copy.deepcopy(eager.model).bfloat16())
    with torch.no_grad():
        plain = half(encoding)
        assert torch.equal(half.run_with_saes(encoding, saes=make_sae(), use_error_term=True), plain)
        assert half.run_with_saes(encoding, saes=make_sae()).dtype == torch.bfloat16


def test_without_the_error_term_the_stream_is_the_reconstruction(host: Any, encoding: Any) -> None:
    sae = make_sae()
    with torch.no_grad():
        _, clean = host.run_with_cache(encoding, names_filter=[RESID])
        with host.saes(sae):
            _, cache = host.run_with_cache(
                encoding, names_filter=["blocks.2.hook_resid_pre", ACTS, f"{RESID}.hook_sae_input"]
            )
        acts = sae.encode(clean[RESID])
    assert torch.equal(cache["blocks.2.hook_resid_pre"], sae.decode(acts))
    assert torch.equal(cache[ACTS], acts)
    assert torch.equal(cache[f"{RESID}.hook_sae_input"], clean[RESID])


def test_hooks_inside_the_sae_edit_the_activations(host: Any, encoding: Any) -> None:
    """An edit of the activations moves the stream by its decoder rows, error term or not."""
    sae = make_sae()

    def add(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = acts.clone()
        acts[..., 7] += 2
        return acts

    names = ["blocks.2.hook_resid_pre"]
    with torch.no_grad(), host.saes(sae, use_error_term=True):
        _, before = host.run_with_cache(encoding, names_filter=names)
        with host.hooks([(ACTS, add)]):
            _, after = host.run_with_cache(encoding, names_filter=names)
    moved = after[names[0]] - before[names[0]]
    assert torch.allclose(moved, (2 * sae.W_dec[7]).expand_as(moved), atol=1e-4)


def test_several_saes_and_generation(host: Any, prompt: Any) -> None:
    saes = [make_sae(RESID), make_sae("blocks.2.hook_mlp_out", seed=1)]
    plain = host.generate(prompt, 6)
    with torch.no_grad():
        with host.saes(saes):
            assert len(host.acts_to_saes) == 2
            without = host.generate(prompt, 6)
        with host.saes(saes, use_error_term=True):
            same = host.generate(prompt, 6)
    assert not torch.equal(without, plain)
    assert torch.equal(same, plain)


def test_hooks_work_at_a_point_that_an_sae_has_left(host: Any, encoding: Any) -> None:
    """SAELens' bridge puts a hook point back under a name that TransformerLens does not find."""
    seen = []
    with torch.no_grad():
        host.run_with_saes(encoding, saes=make_sae())
        host.run_with_hooks(encoding, fwd_hooks=[(RESID, lambda x, hook: seen.append(hook.name))])
        _, cache = host.run_with_cache(encoding, names_filter=[RESID])
    assert len(seen) == 1
    assert RESID in cache


def test_saes_that_were_covered_come_back(hooked: HookedMaira2, encoding: Any) -> None:
    first, second, other = make_sae(), make_sae(seed=1), make_sae("blocks.2.hook_resid_post")
    hooked.add_sae(first, use_error_term=True)
    hooked.add_sae(other)
    try:
        before = hooked(encoding)
        with hooked.saes(second):
            assert hooked.acts_to_saes[RESID] is second
        assert hooked.acts_to_saes[RESID] is first
        assert torch.equal(hooked(encoding), before)
        hooked.reset_saes("blocks.2.hook_out")
        assert list(hooked.acts_to_saes) == [RESID]
    finally:
        hooked.reset_saes()
    assert hooked.acts_to_saes == {}
    assert not any(live.active for live in hooked.live.values())
    assert first.hook_sae_input.name == "hook_sae_input"


def test_a_covered_point_says_what_is_inside(hooked: HookedMaira2, encoding: Any) -> None:
    with hooked.saes(make_sae()):
        with pytest.raises(HookError, match="hook_sae_output"):
            hooked.run_with_cache(encoding, names_filter=RESID)
        _, cache = hooked.run_with_cache(encoding)
        assert ACTS in cache
        assert RESID not in cache
    with pytest.raises(HookError, match="none is spliced in"):
        hooked.run_with_cache(encoding, names_filter=ACTS)


def test_saes_that_do_not_fit_are_refused(host: Any) -> None:
    nameless = make_sae()
    nameless.cfg.metadata.hook_name = None
    with pytest.raises(SAEError, match="hook_name is empty"):
        host.add_sae(nameless)
    with pytest.raises(SAEError, match="d_in 32, but the value at"):
        host.add_sae(make_sae(d_in=32))
    with pytest.raises(HookError, match="Unknown hook point"):
        host.add_sae(make_sae("blocks.1.resid"))
    assert host.acts_to_saes == {}


def test_resetting_what_is_not_there_is_an_error(hooked: HookedMaira2) -> None:
    with pytest.raises(SAEError, match="No SAE is spliced in"):
        hooked.reset_saes(RESID)


def test_an_exception_takes_the_sae_out(host: Any, encoding: Any) -> None:
    def boom(acts: torch.Tensor, hook: Any) -> None:
        raise RuntimeError("boom")

    plain = host(encoding)
    with pytest.raises(RuntimeError, match="boom"), host.saes(make_sae()), host.hooks([(ACTS, boom)]):
        host(encoding)
    assert host.acts_to_saes == {}
    assert torch.equal(host(encoding), plain)


def test_an_sae_can_act_on_some_roles_only(hooked: HookedMaira2, encoding: Any) -> None:
    sae = make_sae()
    report = role_mask(encoding, TokenRole.REPORT)
    names = ["blocks.2.hook_resid_pre"]
    with torch.no_grad():
        _, clean = hooked.run_with_cache(encoding, names_filter=[RESID])
        with hooked.saes(sae, roles=TokenRole.REPORT):
            _, cache = hooked.run_with_cache(encoding, names_filter=names)
    changed = (cache[names[0]] != clean[RESID]).any(-1)
    assert torch.equal(changed, report)
    assert torch.equal(cache[names[0]][report], sae(clean[RESID])[report])
    with hooked.saes(sae, roles="paper"), pytest.raises(HookError, match="carries no token roles"):
        hooked(dict(encoding.model_inputs()))


def test_roles_hold_while_generating(hooked: HookedMaira2, prompt: Any) -> None:
    """New tokens are REPORT: an SAE on REPORT acts on them, one on images acts on the prompt alone."""
    for roles in (TokenRole.REPORT, TokenRole.IMAGE):
        values: list[tuple[torch.Tensor, torch.Tensor]] = []
        inputs: list[torch.Tensor] = []
        pairs = [
            (f"{RESID}.hook_sae_input", lambda x, hook, i=inputs: i.append(x.clone())),
            (f"{RESID}.hook_sae_output", lambda x, hook, i=inputs, v=values: v.append((i[-1], x.clone()))),
        ]
        with hooked.saes(make_sae(), roles=roles), hooked.hooks(pairs):
            hooked.generate(prompt, 4, eos_token_id=None)
        prefill, *steps = [(before != after).any(-1) for before, after in values]
        mask = role_mask(prompt, roles)
        assert torch.equal(prefill, mask)
        assert all(bool(step.all()) == (roles is TokenRole.REPORT) for step in steps)


def test_special_tokens_can_be_left_alone(hooked: HookedMaira2, encoding: Any) -> None:
    with torch.no_grad():
        _, clean = hooked.run_with_cache(encoding, names_filter=[RESID])
        for exclude, ids in ((True, [0, 1, 2]), ([5, 9], [5, 9])):
            with hooked.saes(make_sae(), exclude_special_tokens=exclude):
                _, cache = hooked.run_with_cache(
                    dict(encoding.model_inputs()), names_filter=["blocks.2.hook_resid_pre"]
                )
            same = (cache["blocks.2.hook_resid_pre"] == clean[RESID]).all(-1)
            assert torch.equal(same, torch.isin(encoding.input_ids, torch.tensor(ids)))


def test_vision_saes_work_and_have_no_roles(hooked: HookedMaira2, prompt: Any) -> None:
    sae = make_sae("vision_encoder.blocks.2.hook_resid_post", d_in=32)
    plain = hooked.generate(prompt, 6)
    with hooked.saes(sae):
        assert not torch.equal(hooked.generate(prompt, 6), plain)
    with pytest.raises(HookError, match="holds image patches"):
        hooked.add_sae(sae, roles="paper")


def test_a_transcoder_reads_one_point_and_writes_another(hooked: HookedMaira2, encoding: Any) -> None:
    config = JumpReLUTranscoderConfig(d_in=64, d_out=64, d_sae=128, apply_b_dec_to_input=False)
    transcoder = JumpReLUTranscoder(config)
    for parameter in transcoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    transcoder.cfg.metadata.hook_name = "blocks.1.ln2.hook_out"
    transcoder.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    with torch.no_grad():
        plain = hooked(encoding)
        _, clean = hooked.run_with_cache(
            encoding, names_filter=["blocks.1.ln2", RESID, "blocks.1.hook_resid_mid"]
        )
        _, cache = hooked.run_with_cache_with_saes(encoding, saes=transcoder, names_filter=[RESID])
        same = hooked.run_with_saes(encoding, saes=transcoder, use_error_term=True)
        out = transcoder.decode(transcoder.encode(clean["blocks.1.ln2"]))
    assert torch.allclose(cache[RESID], clean["blocks.1.hook_resid_mid"] + out, atol=1e-5)
    assert (same - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert not any(live.active for live in hooked.live.values())


def test_gradients_pass_through_a_spliced_sae(hooked: HookedMaira2, encoding: Any) -> None:
    """Attribution to latents: the gradient reaches the activations."""
    caught: list[torch.Tensor] = []
    with (
        hooked.saes(make_sae(), use_error_term=True),
        hooked.hooks(bwd_hooks=[(ACTS, lambda g, hook: caught.append(g.clone()))]),
    ):
        hooked(encoding, return_type="loss", loss_roles=TokenRole.REPORT).backward()
    hooked.zero_grad()
    assert caught[0].shape[-1] == 128
    assert caught[0].abs().sum() > 0

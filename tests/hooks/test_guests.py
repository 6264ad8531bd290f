"""Guests behave as in their hosts: what TransformerLens and SAELens promise, or an error that says why not."""

from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, StandardSAE, StandardSAEConfig

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import HookedMaira2, Maira2ActivationsStore, Maira2Evaluator, maira2_runner
from sae_lens_maira.hooks._shared import share_weights
from sae_lens_maira.maira2 import Maira2, TokenRole, role_mask
from sae_lens_maira.maira2.versions import has_transformer_bridge

pytestmark = pytest.mark.compat

RESID = "blocks.1.hook_resid_post"
ACTS = f"{RESID}.hook_sae_acts_post"
SMALL: dict[str, Any] = {
    "train_batch_size_tokens": 64,
    "context_size": 128,
    "n_batches_in_buffer": 4,
    "store_batch_size_prompts": 2,
}


def make_sae() -> Any:
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128))
    sae.cfg.metadata.hook_name = RESID
    return sae


def zero(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value * 0


def test_reset_hooks_reaches_an_sae_that_has_left(host: Any, encoding: Any) -> None:
    sae = make_sae()
    rows = torch.randn(3, 64)
    with torch.no_grad():
        expected = sae.encode(rows)
        own = sae.hook_sae_input
        own.add_hook(lambda value, hook: None, is_permanent=True)
        with host.saes(sae):
            host.add_hook(ACTS, zero)
            host(encoding)
        host.reset_hooks()
        assert torch.equal(sae.encode(rows), expected)
    assert len(own.fwd_hooks) == 1, "a permanent hook is the caller's"


def test_reset_hooks_while_an_sae_is_attached(host: Any, encoding: Any) -> None:
    """Hooks inside the attached SAE are removed too, and the SAE stays where it is."""
    sae = make_sae()
    with torch.no_grad(), host.saes(sae):
        expected = host(encoding)
        host.add_hook(ACTS, zero)
        assert not torch.equal(host(encoding), expected)
        host.reset_hooks()
        assert torch.equal(host(encoding), expected)


def test_left_padded_ids_without_a_mask_give_the_encoding_s_logits(
    host: Any, prompt: Any, encoding: Any
) -> None:
    real = encoding.attention_mask.bool()
    assert not real.all()
    with torch.no_grad():
        found = host(encoding.input_ids, pixel_values=encoding.pixel_values)
        assert torch.equal(found[real], host(encoding)[real])
        ids = host.generate(prompt.input_ids, 6, pixel_values=prompt.pixel_values)
        assert torch.equal(ids, host.generate(prompt, 6))


def test_an_unknown_word_inside_a_text_is_not_padding(hooked: HookedMaira2) -> None:
    """MAIRA-2's pad token is <unk>; only its runs at either end of a row are padding."""
    ids = torch.tensor([[0, 0, 1, 5, 0, 9], [1, 5, 0, 7, 0, 0], [1, 5, 6, 7, 8, 9]])
    mask = hooked.inputs(ids).tensors["attention_mask"]
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1] * 6]
    assert "attention_mask" not in hooked.inputs(ids[2:]).tensors


@pytest.mark.parametrize("stop", [-5, 5, 9])
def test_a_stop_out_of_range_is_refused(host: Any, encoding: Any, stop: int) -> None:
    for call in (host, host.run_with_cache, host.run_with_hooks):
        with pytest.raises(
            HookError, match=f"stop_at_layer={stop} was requested, but this model has 4 blocks"
        ):
            call(encoding, stop_at_layer=stop)


def test_a_stop_after_the_last_block_gives_the_stream(host: Any, encoding: Any) -> None:
    with torch.no_grad():
        _, cache = host.run_with_cache(encoding, names_filter=["blocks.3.hook_resid_post"])
        out, _ = host.run_with_cache(encoding, stop_at_layer=4)
        assert torch.equal(out, cache["blocks.3.hook_resid_post"])
        assert torch.equal(host(encoding, stop_at_layer=4), out)
        with pytest.raises(HookError, match="could fire"):
            host.run_with_cache(encoding, names_filter=["blocks.3.hook_resid_post"], stop_at_layer=2)


@pytest.mark.skipif(not has_transformer_bridge(), reason="needs TransformerLens 3")
def test_the_bridge_refuses_gated_hooks_until_they_fire(eager: Maira2, encoding: Any) -> None:
    from sae_lens_maira.hooks import to_bridge

    bridge, seen = to_bridge(eager), []
    pair = ("blocks.1.attn.hook_result", lambda value, hook: seen.append(value.shape))
    for call in (
        lambda: bridge.add_hook(*pair),
        lambda: bridge.run_with_hooks(encoding, fwd_hooks=[pair]),
        lambda: bridge.run_with_cache(encoding, names_filter=[pair[0]]),
    ):
        with pytest.raises(HookError, match=r"set_use_attn_result\(True\)"):
            call()
    bridge.set_use_attn_result(True)
    bridge.run_with_hooks(encoding, fwd_hooks=[pair])
    assert seen
    assert seen[0][-2:] == (4, 64)


@pytest.mark.skipif(not has_transformer_bridge(), reason="needs TransformerLens 3")
@pytest.mark.parametrize("processed", [True, False])
def test_compatibility_mode_as_the_first_call_keeps_the_hooks(
    eager: Maira2, encoding: Any, processed: bool
) -> None:
    """And it leaves the model, whose weights the bridge shares, as it was."""
    from sae_lens_maira.hooks import to_bridge

    with torch.no_grad():
        before = eager.model(**encoding.model_inputs()).logits
        bridge, seen = to_bridge(eager), []
        bridge.enable_compatibility_mode(no_processing=not processed)
        names = [RESID, "blocks.1.hook_resid_mid", "model.language_model.layers.2"]
        logits = bridge.run_with_hooks(
            encoding, fwd_hooks=[(name, lambda value, hook: seen.append(1)) for name in names]
        )
        _, cache = bridge.run_with_cache(encoding, names_filter=names)
        assert torch.equal(eager.model(**encoding.model_inputs()).logits, before)
    assert len(seen) == 3
    assert all(name in cache for name in names)
    real = encoding.attention_mask.bool()
    difference = logits.log_softmax(-1)[real] - before.log_softmax(-1)[real]
    assert difference.abs().max() < 1e-3


def test_hooks_that_a_function_chose_must_fire_somewhere(host: Any, hooked: HookedMaira2) -> None:
    text = torch.ones(1, 4, dtype=torch.long)
    vision = [(lambda name: name.startswith("vision_projector"), lambda value, hook: None)]
    with pytest.raises(HookError, match=r"A function chose .* no hook fired at any of them"):
        host.run_with_hooks(text, fwd_hooks=vision)
    with pytest.raises(HookError, match="chose none of the"):
        host.run_with_hooks(text, fwd_hooks=[(lambda name: "no such" in name, lambda value, hook: None)])
    with pytest.raises(HookError, match="chose none of the"):
        hooked.add_hook(lambda name: False, lambda value, hook: None)


@pytest.mark.parametrize("way", ["module", "block", "forward"])
def test_a_compiled_model_refuses_hooks(eager: Maira2, encoding: Any, way: str) -> None:
    """torch.compile runs without hooks that come later, so they would change nothing."""
    model = share_weights(eager.model)
    hooked = HookedMaira2(Maira2(model, eager.processor))
    compiled: Any = (
        model if way == "forward" else model if way == "module" else model.model.language_model.layers[1]
    )
    if way == "forward":
        compiled.forward = torch.compile(compiled.forward, backend="eager")
    else:
        compiled.compile(backend="eager")
    for name in (RESID, lambda name: name.startswith("blocks.1.")):
        with pytest.raises(HookError, match="The model is compiled"):
            hooked.run_with_hooks(encoding, fwd_hooks=[(name, zero)])
    assert not any(live.active for live in hooked.live.values())


def test_an_sae_of_one_head_trains_on_that_head(hooked: HookedMaira2, studies: Any, encoding: Any) -> None:
    name = "blocks.2.attn.hook_z"
    config = BatchTopKTrainingSAEConfig(d_in=16, d_sae=32, k=4)
    runner = maira2_runner(
        hooked,
        studies,
        config,
        name,
        training_tokens=128,
        eval_studies=studies[:1],
        hook_head_index=3,
        **SMALL,
    )
    rows, _ = Maira2ActivationsStore.over(studies, hooked, runner.cfg, shuffle_seed=None).get_raw_llm_batch()
    assert hooked.processor is not None
    batch = hooked.processor.encode(studies[:2], report="teacher")
    _, cache = hooked.run_with_cache(batch, names_filter=name)
    values = cache[name][:, :, 3][role_mask(batch, "content")]
    torch.testing.assert_close(rows, values, rtol=1e-4, atol=1e-4)
    sae = runner.run()
    assert sae.cfg.metadata.hook_head_index == 3
    metrics = Maira2Evaluator(hooked, [encoding], TokenRole.REPORT)(sae)
    assert metrics["maira2/ce_loss_with_ablation"] != metrics["maira2/ce_loss"]


@pytest.mark.parametrize(
    ("d_in", "more", "message"),
    [
        (16, {}, "d_in is 16, but the value at .* has width 64"),
        (64, {"hook_head_index": 1}, "d_in is 64, but one head at .* has width 16"),
        (16, {"hook_head_index": 4}, "has 4 heads"),
        (64, {"seqpos_slice": (2, -1)}, "chosen by token role"),
        (64, {"hook_head_index": 0, "hook_name": RESID}, "has no heads"),
    ],
)
def test_rows_that_would_be_packed_or_cut_are_refused(
    hooked: HookedMaira2, studies: Any, d_in: int, more: dict[str, Any], message: str
) -> None:
    config = BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=32, k=4)
    arguments = {"hook_name": "blocks.2.attn.hook_z", "training_tokens": 64, **SMALL, **more}
    with pytest.raises(HookError, match=message):
        maira2_runner(hooked, studies, config, **arguments)

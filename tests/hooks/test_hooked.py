"""HookedMaira2: caches, early stop, hooks that must fire, gradients, padding, and what it refuses."""

from typing import Any

import pytest
import torch

from sae_lens_maira.errors import HookError, PromptError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.hooks.twin import share_weights
from sae_lens_maira.maira2 import Maira2, Maira2Encoding, TokenRole, role_mask

pytestmark = pytest.mark.compat

RESID = "blocks.1.hook_resid_post"


def torch_hooks(model: torch.nn.Module) -> int:
    """Hooks on the model's modules, transformers' own capturing hooks left out."""
    return sum(
        len(module._forward_pre_hooks)
        + len(module._backward_hooks)
        + sum("output_capturing" not in repr(hook) for hook in module._forward_hooks.values())
        for module in model.modules()
    )


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


def test_stop_at_layer_stops(hooked: HookedMaira2, encoding: Any) -> None:
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


# Hooks that must fire, and that must go


def test_unknown_names_are_refused_everywhere(hooked: HookedMaira2, encoding: Any) -> None:
    def hook(x: torch.Tensor, hook: Any) -> None: ...

    with pytest.raises(HookError, match="Unknown hook point"):
        hooked.run_with_hooks(encoding, fwd_hooks=[("blocks.1.resid", hook)])
    with pytest.raises(HookError, match="Unknown hook point"):
        hooked.run_with_cache(encoding, names_filter=["blocks.1.resid"])
    with pytest.raises(HookError, match="Unknown hook point"):
        hooked.add_hook("blocks.1.resid", hook)


def test_a_hook_that_never_fires_is_an_error(hooked: HookedMaira2, encoding: Any) -> None:
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
    hooked: HookedMaira2, encoding: Any, prompt: Any, way: str
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


# Gradients


def test_gradients_flow_to_every_point(hooked_eager: HookedMaira2, encoding: Any) -> None:
    gradients: dict[str, torch.Tensor] = {}

    def keep(grad: torch.Tensor, hook: Any) -> None:
        gradients[hook.name] = grad.detach().clone()

    names = list(hooked_eager.points.names)
    with hooked_eager.hooks(bwd_hooks=[(name, keep) for name in names]):
        loss = hooked_eager(encoding, return_type="loss", loss_roles=TokenRole.REPORT)
        loss.backward()
    hooked_eager.zero_grad()
    assert set(gradients) == set(names)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


def test_gradient_at_a_point_is_the_derivative_of_an_edit(hooked: HookedMaira2, study: Any) -> None:
    """d loss / d value along a direction, against a central difference; norms stay in fp32, hence the margin."""
    model = hooked.model.double()
    try:
        caught = {}
        direction = torch.randn(64, dtype=torch.float64)

        def run(step: float) -> float:
            with torch.no_grad():
                loss = hooked.run_with_hooks(
                    study,
                    report="teacher",
                    return_type="loss",
                    fwd_hooks=[("vision_projector.hook_out", lambda x, hook: x + step * direction)],
                )
            return float(loss)

        with hooked.hooks(bwd_hooks=[("vision_projector.hook_out", lambda g, hook: caught.update(g=g))]):
            hooked(study, report="teacher", return_type="loss").backward()
        expected = (run(3e-3) - run(-3e-3)) / 6e-3
        assert float((caught["g"] @ direction).sum()) == pytest.approx(expected, rel=0.02)
    finally:
        model.float()
        model.zero_grad()


def test_a_backward_hook_that_cannot_fire_is_an_error(hooked: HookedMaira2, encoding: Any) -> None:
    with pytest.raises(HookError, match=r"Call backward\(\) inside"):
        hooked.run_with_hooks(encoding, bwd_hooks=[(RESID, lambda g, hook: None)])


def test_run_with_cache_keeps_gradients(hooked: HookedMaira2, encoding: Any) -> None:
    _, cache = hooked.run_with_cache(encoding, names_filter=RESID, incl_bwd=True, return_type="loss")
    hooked.zero_grad()
    assert cache[f"{RESID}_grad"].shape == cache[RESID].shape
    assert cache[f"{RESID}_grad"].abs().sum() > 0


# Inputs and padding


def test_inputs_of_every_kind_give_the_same_logits(hooked: HookedMaira2, studies: Any) -> None:
    assert hooked.processor is not None
    encoding = hooked.processor.encode(studies, report="teacher")
    tensors = encoding.model_inputs()
    with torch.no_grad():
        expected = hooked(encoding)
        assert torch.equal(hooked(studies, report="teacher"), expected)
        assert torch.equal(hooked(tensors), expected)
        assert torch.equal(hooked({**tensors, "token_type_ids": torch.zeros(3, 4)}), expected)
        ids = tensors.pop("input_ids")
        assert torch.equal(hooked(ids, **tensors), expected)
        assert torch.equal(hooked(input_ids=ids, **tensors), expected)


def test_images_and_placeholders_must_agree(hooked: HookedMaira2, encoding: Any, prompt: Any) -> None:
    text = torch.ones(1, 4, dtype=torch.long)
    for call in (hooked, lambda *a, **k: hooked.run_with_cache(*a, names_filter=RESID, **k), hooked.generate):
        with pytest.raises(PromptError, match="no pixel_values"):
            call(prompt.input_ids)
        with pytest.raises(PromptError, match="image placeholders"):
            call(text, pixel_values=prompt.pixel_values)
        with pytest.raises(PromptError, match="image placeholders"):
            call(prompt.input_ids, pixel_values=prompt.pixel_values[:-1])
    assert torch_hooks(hooked.model) == 0


def test_inputs_that_no_door_takes(tiny: Maira2, hooked: HookedMaira2, study: Any, encoding: Any) -> None:
    with pytest.raises(HookError, match="expected a study"):
        hooked(3.5)
    with pytest.raises(HookError, match="came twice"):
        hooked(encoding, pixel_values=encoding.pixel_values)
    with pytest.raises(HookError, match="no input_ids"):
        hooked(pixel_values=encoding.pixel_values)
    with pytest.raises(HookError, match="wrapped without a processor"):
        HookedMaira2(tiny.model)(study)
    with pytest.raises(HookError, match="say how studies are encoded"):
        hooked(encoding, task="grounded")
    with pytest.raises(HookError, match="carry their own BOS"):
        hooked(encoding, prepend_bos=True)
    with pytest.raises(HookError, match="return_type"):
        hooked(encoding, return_type="tensor")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batching_leave_real_tokens_alone(hooked: HookedMaira2, studies: Any, side: Any) -> None:
    """Unequal studies of one, two and three images: together or alone, the same values at real positions."""
    assert hooked.processor is not None
    names = [RESID, "blocks.3.hook_resid_post", "ln_final"]
    batch = hooked.processor.encode(studies, report="teacher", padding_side=side)
    assert not batch.attention_mask.all()
    with torch.no_grad():
        _, together = hooked.run_with_cache(batch, names_filter=names)
        for row, study in enumerate(studies):
            _, alone = hooked.run_with_cache(study, report="teacher", names_filter=names)
            real = batch.attention_mask[row].bool()
            for name in names:
                error = (together[name][row][real] - alone[name][0]).abs().max()
                assert error <= 1e-4 * alone[name].abs().max(), (name, row)


def test_the_cache_of_keys_leaves_values_alone(hooked: HookedMaira2, study: Any) -> None:
    """Hidden states of a teacher-forced report equal those met while the same tokens are generated."""
    assert hooked.processor is not None
    prompt = hooked.processor.encode(study)
    ids = hooked.generate(prompt, 6)
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for use_cache, kept in seen.items():
        with hooked.hooks([(RESID, lambda x, hook, kept=kept: kept.append(x[:, -1].clone()))]):
            assert torch.equal(hooked.generate(prompt, 6, use_cache=use_cache), ids)
    with torch.no_grad():
        _, forced = hooked.run_with_cache(ids, pixel_values=prompt.pixel_values, names_filter=RESID)
    start = prompt.input_ids.shape[1] - 1
    for kept in seen.values():
        stacked = torch.stack(kept, dim=1)
        assert torch.allclose(stacked, forced[RESID][:, start : start + stacked.shape[1]], atol=2e-4)


# Loss, matrices, lens, generation


def test_loss_counts_the_wanted_roles(hooked: HookedMaira2, encoding: Maira2Encoding) -> None:
    with torch.no_grad():
        logits, per_token = hooked(encoding, return_type="both", loss_per_token=True)
        loss = hooked(encoding, return_type="loss", loss_roles=TokenRole.REPORT)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), encoding.input_ids[:, 1:].flatten(), reduction="none"
    ).view(3, -1)
    assert torch.allclose(per_token, expected, atol=1e-4)
    wanted = role_mask(encoding, TokenRole.REPORT)[:, 1:]
    assert loss == pytest.approx(float(expected[wanted].mean()), rel=1e-5)


def test_losses_that_cannot_be_meant(hooked: HookedMaira2, encoding: Any, prompt: Any) -> None:
    with pytest.raises(HookError, match="No target"):
        hooked(prompt, return_type="loss", loss_roles=TokenRole.REPORT)
    with pytest.raises(HookError, match="tensors do not carry"):
        hooked(dict(encoding.model_inputs()), return_type="loss", loss_roles="paper")
    with pytest.raises(HookError, match="both given"):
        hooked(encoding, return_type="loss", loss_roles="paper", loss_per_token=True)


def test_logit_lens_of_the_last_block_is_the_models_logits(hooked: HookedMaira2, encoding: Any) -> None:
    with torch.no_grad():
        logits = hooked(encoding)
    lens = hooked.logit_lens(encoding)
    assert lens.shape == (4, 3, hooked.cfg.d_vocab)
    assert torch.allclose(lens[-1], logits[:, -1], atol=1e-4)
    assert hooked.logit_lens(encoding, layers=[-1, 0], position=slice(-2, None)).shape[:3] == (2, 3, 2)


def test_matrices_and_tokens(hooked: HookedMaira2) -> None:
    assert hooked.W_E.shape == (hooked.cfg.d_vocab, 64)
    assert hooked.W_U.shape == (64, hooked.cfg.d_vocab)
    ids = hooked.to_tokens("The heart size is normal.")
    assert ids[0, 0] == 1
    assert torch.equal(hooked.to_tokens("The heart size is normal.", prepend_bos=False), ids[:, 1:])
    token = int(ids[0, 2])
    assert torch.equal(hooked.tokens_to_residual_directions(token), hooked.W_U[:, token])
    assert len(hooked.to_str_tokens(ids)) == ids.shape[1]
    with pytest.raises(HookError, match="expected one"):
        hooked.to_single_token("The heart size is normal.")


def test_generate_reports(hooked: HookedMaira2, studies: Any) -> None:
    reports = hooked.generate(studies[:2], 5, return_type="reports")
    assert len(reports) == 2
    assert all(isinstance(report.text, str) for report in reports)


def test_vision_and_projector_hooks_change_the_report(hooked: HookedMaira2, prompt: Any) -> None:
    plain = hooked.generate(prompt, 8)
    for name in (
        "vision_encoder.blocks.2.hook_resid_post",
        "vision_encoder.hook_out",
        "vision_projector.hook_out",
    ):
        with hooked.hooks([(name, lambda x, hook: x.flip(1) * 3)]):
            assert not torch.equal(hooked.generate(prompt, 8), plain), name

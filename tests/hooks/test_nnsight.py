"""nnsight's door: images in a trace, names, tuple-safe values, every token, and its known traps."""

# pyright: reportPossiblyUnboundVariable=false
# nnsight's traces may swallow exceptions by their type; they do not.

import warnings
from typing import Any

import nnsight
import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from sae_lens import StandardSAE, StandardSAEConfig

from sae_lens_maira.errors import HookError, PromptError
from sae_lens_maira.hooks import HookedMaira2, Maira2NNsight
from sae_lens_maira.maira2 import Maira2

pytestmark = pytest.mark.compat

RESID = "blocks.1.hook_resid_post"
TEXT = torch.ones(1, 4, dtype=torch.long)


@pytest.fixture
def model(tiny: Maira2) -> Maira2NNsight:
    return Maira2NNsight(tiny)


@pytest.fixture
def cache(hooked: HookedMaira2, encoding: Any) -> dict[str, torch.Tensor]:
    return hooked.run_with_cache(encoding)[1]


def test_standard_names(model: Maira2NNsight, tiny: Maira2) -> None:
    """The short names refer to the model's own modules."""
    assert len(model.blocks) == 4
    assert model.blocks[2]._module is tiny.model.get_submodule("model.language_model.layers.2")
    assert model.vision._module is tiny.model.get_submodule("model.vision_tower")
    assert model.projector._module is tiny.model.get_submodule("model.multi_modal_projector")
    assert model.lm_head._module is tiny.model.lm_head
    assert model.ln_final._module is tiny.model.get_submodule("model.language_model.norm")
    assert model.embed._module is tiny.model.get_input_embeddings()


def test_accessors_read_and_write(model: Maira2NNsight, encoding: Any, cache: Any) -> None:
    vector = torch.randn(64)
    with torch.no_grad(), model.trace(encoding):
        pre = model.resid_pre[1].save()
        attn = model.attn_out[1].save()
        mlp = model.mlp_out[1].save()
        post = model.resid_post[1].save()
        model.resid_post[1] = post + vector
        last = model.resid_post[-1].save()
    for name, value in {"resid_pre": pre, "attn_out": attn, "mlp_out": mlp, "resid_post": post}.items():
        assert torch.equal(value, cache[f"blocks.1.hook_{name}"]), name
    assert not torch.equal(last, cache["blocks.3.hook_resid_post"])


def test_in_place_edits_count(model: Maira2NNsight, hooked: HookedMaira2, encoding: Any) -> None:
    vector = torch.randn(64)
    with torch.no_grad(), model.trace(encoding):
        model.resid_post[1][:, -1] += vector
        out = model.output.save()

    def same(x: torch.Tensor, hook: Any) -> None:
        x[:, -1] += vector

    with torch.no_grad():
        assert torch.equal(out.logits, hooked.run_with_hooks(encoding, fwd_hooks=[(RESID, same)]))


def test_accessors_are_safe_for_modules_that_give_tuples(model: Maira2NNsight, encoding: Any) -> None:
    """Attention gives a tuple in every transformers; assigning keeps its other members."""
    with torch.no_grad(), model.trace(encoding):
        model.attn_out[1] = model.attn_out[1] * 0
        output = model.blocks[1].self_attn.output
        whole = isinstance(output, tuple)
        zero = output[0].abs().max()
        found = [whole, float(zero)]
        kept = nnsight.save(found)
    assert kept == [True, 0.0]


def test_studies_batched_in_one_trace(model: Maira2NNsight, hooked: HookedMaira2, studies: Any) -> None:
    with torch.no_grad(), model.trace(studies, report="teacher"):
        value = model.resid_post[1].save()
    _, expected = hooked.run_with_cache(studies, report="teacher", names_filter=RESID)
    assert torch.equal(value, expected[RESID])


def test_generate_in_a_trace(model: Maira2NNsight, hooked: HookedMaira2, prompt: Any) -> None:
    """Direct input edits the prompt's step; the recipe with a second, empty invoke saves the ids."""
    plain = hooked.generate(prompt, 4)
    with model.generate(prompt, max_new_tokens=4) as tracer:
        model.resid_post[1] = model.resid_post[1] * 2
        ids = tracer.result.save()
    first = []

    def once(x: torch.Tensor, hook: Any) -> torch.Tensor | None:
        first.append(1)
        return x * 2 if len(first) == 1 else None

    with hooked.hooks([(RESID, once)]):
        assert torch.equal(ids, hooked.generate(prompt, 4))
    assert not torch.equal(ids, plain)
    with model.generate(max_new_tokens=4) as tracer:
        with tracer.invoke(prompt):
            model.resid_post[1].save()
        with tracer.invoke():
            ids = tracer.result.save()
    assert torch.equal(ids, plain)


def test_generate_edited_hides_the_recipe(model: Maira2NNsight, hooked: HookedMaira2, prompt: Any) -> None:
    """Edits in any order, prompt-only points once, in place or returned, and no warning about the open loop."""
    steps: dict[str, list[int]] = {"vision_projector.hook_out": [], RESID: [], "hook_embed": []}

    def watch(name: str) -> Any:
        return lambda value, step: steps[name].append(step)

    plain = hooked.generate(prompt, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ids = model.generate_edited(
            prompt,
            {
                RESID: watch(RESID),
                "vision_projector": watch("vision_projector.hook_out"),
                "embed": watch("hook_embed"),
            },
            4,
            eos_token_id=None,
        )
    assert torch.equal(ids, plain)
    assert steps == {"vision_projector.hook_out": [0], RESID: [0, 1, 2, 3], "hook_embed": [0, 1, 2, 3]}
    assert not torch.equal(
        model.generate_edited(prompt, {"vision_projector": lambda x, _: x.flip(1) * 3}, 4), plain
    )


def test_reports_that_end_early_are_no_trap(model: Maira2NNsight, hooked: HookedMaira2, prompt: Any) -> None:
    """nnsight drops what follows a loop that the model ends; the helper still returns the ids."""
    plain = hooked.generate(prompt, 6)
    eos = [int(plain[0, -4]), int(plain[1, -4])]
    ids = model.generate_edited(prompt, {RESID: lambda x, _: None}, 6, eos_token_id=eos, pad_token_id=0)
    assert torch.equal(ids, hooked.generate(prompt, 6, eos_token_id=eos, pad_token_id=0))
    assert ids.shape[1] < plain.shape[1]


def test_images_and_placeholders_must_agree(model: Maira2NNsight, prompt: Any) -> None:
    with pytest.raises(PromptError, match="no pixel_values"):  # noqa: SIM117
        with model.trace(input_ids=prompt.input_ids):
            model.resid_post[1].save()
    with pytest.raises(PromptError, match="image placeholders"):  # noqa: SIM117
        with model.trace(TEXT, pixel_values=prompt.pixel_values):
            model.resid_post[1].save()
    with pytest.raises(PromptError, match="no pixel_values"):
        model.generate(input_ids=prompt.input_ids, max_new_tokens=2)
    with pytest.raises(PromptError, match="no pixel_values"):
        model.generate_edited(prompt.input_ids, {RESID: lambda x, _: x}, 2)
    with pytest.raises(PromptError, match="image placeholders"):
        model.generate_edited(
            prompt.input_ids, {RESID: lambda x, _: x}, 2, pixel_values=prompt.pixel_values[1:]
        )


def test_points_that_never_fire_are_errors(model: Maira2NNsight) -> None:
    with pytest.raises((OutOfOrderError, ValueError)):  # noqa: SIM117
        with model.trace(TEXT):
            model.at["vision_projector.hook_out"].save()
    with pytest.raises(HookError, match="only when the model sees pixel_values"):
        model.generate_edited(TEXT, {"vision_projector": lambda x, _: x}, 2)


def test_reads_go_in_execution_order(model: Maira2NNsight, encoding: Any) -> None:
    with pytest.raises(OutOfOrderError):  # noqa: PT012, SIM117
        with model.trace(encoding):
            model.at["unembed"].save()
            model.resid_post[1].save()


def test_what_nnsight_cannot_do_is_said(model: Maira2NNsight, encoding: Any, eager: Maira2) -> None:
    with pytest.raises(HookError, match="one batch"):  # noqa: PT012, SIM117
        with model.generate(max_new_tokens=2) as tracer:
            with tracer.invoke(encoding):
                model.resid_post[1].save()
            with tracer.invoke(encoding):
                model.resid_post[1].save()
    with pytest.raises(HookError, match="Unknown hook point"):
        model.at["blocks.1.resid"]
    with pytest.raises(HookError, match="0 to 3"):
        model.resid_post[7]
    with pytest.raises(HookError, match=r"Assign blocks\.1\.hook_attn_out"):  # noqa: SIM117
        with model.trace(encoding):
            model.at["blocks.1.hook_resid_mid"] = torch.zeros(1)
    with pytest.raises(HookError, match=r"Assign blocks\.1\.attn\.hook_z"):  # noqa: SIM117
        with Maira2NNsight(eager).trace(encoding):
            model.at["blocks.1.attn.hook_pattern"] = torch.zeros(1)
    with pytest.raises(HookError, match="2 positional inputs"):  # noqa: SIM117
        with model.trace(encoding, encoding):
            model.resid_post[1].save()


def test_an_exception_leaves_the_model_as_it_was(
    model: Maira2NNsight, hooked: HookedMaira2, prompt: Any
) -> None:
    plain = hooked.generate(prompt, 3)

    def boom(value: torch.Tensor, step: int) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        model.generate_edited(prompt, {RESID: boom}, 3)
    assert torch.equal(hooked.generate(prompt, 3), plain)
    assert torch.equal(model.generate(prompt, max_new_tokens=3), plain)


def test_gradients_in_a_trace(model: Maira2NNsight, encoding: Any) -> None:
    with model.trace(encoding):
        value = model.at["vision_projector.hook_out"].save()
        loss = model.output.logits.float().logsumexp(-1).sum()
        with loss.backward():
            gradient = value.grad.save()
    model._module.zero_grad()
    assert gradient.shape == value.shape
    assert gradient.abs().sum() > 0


def test_edits_that_stay_hold_for_the_prompt_or_for_every_token(
    model: Maira2NNsight, hooked: HookedMaira2, prompt: Any
) -> None:
    """nnsight's `edit` acts on the prompt's step alone; with `iter` inside, on every step."""
    vector = torch.randn(64) * 3
    with model.edit() as (tracer, once):  # pyright: ignore[reportGeneralTypeIssues] - its __enter__ gives a pair
        once.resid_post[1] = once.resid_post[1] + vector
    with model.edit() as (tracer, always):  # pyright: ignore[reportGeneralTypeIssues]
        for _ in tracer.iter[:]:
            always.resid_post[1] = always.resid_post[1] + vector
    calls: list[int] = []

    def first_only(x: torch.Tensor, hook: Any) -> torch.Tensor | None:
        calls.append(1)
        return x + vector if len(calls) == 1 else None

    with hooked.hooks([(RESID, first_only)]):
        expected_once = hooked.generate(prompt, 6)
    with hooked.hooks([(RESID, lambda x, hook: x + vector)]):
        expected_always = hooked.generate(prompt, 6)
    assert not torch.equal(expected_once, expected_always)
    assert torch.equal(once.generate(prompt, max_new_tokens=6), expected_once)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the open loop's end
        assert torch.equal(always.generate(prompt, max_new_tokens=6), expected_always)
    assert torch.equal(model.generate(prompt, max_new_tokens=6), hooked.generate(prompt, 6))


def test_a_trace_on_one_line_is_refused(model: Maira2NNsight, encoding: Any) -> None:
    # fmt: off
    with pytest.raises(ValueError, match="own line"):  # noqa: SIM117
        with model.trace(encoding): model.resid_post[1].save()  # noqa: E701
    # fmt: on


def test_saes_work_inside_a_trace(model: Maira2NNsight, hooked: HookedMaira2, prompt: Any) -> None:
    """Spliced at every step through nnsight, token for token what HookedMaira2 gives."""
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sae.cfg.metadata.hook_name = RESID
    with torch.no_grad():
        ids = model.generate_edited(prompt, {RESID: lambda x, _: sae.decode(sae.encode(x))}, 6)
    with hooked.saes(sae):
        assert torch.equal(ids, hooked.generate(prompt, 6))


def test_the_callers_tokenizer_is_left_alone(tiny: Maira2) -> None:
    """nnsight's own TransformersModel would turn its padding side."""
    side = tiny.processor.tokenizer.padding_side
    Maira2NNsight(tiny)
    assert tiny.processor.tokenizer.padding_side == side

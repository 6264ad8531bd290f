"""HookedMaira2's inputs: every kind gives the same logits, padding and key caches change nothing, and refusals."""

from typing import Any

import pytest
import torch

from sae_lens_maira.errors import HookError, PromptError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2

pytestmark = pytest.mark.compat

RESID = "blocks.1.hook_resid_post"


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


def test_images_and_placeholders_must_agree(
    hooked: HookedMaira2, encoding: Any, prompt: Any, torch_hooks: Any
) -> None:
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


def test_a_prompt_above_the_named_positions_is_reported_once(
    tiny: Any, encoding: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on with all its tokens; the message names the length and what the scaling makes of it."""
    hooked = HookedMaira2(tiny)
    length = encoding.input_ids.shape[1]
    hooked.cfg.n_ctx = length
    hooked(encoding, return_type=None)
    assert "max_position_embeddings" not in caplog.text
    hooked.cfg.n_ctx = length - 1
    assert hooked(encoding).shape[1] == length
    hooked(encoding, return_type=None)
    assert caplog.text.count("max_position_embeddings") == 1
    assert f"{length} tokens" in caplog.text
    assert "divides them by" in caplog.text

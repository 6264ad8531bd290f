"""The attention pattern: formed by eager attention only, readable and replaceable there, and gone without a trace."""

from typing import Any

import pytest
import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import HookedMaira2, Maira2NNsight
from sae_lens_maira.hooks._pattern import HOOKED_EAGER
from sae_lens_maira.maira2 import Maira2

pytestmark = pytest.mark.compat

PATTERN = "blocks.2.attn.hook_pattern"


def test_rows_sum_to_one_and_z_is_pattern_times_v(hooked_eager: HookedMaira2, study: Any) -> None:
    _, cache = hooked_eager.run_with_cache(
        study, names_filter=[PATTERN, "blocks.2.attn.hook_z", "blocks.2.attn.hook_v"]
    )
    pattern = cache[PATTERN]
    assert torch.allclose(pattern.sum(-1), torch.ones_like(pattern.sum(-1)), atol=1e-5)
    assert torch.equal(pattern, pattern.tril())
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, cache["blocks.2.attn.hook_v"])
    assert torch.allclose(z, cache["blocks.2.attn.hook_z"], atol=1e-4)


def test_replacing_the_pattern_replaces_what_is_attended(hooked_eager: HookedMaira2, study: Any) -> None:
    """Every position looks at itself alone: z is v."""

    def itself(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.eye(pattern.shape[-1]).expand_as(pattern)

    with torch.no_grad(), hooked_eager.hooks([(PATTERN, itself)]):
        _, cache = hooked_eager.run_with_cache(
            study, names_filter=["blocks.2.attn.hook_z", "blocks.2.attn.hook_v"]
        )
    assert torch.equal(cache["blocks.2.attn.hook_z"], cache["blocks.2.attn.hook_v"])


def test_the_model_has_its_own_attention_back(hooked_eager: HookedMaira2, study: Any) -> None:
    config: Any = hooked_eager.model.config
    with hooked_eager.hooks([(PATTERN, lambda x, hook: x)]):
        assert config.text_config._attn_implementation == HOOKED_EAGER
        hooked_eager(study)
    assert config.text_config._attn_implementation == "eager"


def test_patterns_grow_while_generating(hooked_eager: HookedMaira2, study: Any) -> None:
    shapes = []
    with hooked_eager.hooks([(PATTERN, lambda x, hook: shapes.append(tuple(x.shape[1:])))]):
        ids = hooked_eager.generate(study, 3, eos_token_id=None)
    length = ids.shape[1] - 3
    assert shapes == [(4, length, length), (4, 1, length + 1), (4, 1, length + 2)]


def test_fused_attention_is_told_apart(hooked: HookedMaira2, tiny: Maira2, study: Any) -> None:
    for ask in (
        lambda: hooked.run_with_cache(study, names_filter=PATTERN),
        lambda: hooked.run_with_hooks(study, fwd_hooks=[(PATTERN, lambda x, hook: x)]),
        lambda: hooked.add_hook(PATTERN, lambda x, hook: x),
    ):
        with pytest.raises(HookError, match="needs eager attention, but the model runs 'sdpa'"):
            ask()
    _, cache = hooked.run_with_cache(study)
    assert not any(name.endswith("hook_pattern") for name in cache)
    traced = Maira2NNsight(tiny)
    with pytest.raises(HookError, match="needs eager attention"):  # noqa: SIM117
        with traced.trace(study):
            traced.at[PATTERN].save()


def test_grouped_heads_repeat_their_keys(processor: Any, study: Any) -> None:
    """With two query heads per key head the hooked attention gives transformers' own logits."""
    from sae_lens_maira.maira2 import Maira2ForConditionalGeneration, make_config

    config = make_config(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "mlp_ratio": 2,
            "image_size": 56,
            "out_features": ["stage1"],
        },
        image_token_index=processor.image_token_id,
        image_seq_length=16,
    )
    model = Maira2ForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    hooked = HookedMaira2(Maira2(model, processor))
    with torch.no_grad():
        plain = hooked(study)
        logits, cache = hooked.run_with_cache(study)
    assert torch.equal(logits, plain)
    assert cache["blocks.0.attn.hook_k"].shape[2:] == (2, 8)
    assert cache["blocks.0.attn.hook_pattern"].shape[1] == 4

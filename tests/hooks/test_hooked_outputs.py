"""HookedMaira2's losses, matrices, logit lens and generated reports."""

from typing import Any

import pytest
import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding, TokenRole, role_mask

pytestmark = pytest.mark.compat


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
    """Embedding matrices have TransformerLens' shapes, and tokens its BOS rule."""
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
    """`return_type="reports"` gives one parsed report per study."""
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

"""HookedMaira2's gradients: backward hooks at every point, against finite differences."""

from typing import Any

import pytest
import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import TokenRole

pytestmark = pytest.mark.compat

RESID = "blocks.1.hook_resid_post"


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

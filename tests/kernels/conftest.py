"""Builders shared by the kernel tests: random problems of any shape, and the distance between two results."""

from collections.abc import Callable

import pytest
import torch

from sae_lens_maira.kernels import StepResult, Weights


@pytest.fixture
def make_weights() -> Callable[..., Weights]:
    """Random weights with unequal decoder norms, so that ranking by h and by h |W_dec| differ."""

    def make(d_in: int, d_sae: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Weights:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        W_dec = normal(d_sae, d_in) / d_in**0.5 * (0.5 + torch.rand(d_sae, 1, generator=generator))
        weights = (normal(d_in, d_sae) / d_in**0.5, normal(d_sae) * 0.1, W_dec, normal(d_in) * 0.1)
        return Weights(*(weight.to(dtype) for weight in weights))

    return make


@pytest.fixture
def relative() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """|a - b| / |b| over all elements."""

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))

    return distance


@pytest.fixture
def assert_equal_steps(relative: Callable[[torch.Tensor, torch.Tensor], float]) -> Callable[..., None]:
    """Asserts that two backends give one selection, equal losses and equal gradients."""

    def check(ours: StepResult, expected: StepResult, tolerance: float) -> None:
        assert torch.equal(ours.acts.rows, expected.acts.rows)
        assert torch.equal(ours.acts.cols, expected.acts.cols)
        assert torch.equal(ours.fired, expected.fired)
        assert relative(ours.acts.values, expected.acts.values) <= tolerance
        assert relative(ours.sae_out, expected.sae_out) <= tolerance
        assert relative(ours.loss, expected.loss) <= tolerance
        assert relative(ours.level_losses, expected.level_losses) <= tolerance
        assert relative(ours.aux_loss, expected.aux_loss) <= tolerance
        for name, gradient, wanted in zip(
            ours.gradients._fields, ours.gradients, expected.gradients, strict=True
        ):
            assert relative(gradient, wanted) <= tolerance, name

    return check

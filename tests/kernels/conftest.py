"""Builders shared by the kernel tests: random problems, ranks in threads, and the distance between two results."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from sae_lens_maira.kernels import Gradients, SparseActs, StepResult, StepSpec, Weights, Workspace
from sae_lens_maira.kernels.comm import LocalCommunicator
from sae_lens_maira.kernels.problem import DeadMask
from sae_lens_maira.kernels.step import Stages, run_stages


class Meeting:
    """Where ranks in threads exchange values. One thread runs at a time, since triton's interpreter needs that."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = threading.Lock()
        self._all = threading.Barrier(size, timeout=60)
        self._values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._wait()
        values = list(self._values)
        self._wait()
        return values

    def end(self) -> None:
        self._all.abort()

    def _wait(self) -> None:
        self.turn.release()
        try:
            self._all.wait()
        finally:
            self.turn.acquire()


class ThreadCommunicator(LocalCommunicator):
    """`Communicator` of one thread."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self._meeting.exchange(self.rank, tensor.clone())).sum(0))

    def min_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self._meeting.exchange(self.rank, tensor.clone())).amin(0))

    def counts(self, value: int) -> list[int]:
        return self._meeting.exchange(self.rank, value)

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meeting.exchange(self.rank, rows.clone()))


def in_threads(size: int, body: Callable[[ThreadCommunicator], Any]) -> list[Any]:
    """Results of a function on each of several ranks."""
    meeting = Meeting(size)

    def run(rank: int) -> Any:
        with meeting.turn:
            try:
                return body(ThreadCommunicator(rank, meeting))
            except BaseException:
                meeting.end()
                raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.fixture
def divided_step() -> Callable[..., StepResult]:
    """One step whose latents are divided over ranks, put together; ranks agree on what they all have."""

    def step(
        size: int, stages: Stages, weights: Weights, x: torch.Tensor, spec: StepSpec, dead: DeadMask
    ) -> StepResult:
        def of_rank(comm: ThreadCommunicator) -> StepResult:
            own = slice(comm.rank, None, size)
            W_enc, b_enc, W_dec, b_dec = weights
            share = Weights(W_enc[:, own], b_enc[own].contiguous(), W_dec[own].contiguous(), b_dec)
            return run_stages(stages, share, x, spec, dead, Workspace(), comm, own_latents=True)

        results = in_threads(size, of_rank)
        first, gradients = results[0], results[0].gradients
        for other in results[1:]:
            for name in ("loss", "level_losses", "aux_loss", "sae_out", "fired", "min_positive"):
                assert torch.equal(getattr(first, name), getattr(other, name)), name
            assert torch.equal(gradients.b_dec, other.gradients.b_dec)
        whole = weights.W_dec.new_empty(weights.W_dec.shape)
        matrices = {"W_enc_t": whole, "b_enc": whole[:, 0].clone(), "W_dec": whole.clone()}
        for name, matrix in matrices.items():
            for rank, result in enumerate(results):
                matrix[rank::size] = getattr(result.gradients, name)
        rows, cols, values = (
            torch.cat([getattr(r.acts, n) for r in results]) for n in ("rows", "cols", "values")
        )
        order = (rows * weights.W_dec.shape[0] + cols).argsort()
        acts = SparseActs(rows[order], cols[order], values[order], first.acts.shape)
        return replace(first, acts=acts, gradients=Gradients(**matrices, b_dec=gradients.b_dec))

    return step


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

"""Interrupts take effect between updates and leave a checkpoint that resumes to the same bits."""

import signal

import pytest
import torch
from sae_lens.training._interruption import InterruptedException, interrupt_callback

from sae_lens_maira.training import FusedSAETrainer, latest_checkpoint, resume
from sae_lens_maira.training.interruption import SafePoints

pytestmark = pytest.mark.compat


@pytest.fixture(autouse=True)
def python_handlers():
    """Python's own handlers: SAELens' runners, run by other tests of this process, leave theirs behind."""
    left = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in left.items():
        signal.signal(number, handler)


class Interrupting:
    """A data provider that sends a signal to this process before one batch."""

    def __init__(self, data, at: int, number: int) -> None:
        self.data, self.at, self.number = data, at, number

    def __iter__(self):
        return self

    def __next__(self):
        if self.data.place == self.at:
            signal.raise_signal(self.number)
        return next(self.data)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, InterruptedException)]
)
def test_an_interrupted_run_resumes_to_the_same_weights(
    number, raised, make_sae, make_config, planted_data, tmp_path
):
    cfg = make_config(10, checkpoint_path=str(tmp_path))
    whole = FusedSAETrainer(make_config(10), make_sae("saelens"), planted_data(24, 64)).fit()
    before = signal.getsignal(number)
    data = Interrupting(planted_data(24, 64), 6, number)
    with pytest.raises(raised):
        FusedSAETrainer(cfg, make_sae("saelens"), data).fit()
    assert signal.getsignal(number) is before
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found == tmp_path / str(6 * 64)
    rest = FusedSAETrainer(cfg, make_sae("saelens", seed=2), planted_data(24, 64, start=6))
    resume(rest, found)
    assert rest.n_training_steps == 6
    rest.fit()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(rest.sae.state_dict()[name], tensor), name


def test_signals_wait_for_a_safe_moment():
    before = signal.signal(signal.SIGTERM, interrupt_callback)
    try:
        points, reached = SafePoints(), []

        def work() -> None:
            with points.installed():
                signal.raise_signal(signal.SIGTERM)
                reached.append("update done")
                with points.safe():
                    reached.append("never")

        with pytest.raises(InterruptedException):
            work()
        assert reached == ["update done"]
    finally:
        signal.signal(signal.SIGTERM, before)

"""The captured step without a GPU: bodies are recorded operator by operator and replayed on the same tensors.

As a CUDA graph does, a replay reads what is at the recorded addresses and repeats the recorded launches: a number that
was read on the host, a tensor that moved or a size that changed gives another result than steps without graphs.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import GridExecutor

from sae_lens_maira.training.captured import StepGraphs

sys.path.insert(0, str(Path(__file__).parent))
from interpreted_counts import counted, trainer


class Tape(TorchDispatchMode):
    """What ran, in order; triton launches are one entry each."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            self.entries.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run everything again; new tensors are copied to where the recorded ones are."""
        for func, args, kwargs, out in self.entries:
            inputs = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if old.untyped_storage().data_ptr() not in inputs:
                    assert old.shape == new.shape
                    old.copy_(new)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]


def record(body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record and run; the first replay does nothing, since a CUDA graph's recording runs nothing."""
    tape, plain = Tape(), GridExecutor.__call__

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        tape.entries.append((plain, (self, *args), kwargs, None))
        before, tape.paused = tape.paused, True
        try:
            return counting(self, *args, **kwargs)
        finally:
            tape.paused = before

    with pytest.MonkeyPatch.context() as patch, counted() as counts, tape:
        counting = GridExecutor.__call__
        patch.setattr(GridExecutor, "__call__", launch)
        result = body()
    assert counts.total.syncs == 0, {name: work for name, work in counts.stages.items() if work.syncs}
    runs = []

    def replay() -> None:
        if runs:
            tape.replay()
        runs.append(1)

    return replay, result


@pytest.mark.parametrize(
    "options", [{"candidates": "bf16"}, {"convention": "dictionary_learning", "autocast": True}]
)
def test_recorded_steps_equal_steps_without_graphs(options):
    """The learning rate changes, rows jump in size, latents die and come back, the last batch is short."""
    plain, ours = trainer(**options), trainer(**options)
    with pytest.warns(
        UserWarning, match="Steps run without CUDA graphs: they need the triton backend on CUDA"
    ):
        graphs = StepGraphs(ours, ours._change, "they need the triton backend on CUDA, and this is a test")
    graphs.record = record
    ours._graphs = graphs
    torch.manual_seed(1)
    batches = [torch.randn(6, 12) for _ in range(11)]
    batches[5] /= 30
    batches[10] = batches[10][:4]
    for number, batch in enumerate(batches):
        outputs = []
        for run in (plain, ours):
            for group in run.optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + number)
            if number in (7, 8):
                run.n_forward_passes_since_fired[:2] = 2e6 * (number == 7)
                if "convention" in options:
                    run.sae.tokens_since_fired[:2] = 10**8 * (number == 7)
            outputs.append(run._train_step(run.sae, batch))
            run.n_training_steps += 1
        expected, output = outputs
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
        for (name, ours_now), plain_now in zip(
            ours.sae.state_dict().items(), plain.sae.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(
                ours_now, plain_now, rtol=1e-6, atol=1e-7, msg=f"{name}, step {number}"
            )
        torch.testing.assert_close(ours.act_freq_scores, plain.act_freq_scores)
    assert graphs.replayed >= 3

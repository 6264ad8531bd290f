"""One training step as two CUDA graphs, so that the host makes two launches instead of sixty.

    copy the batch in -> graph 1: selection, passes, losses -> read a few numbers -> graph 2: clip, Adam, statistics

Both are recorded from the functions that a step without graphs calls. All tensors that they read have fixed addresses
and sizes; the learning rate and the step number are on the device. The numbers show whether graph 1 is valid: the
selection is right and no latent is dead. If it is not valid, the step runs without graphs; no weight has changed at
that point. The host waits only for these numbers.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sae_lens_maira.kernels import Gradients, StepResult, Workspace
from sae_lens_maira.kernels.selection import refuse_broken
from sae_lens_maira.kernels.step import first_attempt
from sae_lens_maira.training.architectures import StepPlan
from sae_lens_maira.training.inputs import not_finite_error

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Function that records a function of fixed tensors; returns its replay function and its result, which each replay
overwrites.
"""
Losses = Callable[[torch.Tensor, Workspace], tuple[StepResult, torch.Tensor, torch.Tensor]]
"""Result of a batch, the threshold for the next step, and the numbers of `step.first_attempt`."""


def record_cuda_graph(body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record a CUDA graph; the memory of its tensors belongs to the graph while it exists."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as one that prefetches batches, may use the device at the same time.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = body()
    return graph.replay, result


class CapturedStep:
    """A step that was recorded for one set of tensors.

    Attributes:
        key: Sizes, settings and addresses that must not change.
        result: Losses, gradients and activations of the last batch; the next one overwrites them.
    """

    result: StepResult

    def __init__(
        self,
        key: tuple[Any, ...],
        x: torch.Tensor,
        losses: Losses,
        update: Callable[[StepResult], None],
        workspace: Workspace,
        record: Record,
        give_up: Callable[[RuntimeError], None],
    ) -> None:
        """Store what is to be recorded; graphs are recorded when they are first used.

        Args:
            key: Sizes, settings and addresses that must not change.
            x: Batch (rows, d_in) of the size to record.
            losses: Function recorded as the first graph.
            update: Function recorded as the second graph.
            workspace: Workspace of steps without graphs. Its threshold and the optimizer's results are shared; buffers
                are not, since a batch of another size replaces them.
            record: Function that records a graph.
            give_up: Function called if the update cannot be recorded; the update then runs without a graph.
        """
        self.key = key
        self._x = torch.empty_like(x)
        self._shared, self._own = workspace, Workspace()
        self._own.refreshed = workspace.refreshed
        self._own.threshold = self._threshold = x.new_zeros(())
        self._losses, self._update, self._record, self._give_up = losses, update, record, give_up
        self._replay_losses: Callable[[], None] | None = None
        self._replay_update: Callable[[], None] | None = None

    def losses(self, x: torch.Tensor) -> list[int]:
        """Compute losses and gradients of a batch; return the numbers of `step.first_attempt`, for which the host
        waits.
        """
        known = self._shared.threshold
        assert known is not None
        if known is not self._threshold:
            self._threshold.copy_(known) if isinstance(known, torch.Tensor) else self._threshold.fill_(known)
        self._x.copy_(x)
        if self._replay_losses is None:
            self._replay_losses, (self.result, self._next, self._numbers) = self._record(
                lambda: self._losses(self._x, self._own)
            )
        self._replay_losses()
        return self._numbers.tolist()

    def update(self) -> None:
        """Update weights, moments and statistics with the gradients of the last `losses`."""
        if self._replay_update is None:
            try:
                self._replay_update, _ = self._record(self._change)
            except RuntimeError as error:
                self._give_up(error)
                self._replay_update = self._change
        self._replay_update()
        self._shared.threshold = self._threshold

    def _change(self) -> None:
        self._update(self.result)
        self._threshold.copy_(self._next)


class StepGraphs:
    """Captured step of a trainer; recorded again when sizes, settings or addresses change.

    Attributes:
        record: Function that records a graph; None once steps have proved impossible to record.
        replayed: Number of steps whose losses came from a graph.
    """

    def __init__(
        self,
        trainer: Any,
        change: Callable[[StepPlan, StepResult], None],
        reason: str | None = None,
    ) -> None:
        """Store the trainer and the functions to record; nothing is recorded yet.

        Args:
            trainer: `FusedSAETrainer` whose steps are recorded.
            change: Function that makes the changes of a step on the device.
            reason: Reason why steps cannot be recorded, or None; it is shown as a warning.
        """
        self._trainer, self._change = trainer, change
        self.record: Record | None = record_cuda_graph
        self.replayed = 0
        self._captured: CapturedStep | None = None
        self._last_key: tuple[Any, ...] | None = None
        self._topk_threshold = torch.empty(0)
        if reason is not None:
            self._give_up(reason)

    def losses(
        self, plan: StepPlan, x: torch.Tensor, workspace: Workspace, buffers: Gradients
    ) -> CapturedStep | None:
        """Compute losses and gradients of a batch; None if the step must run without graphs.

        This is so for two steps after a change of sizes or addresses, if a latent is dead, and if the threshold has
        changed too much.

        Args:
            plan: Plan of the step.
            x: Centred rows (rows, d_in).
            workspace: Workspace of steps without graphs.
            buffers: Buffers for the gradients of the matrices.

        Raises:
            SAEError: The loss is not finite.
        """
        if self.record is None or workspace.threshold is None:
            return None
        key = self._key(plan, x, workspace, buffers)
        if self._captured is None or self._captured.key != key:
            self._captured, known, self._last_key = None, self._last_key, key
            if known != key:
                return None
            losses, update = partial(self._losses, plan, buffers), partial(self._update, plan)
            self._captured = CapturedStep(key, x, losses, update, workspace, self.record, self._not_recorded)
            self._topk_threshold = plan.sae.topk_threshold.clone()
        self._trainer.optimizer.load_rates()
        try:
            right, _, _, broken, *dead, finite = self._captured.losses(x)
        except RuntimeError as error:
            return self._not_recorded(error)
        refuse_broken(broken)
        if not right or any(dead):
            return None
        if not finite:
            raise not_finite_error(plan.sae, x, self._trainer.n_training_steps)
        if plan.sae.topk_threshold is not self._topk_threshold:  # a step without graphs has made a new tensor
            plan.sae.topk_threshold = self._topk_threshold.copy_(plan.sae.topk_threshold)
        self.replayed += 1
        return self._captured

    def _losses(self, plan: StepPlan, buffers: Gradients, x: torch.Tensor, workspace: Workspace) -> Any:
        from sae_lens_maira.kernels.triton_stages import TRITON  # triton is imported only when it runs

        dead = plan.dead(self._trainer.dead_neurons, len(x))
        return first_attempt(TRITON, plan.weights(), x, plan.spec, dead, workspace, buffers)

    def _update(self, plan: StepPlan, result: StepResult) -> None:
        self._change(plan, result)
        plan.sae.topk_threshold = self._topk_threshold.copy_(plan.sae.topk_threshold)

    def _key(
        self, plan: StepPlan, x: torch.Tensor, workspace: Workspace, buffers: Gradients
    ) -> tuple[Any, ...]:
        """Everything that a recorded step depends on, except the values of tensors."""
        sae, trainer = plan.sae, self._trainer
        fixed = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, *buffers]
        fixed += [trainer.act_freq_scores, trainer.n_forward_passes_since_fired]
        fixed += [sae.tokens_since_fired] if plan.unit_decoder else []
        for p in sae.parameters():
            fixed += [t for _, t in sorted(trainer.optimizer.state.get(p, {}).items())]
        for left in workspace.refreshed.values():
            fixed += [left.norms, *([] if left.shadow is None else [left.shadow])]
        sets_threshold = not plan.unit_decoder or trainer.n_training_steps > sae.cfg.threshold_start_step
        return (x.shape, x.dtype, plan.spec, id(workspace), sets_threshold, *(t.data_ptr() for t in fixed))

    def _not_recorded(self, error: RuntimeError) -> None:
        self._give_up(f"the step could not be recorded ({str(error).splitlines()[0][:200]})")

    def _give_up(self, reason: str) -> None:
        self.record = self._captured = None
        warnings.warn(f"Steps run without CUDA graphs: {reason}.", stacklevel=2)


def reason_for_no_graphs(backend: str, device: str, ranks: int, control: str | None) -> str | None:
    """Reason why the steps of a trainer cannot be recorded; None if they can."""
    if control == "soft_frozen_decoder":
        return "a softly frozen decoder is replaced at each step"
    if backend != "triton" or torch.device(device).type != "cuda":
        return f"they need the triton backend on CUDA, and this is {backend} on {device}"
    if ranks > 1:
        return f"they work in one process only, and there are {ranks} ranks"
    return None

"""Adam with its moments divided over ranks by latents (ZeRO-1).

    gradients of this rank's rows -> clip by the norm of all ranks' rows -> Adam on these rows -> rows to every rank

A rank keeps the moments of its share of the rows of W_dec and of W_enc transposed, both (d_sae, d_in). Biases are
updated by every rank. Bytes per rank in float32, with n = d_sae d_in and N ranks: weights 8 n, gradients 8 n, moments
16 n / N instead of 16 n. The traffic is that of the sum over ranks that it replaces. While a matrix is sent, the next
one is updated.
"""

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from typing_extensions import override

from sae_lens_maira.kernels import ProcessGroupCommunicator
from sae_lens_maira.kernels.comm import shares
from sae_lens_maira.training.optimizer import MOMENTS, RowMajorAdam


class ShardedAdam(RowMajorAdam):
    """`RowMajorAdam` over ranks; gradients of the matrices have to be complete in this rank's rows only.

    `state_dict` on rank 0 has the moments of all ranks if every rank has just called `collect`. It is that of one
    process, so that a run can continue on another number of ranks.

    Attributes:
        rows: This rank's share of the latents.
    """

    def __init__(
        self, sae: TrainingSAE[Any], lr: float, betas: tuple[float, float], comm: ProcessGroupCommunicator
    ) -> None:
        super().__init__(sae.parameters(), lr, betas)
        self._comm = comm
        self._d_sae = sae.cfg.d_sae
        self._transposed = {sae.W_enc: True, sae.W_dec: False}
        self._whole: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        self.rows = shares(sae.cfg.d_sae, comm.size)[comm.rank]

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            # Matrices first, so that they are under way while biases are updated.
            trained = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: -p.ndim)
            pending = []
            for p in trained:
                self._prepare(p)
                if self._has_kernel(p):
                    self._step_by_kernel(p, group)
                    self.refreshed.pop(p)  # norms of this rank's rows only
                else:
                    self._step_fused([p], group)
                if p in self._transposed:
                    pending.append(self._comm.start_spread_(self._of_latents(p, p.detach())))
            for spread in pending:
                spread.wait()
        self.grad_scale = None

    def collect(self) -> None:
        """Send the moments of all ranks to rank 0, which holds them in memory of the host for one `state_dict`."""
        self._whole = {}
        for p in self._transposed:
            for name in MOMENTS if self.state.get(p) else ():
                rows = self._comm.collect(self.state[p][name], self._d_sae)
                if rows is not None:
                    self._whole.setdefault(p, {})[name] = self._of_latents(p, rows)

    @override
    def state_dict(self) -> dict[str, Any]:
        whole, self._whole = self._whole, {}
        own = {p: self.state[p] for p in whole}
        for p, moments in whole.items():
            self.state[p] = own[p] | moments
        try:
            return super().state_dict()
        finally:
            for p, entry in own.items():
                self.state[p] = entry

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict["state"])
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if number in state and p in self._transposed:
                own = {n: self._of_latents(p, state[number][n])[self.rows].contiguous() for n in MOMENTS}
                state[number] = state[number] | own
        super().load_state_dict({**state_dict, "state": state})

    @override
    def _norm(self, known: dict[torch.nn.Parameter, torch.Tensor]) -> torch.Tensor:
        gradients = self._gradients()
        own = [self._of_latents(p, g)[self.rows] for p, g in gradients.items() if p in self._transposed]
        every = [g for p, g in gradients.items() if p not in self._transposed]
        squares_of = [torch.linalg.vector_norm(g).square() for g in own]
        total = self._comm.sum_(torch.stack(squares_of).sum()) if own else every[0].new_zeros(())
        return torch.stack([total, *(torch.linalg.vector_norm(g).square() for g in every)]).sum().sqrt()

    @override
    def _prepare(self, p: torch.nn.Parameter) -> None:
        if p not in self._transposed:
            return super()._prepare(p)
        if not self.state[p]:
            own = self._of_latents(p, p.detach())[self.rows]
            self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in MOMENTS:
                self.state[p][name] = torch.zeros_like(own, memory_format=torch.contiguous_format)
        return None

    @override
    def _parts(self, p: torch.nn.Parameter) -> tuple[torch.Tensor, ...]:
        if p not in self._transposed:
            return super()._parts(p)
        assert p.grad is not None
        rows = (self._of_latents(p, whole)[self.rows] for whole in (p.detach(), p.grad))
        return (*rows, *(self.state[p][name] for name in MOMENTS))

    def _of_latents(self, p: torch.nn.Parameter, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix of the parameter's shape as (d_sae, d_in), or back."""
        return matrix.T if self._transposed[p] else matrix

"""Adam over ranks that have moments of their share of the latents only.

    ShardedAdam   weights whole, moments divided (ZeRO-1):   gradients of this rank's rows -> clip by the norm of all
                  ranks' rows -> Adam on these rows -> rows to every rank
    LatentAdam    weights, gradients and moments divided:    clip by the norm of all ranks' latents -> Adam

The matrices are W_dec and W_enc transposed, both (d_sae, d_in). Bytes per rank in float32, with n = d_sae d_in and N
ranks: weights 8 n, gradients 8 n and moments 16 n / N with `ShardedAdam`, where the traffic is that of the sum over
ranks that it replaces, and while a matrix is sent, the next one is updated. With `LatentAdam` 32 n / N in all, and
nothing is sent.
"""

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from typing_extensions import override

from sae_lens_maira.kernels import ProcessGroupCommunicator
from sae_lens_maira.kernels.comm import shares
from sae_lens_maira.kernels.own_latents import latents_of
from sae_lens_maira.training.optimizer import MOMENTS, RowMajorAdam


class DividedAdam(RowMajorAdam):
    """Base of both: clips by the norm over ranks, and reads and writes the state of one process.

    `state_dict` on rank 0 has the moments of all ranks if every rank has just called `collect`, so that a run can
    continue on another number of ranks.

    Attributes:
        rows: This rank's share of the latents.
    """

    def __init__(
        self,
        sae: TrainingSAE[Any],
        lr: float,
        betas: tuple[float, float],
        comm: ProcessGroupCommunicator,
        own: list[slice],
        divided: list[torch.nn.Parameter],
    ) -> None:
        """Build the optimizer.

        Args:
            sae: The SAE; its parameters are updated.
            lr: Learning rate.
            betas: Adam's decay rates.
            comm: The ranks.
            own: Latents of each rank.
            divided: Parameters whose moments are divided.
        """
        super().__init__(sae.parameters(), lr, betas)
        self._comm, self._own, self._d_sae = comm, own, sae.cfg.d_sae
        self._divided = {p: p is sae.W_enc for p in divided}
        """Parameters whose moments are divided, and whether latents are their columns."""
        self._whole: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        self.rows = own[comm.rank]

    def collect(self) -> None:
        """Send the moments of all ranks to rank 0, which holds them in memory of the host for one `state_dict`."""
        self._whole = {}
        for p in self._divided:
            for name in MOMENTS if self.state.get(p) else ():
                own = self._as_stored(p, self.state[p][name])
                rows = self._comm.collect(own, self._own, self._d_sae)
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
            if number in state and p in self._divided:
                shares_of = (self._of_latents(p, state[number][n])[self.rows].contiguous() for n in MOMENTS)
                own = (self._as_stored(p, share) for share in shares_of)
                state[number] = state[number] | dict(zip(MOMENTS, own, strict=True))
        super().load_state_dict({**state_dict, "state": state})

    @override
    def _norm(self, known: dict[torch.nn.Parameter, torch.Tensor]) -> torch.Tensor:
        norms = self._norms(known)
        own = [norm.square() for p, norm in norms.items() if p in self._divided]
        every = [norm.square() for p, norm in norms.items() if p not in self._divided]
        total = [self._comm.sum_(torch.stack(own).sum())] if own else []
        return torch.stack([*total, *every]).sum().sqrt()

    def _of_latents(self, p: torch.nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape with latents as rows, or back."""
        return tensor.T if self._divided[p] else tensor

    def _as_stored(self, p: torch.nn.Parameter, rows: torch.Tensor) -> torch.Tensor:
        """Moments of this rank's latents, one latent per row, as `state` has them, or back."""
        return rows


class LatentAdam(DividedAdam):
    """`RowMajorAdam` of an SAE that has this rank's latents only (see `latent_shares`); b_dec is on every rank."""

    def __init__(
        self, sae: TrainingSAE[Any], lr: float, betas: tuple[float, float], comm: ProcessGroupCommunicator
    ) -> None:
        own = [latents_of(rank, comm.size) for rank in range(comm.size)]
        b_enc: Any = sae.b_enc  # declared by each class of SAE
        super().__init__(sae, lr, betas, comm, own, [sae.W_enc, b_enc, sae.W_dec])

    @override
    def _as_stored(self, p: torch.nn.Parameter, rows: torch.Tensor) -> torch.Tensor:
        return self._of_latents(p, rows)


class ShardedAdam(DividedAdam):
    """`RowMajorAdam` over ranks; gradients of the matrices have to be complete in this rank's rows only."""

    def __init__(
        self, sae: TrainingSAE[Any], lr: float, betas: tuple[float, float], comm: ProcessGroupCommunicator
    ) -> None:
        super().__init__(sae, lr, betas, comm, shares(sae.cfg.d_sae, comm.size), [sae.W_enc, sae.W_dec])

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
                if p in self._divided:
                    pending.append(self._comm.start_spread_(self._of_latents(p, p.detach())))
            for spread in pending:
                spread.wait()
        self.grad_scale = None

    @override
    def _norms(self, known: dict[torch.nn.Parameter, torch.Tensor]) -> dict[torch.nn.Parameter, torch.Tensor]:
        own = {
            p: self._of_latents(p, g)[self.rows] if p in self._divided else g
            for p, g in self._gradients().items()
        }
        return {p: torch.linalg.vector_norm(gradient) for p, gradient in own.items()}

    @override
    def _prepare(self, p: torch.nn.Parameter) -> None:
        if p not in self._divided:
            return super()._prepare(p)
        if not self.state[p]:
            own = self._of_latents(p, p.detach())[self.rows]
            self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in MOMENTS:
                self.state[p][name] = torch.zeros_like(own, memory_format=torch.contiguous_format)
        return None

    @override
    def _parts(self, p: torch.nn.Parameter) -> tuple[torch.Tensor, ...]:
        if p not in self._divided:
            return super()._parts(p)
        assert p.grad is not None
        rows = (self._of_latents(p, whole)[self.rows] for whole in (p.detach(), p.grad))
        return (*rows, *(self.state[p][name] for name in MOMENTS))

"""Adam in one pass over memory, for parameters in any memory order, with gradient clipping.

    p <- p - lr m^ / (sqrt(v^) + eps)   on   g * min(1, c / (|g| + 1e-6))

torch's fused Adam reads memory in storage order: with a gradient or moment in another order than its parameter it
silently updates wrong entries, and a transposed parameter needs copies. Here gradients and moments have the memory
order of their parameter. State dicts are contiguous and without the fused flag, as those of SAELens' Adam, so that each
can read the other's. On a GPU the learning rate, the step number and the clip scale stay on the device, so that the
host does not wait.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from typing_extensions import override

from sae_lens_maira.kernels.workspace import Refreshed

MOMENTS = ("exp_avg", "exp_avg_sq")


class RowMajorAdam(torch.optim.Adam):
    """torch's fused Adam, correct and fast for transposed parameters; `clip_` applies a norm limit in the next step.

    Attributes:
        use_triton: Whether this package's kernel updates float32 matrices; it also computes row norms for the next
            step.
        keep_bf16: Whether that kernel writes bfloat16 copies too.
        refreshed: Parameter -> row norms and copy that the kernel computed.
        unit: Matrices whose rows the kernel keeps at norm 1: it removes the part of the gradient along each row, and
            divides the updated row by its norm.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, lr=lr, betas=betas, fused=True)
        self.grad_scale: torch.Tensor | None = None
        self.use_triton = False
        self.keep_bf16 = False
        self.refreshed: dict[torch.nn.Parameter, Refreshed] = {}
        self.unit: set[torch.nn.Parameter] = set()
        self._rates: dict[torch.device, tuple[float, torch.Tensor]] = {}
        self.register_state_dict_post_hook(_as_plain_adam)
        self.register_load_state_dict_post_hook(_as_fused)

    @torch.no_grad()
    def clip_(
        self, max_norm: float, known: dict[torch.nn.Parameter, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Limit the next step's gradient norm over all parameters; return the norm before clipping, 0-d.

        The division is part of the update, so that it needs no separate pass.

        Args:
            max_norm: Largest norm of the clipped gradient.
            known: Parameter -> norm of its gradient (0-d), for norms that are already known.
        """
        total = self._norm(known or {})
        scale = total + 1e-6
        scale = (scale if max_norm == 1 else scale / max_norm).clamp(min=1.0)
        if not self.use_triton and total.device.type == "cpu" and float(scale) == 1.0:
            return total
        if total.dtype == torch.float32:
            self.grad_scale = scale
        else:  # torch's fused Adam reads its scale as float32, which is not exact enough for float64
            for gradient in self._gradients().values():
                gradient.div_(scale)
        return total

    def _norm(self, known: dict[torch.nn.Parameter, torch.Tensor]) -> torch.Tensor:
        """Norm of all gradients, 0-d."""
        return torch.linalg.vector_norm(torch.stack(list(self._norms(known).values())))

    def _norms(self, known: dict[torch.nn.Parameter, torch.Tensor]) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Norm of each gradient, 0-d."""
        norms = {}
        for p, gradient in self._gradients().items():
            if p in self.unit:
                from sae_lens_maira.kernels.triton_adam import (
                    tangent_norm,
                )  # triton is imported only when it runs

                norms[p] = tangent_norm(_in_memory_order(gradient), _in_memory_order(p.detach()))
            else:
                norms[p] = known[p] if p in known else torch.linalg.vector_norm(_in_memory_order(gradient))
        return norms

    def _gradients(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        return {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - no closure
        """Make one update; it consumes the clip scale."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                self._prepare(p)
                if self._has_kernel(p):
                    self._step_by_kernel(p, group)
            self._step_fused([p for p in parameters if not self._has_kernel(p)], group)
        self.grad_scale = None

    def _has_kernel(self, p: torch.nn.Parameter) -> bool:
        return self.use_triton and p.ndim == 2 and p.dtype == torch.float32

    def _prepare(self, p: torch.nn.Parameter) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        for name in MOMENTS:
            state[name] = _ordered_like(p, state[name])
        assert p.grad is not None
        p.grad = _ordered_like(p, p.grad)

    def _parts(self, p: torch.nn.Parameter) -> tuple[torch.Tensor, ...]:
        """Weights, gradient and moments that this process updates, in memory order."""
        assert p.grad is not None
        return tuple(
            _in_memory_order(t) for t in (p.detach(), p.grad, *(self.state[p][name] for name in MOMENTS))
        )

    def _step_fused(self, parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        if not parameters:
            return
        parts = [self._parts(p) for p in parameters]
        weights, gradients, means, squares = ([part[i] for part in parts] for i in range(4))
        on_device = self.use_triton and weights[0].dtype == torch.float32
        adam(
            weights,
            gradients,
            means,
            squares,
            [],
            [self.state[p]["step"] for p in parameters],
            fused=True,
            grad_scale=self.grad_scale,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=self._rate(group["lr"], weights[0].device) if on_device else group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_by_kernel(self, p: torch.nn.Parameter, group: dict[str, Any]) -> None:
        from sae_lens_maira.kernels.triton_adam import (
            adam_rows,
            next_step,
        )  # triton is imported only when it runs

        state, known = self.state[p], self.refreshed.get(p)
        rows, gradient, mean, square = self._parts(p)
        shadow = known.shadow if known is not None and self.keep_bf16 else None
        fresh = shadow is None or known is None or not known.is_of(p)
        if shadow is None and self.keep_bf16:
            shadow = torch.empty_like(rows, dtype=torch.bfloat16)
        norms = adam_rows(
            rows,
            gradient,
            mean,
            square,
            scale=self.grad_scale if self.grad_scale is not None else rows.new_ones(()),
            settings=next_step(state["step"], self._rate(group["lr"], p.device), group["betas"]),
            betas=group["betas"],
            eps=group["eps"],
            shadow=shadow,
            fresh=fresh,
            unit=p in self.unit,
            norms=known.norms if known is not None and known.norms.shape == rows.shape[:1] else None,
        )
        self.refreshed[p] = Refreshed(norms, shadow, p.data_ptr(), p._version)

    def load_rates(self) -> None:
        """Copy the learning rates to the device, where a captured update reads them."""
        for group in self.param_groups:
            self._rate(group["lr"], group["params"][0].device)

    def _rate(self, lr: float, device: torch.device) -> torch.Tensor:
        """Learning rate on the device, 0-d; setting it makes an asynchronous launch."""
        known, tensor = self._rates.get(device, (None, None))
        if tensor is None:
            tensor = torch.empty((), dtype=torch.float32, device=device)
        if known != lr:
            tensor.fill_(lr)
            self._rates[device] = (lr, tensor)
        return tensor


def _ordered_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor if it is stored in the parameter's memory order, else a copy in that order."""
    return (
        tensor
        if tensor.stride() == parameter.stride()
        else torch.empty_like(parameter.detach()).copy_(tensor)
    )


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor or its transpose, whichever is contiguous."""
    return tensor if tensor.is_contiguous() or tensor.ndim != 2 else tensor.T


def _as_plain_adam(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        index: {
            name: value.cpu() if name == "step" else value.contiguous() if torch.is_tensor(value) else value
            for name, value in entry.items()
        }
        for index, entry in state_dict["state"].items()
    }
    return {
        **state_dict,
        "state": state,
        "param_groups": [{**group, "fused": None} for group in state_dict["param_groups"]],
    }


def _as_fused(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)

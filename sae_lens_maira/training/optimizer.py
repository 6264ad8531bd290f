"""Adam in one pass over memory, for parameters in any memory order, with gradient clipping inside.

    p <- p - lr m^ / (sqrt(v^) + eps)   on   g * min(1, c / (|g| + 1e-6))

torch's fused Adam walks raw memory: with a moment or gradient in another order than its parameter it silently updates
wrong entries. Here moments always follow their parameter. State dicts are written contiguous and without the fused
flag, as SAELens' own Adam would, so either can read the other's. It knows nothing about SAEs.
"""

from collections.abc import Iterable
from typing import Any

import torch

from sae_lens_maira.kernels.step import Refreshed


class RowMajorAdam(torch.optim.Adam):
    """torch's fused Adam, kept safe for transposed parameters; `clip_` folds a norm limit into the next step.

    Attributes:
        use_triton: Whether matrices are updated by this package's kernel, which also leaves row norms and bfloat16
            copies behind.
        keep_bf16: Whether that kernel writes bfloat16 copies.
        refreshed: What the kernel left behind, by parameter.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, lr=lr, betas=betas, fused=True)
        self.grad_scale: torch.Tensor | None = None
        self.use_triton = False
        self.keep_bf16 = False
        self.refreshed: dict[torch.nn.Parameter, Refreshed] = {}
        self.register_state_dict_post_hook(_as_plain_adam)
        self.register_load_state_dict_post_hook(_as_fused)

    @torch.no_grad()
    def clip_(self, max_norm: float) -> torch.Tensor:
        """Limits the next step's gradient norm over all parameters; the norm before it, 0-d.

        The division happens inside the update instead of in a pass of its own.
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = [torch.linalg.vector_norm(_in_memory_order(p.grad)) for p in parameters]
        total = torch.linalg.vector_norm(torch.stack(norms))
        scale = ((total + 1e-6) / max_norm).clamp(min=1.0)
        if total.device.type == "cpu" and float(scale) == 1.0:
            return total
        if total.dtype == torch.float32:
            self.grad_scale = scale
        else:  # torch's fused Adam reads its scale as float32, too coarse for float64
            for p in parameters:
                p.grad.div_(scale)
        return total

    def step(self, closure: Any = None) -> Any:
        """One update; the clip factor is used up by it."""
        self._check_order()
        by_kernel = self._step_matrices() if self.use_triton else []
        result = super().step(closure)  # skips parameters without a gradient
        for parameter, gradient in by_kernel:
            parameter.grad = gradient
        self.grad_scale = None
        return result

    @torch.no_grad()
    def _step_matrices(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Updates every float32 matrix by the kernel and takes its gradient away; pairs to give it back."""
        from sae_lens_maira.kernels.triton_adam import adam_rows  # triton is imported only when it runs

        done = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p.ndim != 2 or p.dtype != torch.float32:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] = state["step"].cpu() + 1
                rows, gradient, mean, square = (
                    _in_memory_order(t) for t in (p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"])
                )
                known = self.refreshed.get(p)
                shadow = known.shadow if known is not None else None
                if shadow is None and self.keep_bf16:
                    shadow = torch.empty_like(rows, dtype=torch.bfloat16)
                norms = adam_rows(
                    rows,
                    gradient,
                    mean,
                    square,
                    self.grad_scale if self.grad_scale is not None else rows.new_ones(()),
                    int(state["step"]),
                    float(group["lr"]),
                    group["betas"],
                    group["eps"],
                    shadow,
                )
                self.refreshed[p] = Refreshed(norms, shadow, p.data_ptr(), p._version)
                done.append((p, p.grad))
                p.grad = None
        return done

    @torch.no_grad()
    def follow_parameters(self) -> None:
        """Brings every moment into the memory order of its parameter."""
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state and state[name].stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter).copy_(state[name])

    def _check_order(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.stride() != p.stride():
                    p.grad = torch.empty_like(p).copy_(p.grad)
        self.follow_parameters()


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor or its transpose, whichever is contiguous: a norm then is one sequential read."""
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
    if isinstance(optimizer, RowMajorAdam):
        optimizer.follow_parameters()

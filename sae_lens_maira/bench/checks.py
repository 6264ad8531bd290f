"""What a step costs besides time, and whether its result is right: gradients, memory, launches, host syncs, kernels."""

import ctypes
import gc
import warnings
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput

from sae_lens_maira.bench.arms import Arm, Shape
from sae_lens_maira.bench.counts import counted
from sae_lens_maira.kernels import StepSpec, Weights, Workspace, fused_step
from sae_lens_maira.training import FusedSAETrainer
from sae_lens_maira.training.architectures import StepPlan


def wait(device: str) -> None:
    """Wait until a GPU is idle; nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def gradient_error(shape: Shape, x: torch.Tensor) -> float:
    """Largest relative error of a parameter's gradient against SAELens' autograd, a quarter of the latents dead."""
    sae: Any = shape.sae()
    dead = torch.zeros(shape.d_sae, dtype=torch.bool, device=shape.device)
    dead[::4] = True
    given = TrainStepInput(x, {}, dead, n_training_steps=0, is_logging_step=False)
    sae.training_forward_pass(given).loss.backward()
    plan = StepPlan(sae)
    ours = fused_step(plan.weights(), x, plan.spec, dead).gradients
    errors = [(ours.W_enc_t.T - sae.W_enc.grad).norm() / sae.W_enc.grad.norm()]
    for name in ("b_enc", "W_dec", "b_dec"):
        expected = getattr(sae, name).grad
        errors.append((getattr(ours, name) - expected).norm() / expected.norm())
    return float(max(errors))


def errors_of(shape: Shape, backend: Any, **options: Any) -> dict[str, float]:
    """Relative errors of loss and gradients against the sparse backend in float32, an eighth of the latents dead.

    Args:
        shape: Problem size.
        backend: Backend to compare.
        **options: Fields of `StepSpec`, such as autocast or candidates.
    """
    sae = shape.sae()
    weights = Weights(*(p.detach() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)))
    dead = torch.zeros(shape.d_sae, dtype=torch.bool, device=shape.device)
    dead[::8] = True
    x, widths = shape.rows(), tuple(shape.levels)
    ours = fused_step(weights, x, StepSpec(k=shape.k, widths=widths, **options), dead, backend=backend)
    exact = fused_step(weights, x, StepSpec(k=shape.k, widths=widths), dead, backend="sparse")
    pairs = {"loss": (ours.loss, exact.loss)}
    pairs |= {
        n: (a, b) for n, a, b in zip(ours.gradients._fields, ours.gradients, exact.gradients, strict=True)
    }
    return {n: float((a.double() - b.double()).norm() / b.double().norm()) for n, (a, b) in pairs.items()}


def peak_above(arm: Arm, x: torch.Tensor) -> int | None:
    """Peak bytes of one step above parameters, gradients and moments; None where the system does not count them.

    CUDA's caching allocator counts; on Linux the kernel's largest resident size, reset after the heap was trimmed, so
    that memory freed earlier hides nothing. What a backend keeps between steps counts as the step's own.
    """
    arm.step(x, 0)  # moments exist from the first step on
    if isinstance(arm.trainer, FusedSAETrainer):
        arm.trainer._workspace = Workspace()
    gradients = sum(p.numel() * p.element_size() for p in arm.trainer.sae.parameters())
    gc.collect()
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        arm.step(x, 0)
        return torch.cuda.max_memory_allocated(x.device) - before - gradients
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None

    def resident(field: str) -> int:
        return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024

    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = resident("VmRSS")
    arm.step(x, 0)
    return resident("VmHWM") - before - gradients


def host_work(arm: Arm, x: torch.Tensor, n_dead: int = 0) -> dict[str, int] | None:
    """Kernel launches of one step, and how often the host waits for the device.

    On CUDA torch's profiler and its debug mode for synchronizing calls count. On a CPU it is what a GPU would be asked
    for by the same operators (see `counts`); None for a compiled arm, whose operators do not pass torch's dispatcher.

    Args:
        arm: The arm.
        x: Batch of rows.
        n_dead: Number of dead latents.
    """
    arm.step(x, n_dead)
    if not x.is_cuda:
        if arm.way.compiled:
            return None
        with counted() as counts:
            arm.step(x, n_dead)
        return {"launches": counts.total.launches, "syncs": counts.total.syncs}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            arm.step(x, n_dead)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = sum("synchronizing" in str(warning.message) for warning in caught)
    return {"launches": round(kernels_of(arm, x, n_dead)["launches"]), "syncs": syncs}


def kernels_of(arm: Arm, x: torch.Tensor, n_dead: int = 0, steps: int = 3) -> dict[str, Any]:
    """Device milliseconds and launches per step, in all and of the 25 longest kernels, from torch's profiler.

    Args:
        arm: The arm.
        x: Batch of rows.
        n_dead: Number of dead latents.
        steps: Steps to average.
    """
    from torch.profiler import ProfilerActivity, profile

    device = "cuda" if x.is_cuda else "cpu"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if x.is_cuda else [])
    arm.step(x, n_dead)
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            arm.step(x, n_dead)
        wait(device)
    kernels = [e for e in profiler.key_averages() if e.device_type.name == "CUDA"]
    rows = sorted(
        ((e.self_device_time_total / 1e3 / steps, e.count / steps, e.key[:70]) for e in kernels), reverse=True
    )
    longest = [{"ms": round(ms, 3), "launches": round(n, 1), "kernel": key} for ms, n, key in rows[:25]]
    busy = round(sum(row[0] for row in rows), 3)
    return {"busy_ms": busy, "launches": sum(row[1] for row in rows), "kernels": longest}


__all__ = ["errors_of", "gradient_error", "host_work", "kernels_of", "peak_above", "wait"]

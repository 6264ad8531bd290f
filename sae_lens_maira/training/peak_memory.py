"""Peak memory of one step above parameters, gradients and moments.

On CUDA the caching allocator counts. On Linux the kernel keeps each process's largest resident size, which can be
reset; the heap is trimmed first, so that memory freed earlier cannot hide what the step takes. It counts what a
backend keeps between steps as the step's own.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_maira.kernels import Workspace
from sae_lens_maira.training.trainer import FusedSAETrainer


def peak_above(trainer: SAETrainer[Any, Any], step: Callable[[], None]) -> int | None:
    """Bytes that `step` needs at its worst moment above parameters, gradients and moments; None if unknown here."""
    step()  # moments exist from the first step on
    if isinstance(trainer, FusedSAETrainer):
        trainer._workspace, trainer._buffers = Workspace(), None
    gradients = sum(p.numel() * p.element_size() for p in trainer.sae.parameters())
    device = trainer.sae.W_dec.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before - gradients
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before - gradients


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0

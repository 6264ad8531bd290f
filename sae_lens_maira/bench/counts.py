"""Count what one training step asks of a GPU, without one: launches, host syncs, bytes and FLOP by stage.

Operators are counted as PyTorch dispatches them on the CPU, triton kernels where they are launched. An operator counts
for as many launches as its CUDA implementation makes (`LAUNCHES`, from PyTorch's sources), and for a sync where that
implementation copies a number to the host (`SYNCS`) or where the host copies a tensor to the device. Bytes are those
of inputs and outputs; gathers count what they read.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

LAUNCHES = {"topk": 12, "nonzero": 4, "bincount": 4, "index_put_": 3}
"""Launches of operators that make more than one; `_launches` has those that depend on the input."""
SYNCS = {"_local_scalar_dense": 1, "nonzero": 1, "bincount": 2, "masked_select": 1, "repeat_interleave": 1}
FREE = {
    *("view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "as_strided"),
    *("detach", "alias", "_unsafe_view", "unbind", "split", "_reshape_alias", "diagonal", "lift_fresh"),
    *(
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "_local_scalar_dense",
        "_sparse_coo_tensor_unsafe",
    ),
    *("_record_function_enter_new", "_record_function_exit"),
    *("_sparse_coo_tensor_with_dims_and_tensors", "_coalesced_", "is_same_size"),
}
"""Operators that launch nothing."""
PRODUCTS = {"mm": 0, "addmm": 1, "mv": 0, "addmv_": 1}
"""Matrix products, with the place of their left operand."""


@dataclass
class Work:
    """What a stage asks of the device."""

    launches: int = 0
    syncs: int = 0
    bytes: int = 0
    flop: int = 0


@dataclass
class Counts:
    """Work by stage: the function of this package, or of SAELens, that asked for it."""

    stages: dict[str, Work] = field(default_factory=dict)

    def note(self, launches: int = 0, syncs: int = 0, size: int = 0, flop: int = 0) -> None:
        """Add work to the stage that runs."""
        work = self.stages.setdefault(_stage(sys._getframe(2)), Work())
        work.launches += launches
        work.syncs += syncs
        work.bytes += size
        work.flop += flop

    @property
    def total(self) -> Work:
        """The sum over stages."""
        parts = self.stages.values()
        return Work(
            *(sum(getattr(part, name) for part in parts) for name in ("launches", "syncs", "bytes", "flop"))
        )


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if self.paused or (name in FREE and name != "_local_scalar_dense"):
            return out
        tensors = [t for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, torch.Tensor)]
        size = sum(
            t.numel() * t.element_size() for t in {id(t): t for t in tensors if not t.is_sparse}.values()
        )
        flop = 0
        if name in PRODUCTS:
            left, right = (args[PRODUCTS[name]], args[PRODUCTS[name] + 1])
            flop = 2 * left.shape[0] * left.shape[1] * (right.shape[1] if right.ndim == 2 else 1)
        if name in ("index_select", "index", "gather"):
            size = 2 * out.numel() * out.element_size()
        masked = name in ("index", "index_put_") and any(t.dtype == torch.bool for t in tensors[1:])
        launches = 0 if name in FREE else _launches(name, args)
        self.counts.note(launches, SYNCS.get(name, 0) + int(masked), size, flop)
        return out


def _launches(name: str, args: Any) -> int:
    if name == "sort":  # copy, indices, histogram, scan, and one pass of the radix sort per byte
        return 4 + args[0].element_size()
    if name == "cumsum":  # one along rows, two along a single vector
        return 1 if args[0].ndim == 2 else 2
    return LAUNCHES.get(name, 1)


@contextmanager
def counted() -> Iterator[Counts]:
    """Count everything inside. Triton kernels are counted if the interpreter runs them (TRITON_INTERPRET=1)."""
    counts = Counts()
    operators = _Operators(counts)
    undo = [
        _replaced(torch, "tensor", _from_host(torch.tensor, counts, operators)),
        _replaced(torch.Tensor, "new_tensor", _from_host(torch.Tensor.new_tensor, counts, operators)),
    ]
    for name in ("cpu", "tolist"):
        undo.append(_replaced(torch.Tensor, name, _to_host(getattr(torch.Tensor, name), counts, operators)))
    if "triton" in sys.modules:
        from triton.runtime.interpreter import GridExecutor

        undo.append(_replaced(GridExecutor, "__call__", _launch(GridExecutor.__call__, counts, operators)))
    try:
        with operators:
            yield counts
    finally:
        for back in undo:
            back()


def _replaced(owner: Any, name: str, new: Any) -> Any:
    old = getattr(owner, name)
    setattr(owner, name, new)
    return lambda: setattr(owner, name, old)


def _quietly(run: Any, operators: _Operators, *args: Any, **kwargs: Any) -> Any:
    before, operators.paused = operators.paused, True
    try:
        return run(*args, **kwargs)
    finally:
        operators.paused = before


def _from_host(run: Any, counts: Counts, operators: _Operators) -> Any:
    """Numbers that the host sends to the device; torch.tensor without a device leaves them where they are."""
    stays = run is torch.tensor

    def call(*args: Any, **kwargs: Any) -> Any:
        if not operators.paused and (not stays or kwargs.get("device") is not None):
            counts.note(launches=1, syncs=1)
        return _quietly(run, operators, *args, **kwargs)

    return call


def _to_host(run: Any, counts: Counts, operators: _Operators) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not operators.paused:
            counts.note(syncs=1)
        return _quietly(run, operators, *args, **kwargs)

    return call


def _launch(run: Any, counts: Counts, operators: _Operators) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = {t.data_ptr(): t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)}
        counts.note(launches=1, size=sum(t.numel() * t.element_size() for t in tensors.values()))
        return _quietly(run, operators, self, *args, **kwargs)

    return call


def _stage(frame: FrameType | None) -> str:
    while frame is not None:
        path = frame.f_code.co_filename
        if "sae_lens_maira" in path or "/sae_lens/" in path or "torch/optim" in path:
            return f"{path.rsplit('/', 1)[-1].removesuffix('.py')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"

"""A second device that needs no hardware: tensors with values that report another device than the CPU.

An operation that mixes them with CPU tensors raises, with a GPU's two exceptions: CPU tensors without a dimension, and
CPU indices into a tensor on the device. An index on the device into a CPU tensor raises.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # a device type that torch does not initialise; tensors here do have values
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class DeviceTensor(torch.Tensor):
    """A CPU tensor that reports `DEVICE`."""

    inner: torch.Tensor  # pyright: ignore[reportIncompatibleMethodOverride] - a private method of torch has this name

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "DeviceTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.inner})"

    def tolist(self) -> Any:
        """Copy to the CPU first, as a GPU tensor does."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Make tensors of numbers and of lists as indices on the CPU: torch makes them without its dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return func(args[0], _as_index(args[1]), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            rest = {name: value for name, value in kwargs.items() if name != "device"}
            return func(*args, **rest).to(kwargs["device"])
        return func(*args, **kwargs)


def _as_index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_as_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values of its tensors, and put the results on the device that they belong to."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if any(x.device.type == DEVICE.type and not isinstance(x, DeviceTensor) for x in tensors):
        raise RuntimeError(f"{func} got a tensor without values: torch made it without its dispatcher")
    there = {id(x.inner): x for x in tensors if isinstance(x, DeviceTensor)}
    here = [x for x in tensors if not isinstance(x, DeviceTensor) and x.ndim > 0]
    if func in INDEXED and isinstance(args[0], DeviceTensor):
        indices = {id(x) for x in args[1] if x is not None}
        here = [x for x in here if id(x) not in indices]
    if there and here and func not in COPIES:
        raise RuntimeError(
            f"{func} got tensors on {DEVICE} and on the CPU: {[tuple(x.shape) for x in tensors]}"
        )
    target = kwargs.get("device")
    away = bool(there) if target is None else torch.device(target).type == DEVICE.type
    if func is torch.ops.aten.copy_.default:
        away = isinstance(args[0], DeviceTensor)
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def bare(x: Any) -> Any:
        return x.inner if isinstance(x, DeviceTensor) else x

    result = func(*tree_map(bare, args), **tree_map(bare, kwargs))

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in there:
            return there[id(x)]
        return DeviceTensor(x.clone() if any(x is t for t in tensors) else x) if away else x

    return tree_map(wrap, result)


def move(module: torch.nn.Module) -> None:
    """Move the parameters and buffers of a module to `DEVICE`, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(
                    DeviceTensor(value.detach()), requires_grad=value.requires_grad
                )
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = DeviceTensor(value)


@contextmanager
def _on_other_device(*modules: torch.nn.Module) -> Iterator[torch.device]:
    for module in modules:
        move(module)
    with _Dispatch(), _Literals():
        yield DEVICE


@pytest.fixture
def on_other_device() -> Callable[..., Any]:
    """Context manager: move modules to the second device (for good), and let `device=` reach it inside."""
    return _on_other_device

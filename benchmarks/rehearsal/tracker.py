"""Count the bytes of living tensors: the same number on every machine and under any load.

    with TensorBytes() as tracker:
        model = load()
        tracker.start()      # tensors that exist now are not counted
        model(**inputs)
    tracker.peak             # most bytes of tensors that lived at once since `start`

A storage counts from the operation that returns it until it is freed. Buffers inside one operation, sparse tensors,
numpy arrays and tensors of other threads are not counted.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """A context in which the storages of new tensors are counted.

    Attributes:
        now: Bytes of counted storages that are alive.
        peak: Largest value of `now` since `start`.
        at_peak: The operation that reached it, and the bytes of the largest tensors that lived then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak = ""
        self._known: dict[int, tuple[int, Any]] = {}

    def start(self) -> None:
        """Reset the counts, and count from here on."""
        self._known.clear()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for value in tree_leaves(result):
            if not _has_storage(value):
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            if given is None:  # a view of an input that is not counted is not new
                inputs = tree_leaves((args, kwargs))
                given = {x.untyped_storage()._cdata for x in inputs if _has_storage(x)}
            if key not in given:
                self._add(key, storage)
                if self.now > 1.02 * self.peak:
                    largest = sorted((size for size, _ in self._known.values()), reverse=True)[:8]
                    self.at_peak = (
                        f"{func} of {tuple(value.shape)}, largest MB {[n // 10**5 / 10 for n in largest]}"
                    )
                self.peak = max(self.peak, self.now)
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def freed(_: Any) -> None:
            if self._known.get(key, (0, None))[1] is reference:
                del self._known[key]
                self.now -= size

        reference = weakref.ref(storage, freed)
        self._known[key] = (size, reference)
        self.now += size


def _has_storage(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided

"""Run one command and write its time and peak memory: `python -m benchmarks.rehearsal.measured FILE BYTES WORD...`

    peak     largest resident size (VmHWM), pages of mapped files included
    above    growth of the resident size after the model was loaded, at its largest; without a model, after the start
    tensors  the same of living tensors, see `tracker`

Linux only: the kernel counts, and its counter is reset when a model has been loaded. The process may take BYTES
of its own (RLIMIT_DATA), as on a machine of that size: commands that take a share of the free memory see the limit. 0
is no limit, for checkpoints whose files are larger than the memory: their pages count although they can be dropped.
"""

import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.rehearsal.tracker import TensorBytes
from sae_lens_maira.cli import main
from sae_lens_maira.maira2 import Maira2ForConditionalGeneration


@contextmanager
def when_loaded(call: Callable[[Any], None]) -> Iterator[None]:
    """Call `call(model)` each time that a model has been read from a checkpoint."""
    kept = Maira2ForConditionalGeneration.__dict__.get("from_pretrained")
    read: Any = Maira2ForConditionalGeneration.from_pretrained

    def from_pretrained(cls: Any, *args: Any, **keywords: Any) -> Any:
        found = read(*args, **keywords)
        call(found[0] if isinstance(found, tuple) else found)
        return found

    Maira2ForConditionalGeneration.from_pretrained = classmethod(from_pretrained)  # pyright: ignore
    try:
        yield
    finally:
        if kept is None:
            del Maira2ForConditionalGeneration.from_pretrained
        else:
            Maira2ForConditionalGeneration.from_pretrained = kept


class Resident:
    """Peaks of this process's resident size.

    Attributes:
        peak: Largest size so far, bytes.
        above: Largest growth after the last `restart`, or after an earlier one, bytes.
    """

    def __init__(self) -> None:
        self.peak = self.above = 0
        self._base = 0
        self.restart()

    def restart(self, model: Any = None) -> None:
        """Count growth from here on; every page of a model's weights is read first, so that they all are resident."""
        self.stop()
        if model is not None:
            for value in model.parameters():
                if value.device.type == "cpu":
                    value.detach().view(-1)[::1024].float().sum()
            self.above = 0
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._base = _status("VmRSS")

    def stop(self) -> None:
        """Update `peak` and `above`."""
        highest = _status("VmHWM")
        self.peak = max(self.peak, highest)
        self.above = max(self.above, highest - self._base if self._base else 0)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def run(words: list[str]) -> int:
    """Run a command of the package, or a function of `calls` by `call NAME WORD...`; return the exit code."""
    if words[0] != "call":
        return main(words)
    from benchmarks.rehearsal import calls

    getattr(calls, words[1])(*words[2:])
    return 0


def _main() -> int:
    file, limit, words = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resident = Resident()
    tracker = TensorBytes()

    def restart(model: Any) -> None:
        resident.restart(model)
        tracker.start()

    start, cpu = time.monotonic(), time.process_time()
    with when_loaded(restart), tracker:
        code = run(words)
    resident.stop()
    found = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu, "code": code}
    memory = {
        "peak": resident.peak,
        "above": resident.above,
        "tensors": tracker.peak,
        "at_peak": tracker.at_peak,
    }
    file.write_text(json.dumps(found | memory))
    return code


if __name__ == "__main__":
    sys.exit(_main())

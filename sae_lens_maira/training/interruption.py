"""Signals that wait for a moment when a step can be undone.

    unsafe: weights, moments and counters are being changed       signal waits
    safe:   losses and gradients of a step are being computed     signal is delivered

An interrupt in the middle of an update leaves weights that belong to no step; a checkpoint of them cannot be resumed
to the same result. Ranks of a multi-process run spend the safe time waiting for each other, so a signal reaches them
there.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sae_lens.training._interruption import InterruptedException

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SafePoints:
    """Delays SIGINT and SIGTERM until the next safe moment, then does what the handler before it would."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._safe = False
        self._pending: int | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the two signals wait for `safe`. Only the main thread gets signals; elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._receive)
        try:
            yield
        except BaseException:
            self._pending = None  # the exception ends the run already
            raise
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            pending, self._pending = self._pending, None
            if pending is not None:
                signal.raise_signal(pending)

    @contextmanager
    def safe(self) -> Iterator[None]:
        """Inside, a signal is delivered at once; one that waited is delivered on entry."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._deliver(pending, None)
        self._safe = True
        try:
            yield
        finally:
            self._safe = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._safe:
            self._deliver(number, frame)
        else:
            self._pending = number

    def _deliver(self, number: int, frame: FrameType | None) -> None:
        handler = self._before.get(number)
        if callable(handler):
            handler(number, frame)
        elif handler != signal.SIG_IGN:
            # The default would end the process without a checkpoint.
            raise InterruptedException()

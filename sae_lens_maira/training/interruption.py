"""Delay signals until a point of the step at which no weight is being changed.

    unsafe: weights, moments and counters are being changed       signal waits
    safe:   losses and gradients of a step are being computed     signal is delivered

An interrupt in the middle of an update would leave weights between two steps; a run resumed from them would differ.
Ranks of a multi-process run wait for each other in the safe part, so that signals are delivered there.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sae_lens.training._interruption import InterruptedException

from sae_lens_maira.errors import MairaError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(InterruptedException, MairaError):
    """A signal ended a run; SAELens' runners handle it as their own exception, and commands print it."""


class SafePoints:
    """Delays SIGINT and SIGTERM until the next safe point, then calls the previous handler."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._safe = False
        self._pending: int | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Context in which the two signals are delayed until `safe`. Has no effect outside the main thread."""
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
        """Context in which signals are delivered immediately; a delayed signal is delivered on entry."""
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
            raise StoppedError(
                f"Training was ended by {signal.Signals(number).name}. Run the same command again: with a "
                "checkpoint_path it continues from the newest checkpoint, without one it starts from the beginning."
            )

"""One worker thread for the model, and jobs whose events an asynchronous request reads.

    queued (how many are ahead) -> events of the job -> result | error | cancelled

A job that its reader leaves is cancelled: before it starts it never runs, while it runs it is told to stop.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sae_lens_maira.errors import MairaError
from sae_lens_maira.workbench.session import Cancelled, Event, Stopped

LOG = logging.getLogger(__name__)
MAX_WAITING = 16
BEAT = 1.0
"""Seconds between two messages to a page that waits."""

Work = Callable[[Event, Stopped], Any]


class Job:
    """One request for the model."""

    def __init__(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        self._work, self._loop = work, loop
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask the job to stop."""
        self._cancelled.set()

    def run(self) -> None:
        """Do the work; called on the worker thread."""
        if self._cancelled.is_set():
            self._emit({"event": "cancelled"})
            return
        self._emit({"event": "started"})
        try:
            result = self._work(self._emit, self._cancelled.is_set)
        except Cancelled:
            self._emit({"event": "cancelled"})
        except MairaError as error:
            self._emit({"event": "error", "message": str(error)})
        except Exception as error:  # the page shows it, the worker goes on
            LOG.exception("A run of the workbench failed")
            self._emit({"event": "error", "message": f"{type(error).__name__}: {error}"})
        else:
            self._emit({"event": "result", "result": result})

    async def next_event(self, seconds: float) -> dict[str, Any] | None:
        """The next event, or None if there was none for some seconds."""
        try:
            return await asyncio.wait_for(self._events.get(), seconds)
        except asyncio.TimeoutError:
            return None

    def _emit(self, event: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class JobQueue:
    """Runs jobs one after another on one thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="workbench")
        self._jobs: list[Job] = []

    async def events(self, work: Work) -> AsyncGenerator[dict[str, Any], None]:
        """Queue some work and yield its events until it ends; closing the generator cancels it."""
        if len(self._jobs) >= MAX_WAITING:
            yield {
                "event": "error",
                "message": f"{MAX_WAITING} runs are waiting for the model. Try again later.",
            }
            return
        job = Job(work, asyncio.get_running_loop())
        self._jobs.append(job)
        self._pool.submit(job.run)
        started = False
        try:
            while True:
                event = await job.next_event(BEAT)
                if event is None:
                    yield (
                        {"event": "working"}
                        if started
                        else {"event": "queued", "ahead": self._jobs.index(job)}
                    )
                    continue
                started = True
                yield event
                if event["event"] in ("result", "error", "cancelled"):
                    return
        finally:
            job.cancel()
            self._jobs.remove(job)

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        for job in self._jobs:
            job.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)


__all__ = ["Job", "JobQueue"]

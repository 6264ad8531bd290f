"""One worker thread for the model, and jobs whose events an asynchronous request reads as lines of JSON.

    queued (how many are ahead) -> events of the job -> result | error | cancelled

A job that its reader leaves is cancelled: before it starts it never runs, while it runs it stops at the next forward
pass. It counts as waiting until the worker has ended it.
"""

import asyncio
import json
import logging
import math
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from sae_lens_maira.errors import MairaError
from sae_lens_maira.workbench.session import Cancelled, Event, Stopped

LOG = logging.getLogger(__name__)
MAX_WAITING = 16
BEAT = 1.0
"""Seconds between two messages to a page that waits."""
LAST = ("result", "error", "cancelled")

Work = Callable[[Event, Stopped], Any]


class Job:
    """One request for the model."""

    def __init__(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        self._work, self._loop = work, loop
        self._events: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
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
            last = {"event": "result", "result": self._work(self._emit, self._cancelled.is_set)}
        except Cancelled:
            last = {"event": "cancelled"}
        except MairaError as error:
            last = {"event": "error", "message": str(error)}
        except Exception as error:  # the page shows it, the worker goes on
            LOG.exception("A run of the workbench failed")
            last = {"event": "error", "message": f"{type(error).__name__}: {error}"}
        self._emit(last)

    async def next_line(self, seconds: float) -> tuple[str, bytes] | None:
        """The next event's kind and line, or None if there was none for some seconds."""
        try:
            return await asyncio.wait_for(self._events.get(), seconds)
        except asyncio.TimeoutError:
            return None

    def _emit(self, event: dict[str, Any]) -> None:
        with suppress(RuntimeError):  # The server has stopped, so no reader is left.
            self._loop.call_soon_threadsafe(self._events.put_nowait, (event["event"], to_line(event)))


class JobQueue:
    """Runs jobs one after another on one thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="workbench")
        self._jobs: list[Job] = []

    async def lines(self, work: Work) -> AsyncGenerator[bytes, None]:
        """Queue some work and yield its events until it ends; closing the generator cancels it."""
        if len(self._jobs) >= MAX_WAITING:
            message = f"{MAX_WAITING} runs are waiting for the model. Try again later."
            yield to_line({"event": "error", "message": message})
            return
        loop = asyncio.get_running_loop()
        job = Job(work, loop)
        self._jobs.append(job)
        ended = self._pool.submit(job.run)
        ended.add_done_callback(lambda _: self._forget(job, loop))
        started = False
        try:
            while True:
                line = await job.next_line(BEAT)
                if line is None:
                    ahead = self._jobs.index(job) if job in self._jobs else 0
                    yield to_line({"event": "working"} if started else {"event": "queued", "ahead": ahead})
                    continue
                started = True
                yield line[1]
                if line[0] in LAST:
                    return
        finally:
            job.cancel()

    def close(self) -> None:
        """Cancel all jobs and let the thread end."""
        for job in self._jobs:
            job.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _forget(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._jobs.remove, job)


def to_line(event: Any) -> bytes:
    """One line of JSON; infinities and NaN, which JSON lacks, become null."""
    return json.dumps(_plain(event)).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


__all__ = ["Job", "JobQueue", "to_line"]

"""Send one request over HTTP with bounds on the time and the size of the whole answer.

A body is read as it comes and decompressed within the same bound, so that a slow drip, an endless body and a
compressed bomb all end as a problem. A server on this machine is never reached through a proxy of the environment,
and redirects are not followed.
"""

from __future__ import annotations

import asyncio
import email.utils
import importlib
import sys
import time
import zlib
from typing import Any

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.interp.protocol import Completion, Problem, plain_words, read_response
from sae_lens_maira.privacy import is_loopback

MOST_BYTES = 4 << 20


def _import_event_loop() -> None:
    """Import the lazy part of `anyio`, which the client needs, while nnsight's `save` is off `object`.

    nnsight mounts a method `save` on every object; anyio then refuses its own classes ("Attribute 'save' is missing
    its type annotation") if it is imported later. The method is removed for the import and put back.
    """
    nnsight = sys.modules.get("nnsight")
    if nnsight is None or not hasattr(object, "save"):
        importlib.import_module("anyio._backends._asyncio")
        return
    mounts = importlib.import_module("nnsight._c")
    mounts.unmount("save")
    try:
        importlib.import_module("anyio._backends._asyncio")
    finally:
        mounts.mount(nnsight.save, "save")


_import_event_loop()

import httpx  # noqa: E402  (after the event loop, see above)


class Transport:
    """Sends requests to one address.

    Attributes:
        url: address of the chat completions.
        timeout: seconds for one answer as a whole.
    """

    def __init__(self, url: str, api_key: str, timeout: float) -> None:
        """Open a client.

        Raises:
            ConfigError: a proxy of the environment cannot be used.
        """
        self.url, self.timeout = url, timeout
        headers = {"Accept-Encoding": "identity", "Authorization": f"Bearer {api_key or 'none'}"}
        try:
            self._client = httpx.AsyncClient(
                headers=headers, timeout=timeout, trust_env=not is_loopback(url), follow_redirects=False
            )
        except (ImportError, ValueError, UnicodeError) as error:
            raise ConfigError(
                f"No client could be made for the server ({plain_words(str(error))}). Check OPENAI_API_KEY and the "
                "proxy variables of the environment."
            ) from None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def post(self, request: dict[str, Any]) -> tuple[Completion | Problem, float | None]:
        """Send a request once.

        Args:
            request: body of the request.

        Returns:
            The completion or a problem, and the seconds that `Retry-After` asks to wait, if any.
        """
        try:
            return await asyncio.wait_for(self._post(request), self.timeout)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            return Problem("timeout", f"no whole answer within {self.timeout:g} s", retry=True), None
        except (httpx.ConnectError, httpx.ProxyError) as error:
            return Problem("connection", plain_words(str(error)) or "no connection", retry=True), None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            words = plain_words(str(error)) or type(error).__name__
            return Problem("connection", f"the connection broke ({words})", retry=True), None

    async def _post(self, request: dict[str, Any]) -> tuple[Completion | Problem, float | None]:
        async with self._client.stream("POST", self.url, json=request) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            body = _Body(headers.get("content-encoding", ""))
            async for piece in response.aiter_raw():
                if not body.add(piece):
                    break
            result = body.problem or read_response(response.status_code, headers, bytes(body.content))
            return result, _seconds(headers.get("retry-after"))


class _Body:
    """A body that grows up to `MOST_BYTES`, decompressed.

    Attributes:
        content: decompressed bytes so far.
        problem: why reading was stopped, or None.
    """

    def __init__(self, encoding: str) -> None:
        self.content, self.problem, self._raw = bytearray(), None, 0
        self._inflate = zlib.decompressobj(wbits=47) if encoding.lower() in ("gzip", "deflate") else None
        if self._inflate is None and encoding.lower() not in ("", "identity"):
            self.problem = Problem(
                "no completion", f"the body is compressed as {plain_words(encoding)!r}, unasked"
            )

    def add(self, piece: bytes) -> bool:
        """Take more of the body; False where nothing more is wanted."""
        self._raw += len(piece)
        if self.problem is None:
            try:
                room = MOST_BYTES + 1 - len(self.content)
                self.content += piece if self._inflate is None else self._inflate.decompress(piece, room)
            except zlib.error:
                self.problem = Problem("no completion", "the compressed body is damaged")
        if max(len(self.content), self._raw) > MOST_BYTES:
            self.problem = Problem("too large", f"the answer is larger than {MOST_BYTES >> 20} MiB")
        return self.problem is None


def _seconds(retry_after: str | None) -> float | None:
    """Seconds to wait, from a number or an HTTP date; None where the header is missing or means nothing."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None

"""Requests to a language model over HTTP, and the journal of all calls.

`Transport` bounds the time and the size of the whole answer: a body is read in pieces and decompressed within the same
bound, so that a very slow, an endless or a highly compressed body becomes a problem and does not block the run. A
server on this machine is never reached through a proxy of the environment, and redirects are not followed. `Journal` is
an append-only file of JSON lines, used as cache, for resuming and for audit. The key of a row is the SHA-256 of the
exact request, so that no usable answer is paid for twice. Failed calls and invalid answers remain in the file and are
asked again. An incomplete last line, left by a kill, is ended with a newline before anything is appended. Memory
contains one file offset per usable answer, and images are stored as the SHA-256 of their bytes.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import importlib
import json
import os
import sys
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

from sae_lens_maira.checksums import take_checksum, with_checksum
from sae_lens_maira.errors import ConfigError, RecordError
from sae_lens_maira.interp.protocol import Completion, Problem, plain_words, read_response
from sae_lens_maira.privacy import is_loopback

_IMAGE = "data:image/"


def key_of(request: dict[str, Any]) -> str:
    """SHA-256 of a request, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Journal:
    """Journal of calls: usable answers by key, with rows read from the file.

    Attributes:
        path: Path of the file.
        torn: Number of lines that cannot be read (0 or 1 per kill) or have changed; their questions are asked again.
    """

    def __init__(self, path: Path | str) -> None:
        """Open or create the journal, readable by its owner only.

        Raises:
            RecordError: None of the first lines is a JSON object, so the file is not a journal.
        """
        self.path, self.torn = Path(path), 0
        self._places: dict[bytes, int] = {}
        self._notes: dict[str, Any] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        offset, whole = 0, True
        for number, line in enumerate(self._file, 1):
            self._take(line, offset, number)
            offset += len(line)
            whole = line.endswith(b"\n")
        if not whole:
            self._file.write(b"\n")

    def _take(self, line: bytes, offset: int, number: int) -> None:
        try:
            row = json.loads(line) if line.strip() else {"note": "", "value": None}
            if not isinstance(row, dict) or not take_checksum(row):
                raise ValueError("not an object, or not what was written")
            key = bytes.fromhex(row.get("key", ""))
        except (ValueError, TypeError, RecursionError):
            self.torn += 1
            # Every kill can leave one incomplete line, but a file of unreadable lines only is not a journal.
            if not self._places and not self._notes and self.torn > 1:
                raise RecordError(
                    f"Line {number} of {self.path} is not a JSON object, and neither is any line before it; this is "
                    "not a journal. Give another path."
                ) from None
            return
        if "note" in row:
            self._notes[row["note"]] = row.get("value")
        elif "key" in row and row.get("usable", not row.get("error")):
            self._places[key] = offset

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """Read the row of a usable answer, or None."""
        offset = self._places.get(bytes.fromhex(key))
        if offset is None:
            return None
        self._file.seek(offset)
        return json.loads(self._file.readline())

    def append(self, row: dict[str, Any]) -> None:
        """Write a row and flush it to the operating system, so that a killed process loses nothing.

        Args:
            row: `key`, `request`, `usable` (whether the answer may be used again) and the response.
        """
        offset = self._write({**row, "request": _without_images(row.get("request"))})
        if row.get("usable"):
            self._places[bytes.fromhex(row["key"])] = offset

    def note(self, name: str) -> Any:
        """Read a note about the server by name, or None."""
        return self._notes.get(name)

    def set_note(self, name: str, value: Any) -> None:
        """Write a note about the server, such as that it does not accept schemas."""
        self._write({"note": name, "value": value})
        self._notes[name] = value

    def _write(self, row: dict[str, Any]) -> int:
        # ASCII only: an answer may contain lone surrogates, which UTF-8 cannot encode.
        line = json.dumps(with_checksum(row), allow_nan=False).encode() + b"\n"
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        return offset

    def close(self) -> None:
        """Write everything to the disk and close."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _without_images(value: Any) -> Any:
    """Copy a request with every image replaced by its hash."""
    if isinstance(value, dict):
        return {name: _without_images(inside) for name, inside in value.items()}
    if isinstance(value, list):
        return [_without_images(inside) for inside in value]
    if isinstance(value, str) and value.startswith(_IMAGE):
        return f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
    return value


MOST_BYTES = 4 << 20


def _import_event_loop() -> None:
    """Import the lazy part of `anyio`, which the client needs, while nnsight's `save` is removed from `object`. nnsight
    adds a method `save` to every object.

    If anyio is imported after this, it refuses its own classes ("Attribute 'save' is missing its type annotation"). The
    method is removed for the import and added again.
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
        url: Address of the chat completions.
        timeout: Seconds for one whole answer.
    """

    def __init__(self, url: str, api_key: str, timeout: float) -> None:
        """Open a client.

        Raises:
            ConfigError: A proxy of the environment cannot be used.
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
            request: Body of the request.

        Returns:
            The completion or a problem, and the seconds of `Retry-After`, if any.
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
    """Response body of at most `MOST_BYTES`, decompressed while it is read.

    Attributes:
        content: Decompressed bytes so far.
        problem: Why reading was stopped, or None.
    """

    def __init__(self, encoding: str) -> None:
        self.content, self.problem, self._raw = bytearray(), None, 0
        self._inflate = zlib.decompressobj(wbits=47) if encoding.lower() in ("gzip", "deflate") else None
        if self._inflate is None and encoding.lower() not in ("", "identity"):
            self.problem = Problem(
                "no completion",
                f"the body is compressed as {plain_words(encoding)!r}, which was not requested",
            )

    def add(self, piece: bytes) -> bool:
        """Add a piece of the body; False if no more is needed."""
        self._raw += len(piece)
        if self.problem is None:
            try:
                left = MOST_BYTES + 1 - len(self.content)
                self.content += piece if self._inflate is None else self._inflate.decompress(piece, left)
            except zlib.error:
                self.problem = Problem("no completion", "the compressed body is damaged")
        if max(len(self.content), self._raw) > MOST_BYTES:
            self.problem = Problem("too large", f"the answer is larger than {MOST_BYTES >> 20} MiB")
        return self.problem is None


def _seconds(retry_after: str | None) -> float | None:
    """Parse seconds to wait from a number or an HTTP date; None if the header is missing or not valid."""
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

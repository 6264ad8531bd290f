"""Connection to a Neuronpedia server, and the journal of an upload.

The key is sent over https, or to this machine, and redirects are not followed. Server messages are shown with the key
masked. The journal is a JSON lines file, flushed before the next request, so that a cut upload can continue:

    {"upload": destination}  {"steps": {"source-set": "asked"}}  {"features": {"7": digest}}
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import queue
import threading
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from sae_lens_maira.checksums import take_checksum, with_checksum
from sae_lens_maira.dashboards.writing import json_line
from sae_lens_maira.errors import ConfigError, RecordError, ServerError
from sae_lens_maira.privacy import mask

KEY = "NEURONPEDIA_API_KEY"
MAX_ANSWER = 1 << 20
"""Longest answer read, in bytes; a Neuronpedia server answers an upload with a short message."""
ADVICE = {
    401: f"The key was not accepted; set {KEY} to a valid one.",
    403: "The key does not own this model or source set; use the account that made it, or another name.",
    409: "The name is taken; choose another source set.",
    413: "The request is too large for the server; give a smaller --max-bytes.",
    429: "The rate limit is reached; wait, then run the same command again to continue.",
    500: (
        "The server answers every internal error with this text; the reason is in its log. A request of many latents "
        "can exceed its transaction limit of 5 s: run the same command with --max-features 12 to continue."
    ),
}


def safe_address(url: str) -> str:
    """Check that a key may be sent to an address, and strip its trailing slash.

    Raises:
        ConfigError: It is neither https nor http on this machine, or contains a user name.
    """
    parts = urlsplit(url)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not (parts.scheme == "https" or (parts.scheme == "http" and local)) or "@" in parts.netloc:
        raise ConfigError(
            f"{url} is not an address that a key may be sent to; expected https, or http on this machine. Fix the "
            "address."
        )
    return url.rstrip("/")


class _Refusal(Exception):
    """A status other than 2xx: its code, the start of its body and its Retry-After."""

    def __init__(self, code: int, text: str, wait: str | None) -> None:
        super().__init__(code, text)
        self.code, self.text, self.wait = code, text, wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


class Site:
    """A Neuronpedia server.

    Args:
        url: Address of its API, checked by `safe_address`.
        key: API key.
        timeout: Seconds that one request may take as a whole.
    """

    def __init__(self, url: str, key: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout
        self._key = key
        handlers: list[Any] = [_NoRedirect()]
        if urlsplit(url).scheme == "http":  # this machine: do not send the key to a proxy
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def has_model(self, model_id: str) -> bool:
        """Whether the server has a model. There is no GET route; the POST answers null for an unknown model.

        Raises:
            ServerError: The server refused, or its answer is not one of a Neuronpedia server.
        """
        item = f"the look-up of model {model_id}"
        answer = self._json("POST", "model/get", {"id": model_id}, item)
        if answer is not None and not isinstance(answer, dict):
            raise self._strange(item, answer)
        return answer is not None

    def has_source_set(self, model_id: str, name: str) -> bool:
        """Whether the server has a source set; one that cannot be looked up is refused by the POST that follows."""
        path, item = f"source-set/{model_id}/{name}", f"the look-up of source set {name}"
        try:
            body = self._ask("GET", path, None)
            return json.loads(body) not in (None, {}, [])
        except ValueError:
            return False  # a page instead of an answer: there is no such route
        except _Refusal as refusal:
            if refusal.code in (404, 405):
                return False
            raise self._refused(refusal, item) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error, item) from None

    def post(self, path: str, body: dict[str, Any], item: str) -> None:
        """Send a body, and check that the answer is that of a Neuronpedia server that accepted it.

        Raises:
            ServerError: The server refused it, the connection broke, or the answer is a page, empty or an error; the
                message names `item`.
        """
        answer = self._json("POST", path, body, item)
        if not isinstance(answer, dict) or any(answer.get(key) for key in ("error", "errors")):
            raise self._strange(item, answer)

    def _json(self, method: str, path: str, body: dict[str, Any], item: str) -> Any:
        """Send a request and return the JSON of an answer with status 200."""
        sent = json_line(body).encode()
        try:
            answer = self._ask(method, path, sent)
        except _Refusal as refusal:
            raise self._refused(refusal, f"{item} ({len(sent):,} bytes)") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error, item) from None
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise self._strange(item, answer.decode("utf-8", "replace")) from None

    def _strange(self, item: str, answer: Any) -> ServerError:
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return self._error(
            f"{self.url} answered {item} with status 200 but not as a Neuronpedia server that accepted it: "
            f"{' '.join(text.split())[:200] or 'an empty body'!r}. It counts as not sent. Check the address and the "
            "key, then run the same command again."
        )

    def _ask(self, method: str, path: str, body: bytes | None) -> bytes:
        headers = {"X-Api-Key": self._key, "Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data=body, headers=headers, method=method)
        answered: queue.Queue[tuple[int, Message, bytes] | Exception] = queue.Queue(1)

        def exchange() -> None:
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    answered.put((answer.status, answer.headers, answer.read(MAX_ANSWER + 1)))
            except urllib.error.HTTPError as error:
                with error:
                    answered.put((error.code, error.headers, error.read(500) or str(error.reason).encode()))
            except Exception as error:
                answered.put(error)

        # In a thread: the socket's time-out restarts with every byte, so that a very slow answer would never end.
        threading.Thread(target=exchange, daemon=True).start()
        try:
            found = answered.get(timeout=self.timeout)
        except queue.Empty:
            raise http.client.HTTPException(f"no whole answer within {self.timeout:g} s") from None
        if isinstance(found, Exception):
            raise found
        code, fields, content = found
        if not 200 <= code < 300:
            raise _Refusal(code, content.decode("utf-8", "replace").strip(), fields.get("Retry-After"))
        if len(content) > MAX_ANSWER:
            raise http.client.HTTPException(f"the answer exceeds {MAX_ANSWER} bytes")
        return content

    def _refused(self, refusal: _Refusal, item: str) -> ServerError:
        advice = ADVICE.get(
            refusal.code, "What was accepted before is in the journal; run the same command to continue."
        )
        wait = f" (retry after {refusal.wait} s)" if refusal.wait else ""
        return self._error(
            f"{self.url} refused {item} with status {refusal.code}{wait}: {refusal.text}. {advice}"
        )

    def _broken(self, error: Exception, item: str) -> ServerError:
        return self._error(
            f"The connection to {self.url} broke while sending {item} ({error}); what was accepted before is in the "
            "journal. Run the same command again to continue."
        )

    def _error(self, message: str) -> ServerError:
        return ServerError(mask(message, self._key))


class Journal:
    """Journal of an upload: one JSON line per step, flushed to disk before the next request.

    The first line names the destination; another destination needs another journal.

    Args:
        path: The file; read if it exists.
        upload: Destination.

    Raises:
        RecordError: The file belongs to another upload, or is damaged.
    """

    def __init__(self, path: Path, upload: dict[str, str]) -> None:
        self.path, self.upload = path, upload
        self.features: dict[int, str] = {}
        self.steps: dict[str, str] = {}
        self._cut: int | None = None
        if not path.exists():
            return
        whole = path.read_text(encoding="utf-8", errors="replace")  # replaced letters change the checksum
        lines = whole[: whole.rfind("\n") + 1].splitlines()  # a line that was cut off was never acted on
        for number, text in enumerate(lines, 1):
            try:
                entry = json.loads(text)
                if not take_checksum(entry):
                    raise ValueError("its content has changed")
                if number == 1 and entry["upload"] != upload:
                    raise RecordError(
                        f"{path} is the journal of an upload to {entry['upload']}, this one goes to {upload}. Give "
                        "another journal."
                    )
                self.features |= {int(index): digest for index, digest in entry.get("features", {}).items()}
                self.steps |= entry.get("steps", {})
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise RecordError(
                    f"{path}, line {number} is damaged ({error}), so what was sent is not known. Restore the file, or "
                    "upload under another source set."
                ) from None
        if whole and not whole.endswith("\n"):
            self._cut = len(whole[: whole.rfind("\n") + 1].encode())

    def start(self) -> None:
        """Create the file, or cut off an incomplete last line."""
        if self._cut is not None:
            os.truncate(self.path, self._cut)
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"upload": self.upload})

    def holds(self, feature: dict[str, Any]) -> bool:
        """Whether a feature was sent before.

        Raises:
            RecordError: Another version of it was sent.
        """
        before = self.features.get(feature["index"])
        if before is not None and before != _digest(feature):
            raise RecordError(
                f"Latent {feature['index']} was sent before and has changed since; the site keeps the first version. "
                "Upload under another source set with another journal."
            )
        return before is not None

    def sent(self, features: list[dict[str, Any]]) -> None:
        """Record features that the server has accepted."""
        digests = {str(feature["index"]): _digest(feature) for feature in features}
        self._write({"features": digests})
        self.features |= {int(index): digest for index, digest in digests.items()}

    def step(self, name: str, state: str) -> None:
        """Record that a step was "asked" or is "done"."""
        self._write({"steps": {name: state}})
        self.steps[name] = state

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(with_checksum(entry)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _digest(feature: dict[str, Any]) -> str:
    return hashlib.sha256(json_line(feature).encode()).hexdigest()[:16]

"""A Neuronpedia server as an upload sees it: is it there, take this; every refusal with the item and what to do.

The key goes to https or to this machine alone, redirects are not followed, and what a server says is shown without
the key. It knows nothing about payloads.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from sae_lens_maira.dashboards.saedashboard import line
from sae_lens_maira.errors import ConfigError, ServerError

KEY = "NEURONPEDIA_API_KEY"
ADVICE = {
    401: f"The key was not accepted; set {KEY} to a valid one.",
    403: "The key does not own this model or source set; use the account that made it, or another name.",
    409: "The name is taken; choose another source set.",
    413: "The body is too large for the server; give a smaller max_bytes or a smaller window.",
    429: "The rate limit is reached; wait, then run the same command again: it goes on where it stopped.",
}


def safe_address(url: str) -> str:
    parts = urlsplit(url)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not (parts.scheme == "https" or (parts.scheme == "http" and local)) or "@" in parts.netloc:
        raise ConfigError(
            f"{url} is not an address to send a key to; expected https, or http on this machine. Mend the address."
        )
    return url.rstrip("/")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


class Site:
    def __init__(self, url: str, key: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout
        self._key = key
        handlers: list[Any] = [_NoRedirect()]
        if urlsplit(url).scheme == "http":  # this machine: a proxy must not see it
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def exists(self, path: str, what: str) -> bool:
        """Whether the server has it; where it can not be asked, the POST that follows is refused by the server."""
        try:
            return self._ask("GET", path, None).strip() not in (b"", b"null")
        except urllib.error.HTTPError as error:
            if error.code in (404, 405):
                return False
            raise self._refused(error, f"the {what}") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error, f"the {what}") from None

    def post(self, path: str, body: dict[str, Any], item: str) -> None:
        try:
            self._ask("POST", path, line(body).encode())
        except urllib.error.HTTPError as error:
            raise self._refused(error, item) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error, item) from None

    def _ask(self, method: str, path: str, body: bytes | None) -> bytes:
        headers = {"X-Api-Key": self._key, "Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data=body, headers=headers, method=method)
        with self._opener.open(request, timeout=self.timeout) as answer:
            return answer.read()

    def _refused(self, error: urllib.error.HTTPError, item: str) -> ServerError:
        said = error.read(500).decode("utf-8", "replace").strip().replace(self._key, "***")
        wait = error.headers.get("Retry-After")
        advice = ADVICE.get(
            error.code, "What was taken before is in the journal; run the same command to go on."
        )
        return ServerError(
            f"{self.url} refused {item} with status {error.code}{f' (retry after {wait} s)' if wait else ''}: "
            f"{said or error.reason}. {advice}"
        )

    def _broken(self, error: Exception, item: str) -> ServerError:
        return ServerError(
            f"The connection to {self.url} broke while sending {item} ({error}); what was taken before is in the "
            "journal. Run the same command again to go on."
        )

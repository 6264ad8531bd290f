"""Guarded upload to Neuronpedia's self-serve API: nothing leaves unless asked, and nothing credentialed ever.

    plan      every record is read and every payload checked; a study that is not public or synthetic ends it here
    send      only with confirm=True: model, source set, then payloads; each answer goes into a journal on disk
    resume    the same call again skips what the journal holds; an answer that was lost is asked for again

The site keeps the first version of a feature for ever, so a latent that changed since it was sent is refused.
Redirects are not followed, since they could carry the key elsewhere.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from sae_lens_maira.dashboards.api import MAX_BYTES, MAX_FEATURES, payloads
from sae_lens_maira.dashboards.saedashboard import line
from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.dashboards.validate import Line, payload_faults
from sae_lens_maira.errors import ConfigError, PrivacyError, RecordError, ServerError
from sae_lens_maira.interp.records import Interpretation
from sae_lens_maira.latents.recordset import RecordSet

SITE = "https://www.neuronpedia.org/api"
LOCALHOST = "http://localhost:3000/api"
KEY = "NEURONPEDIA_API_KEY"
SHAREABLE = ("public", "synthetic")
ADVICE = {
    401: f"The key was not accepted; set {KEY} to a valid one.",
    403: "The key does not own this model or source set; use the account that made it, or another name.",
    409: "The name is taken; choose another source set.",
    413: "The body is too large for the server; give a smaller max_bytes or a smaller window.",
    429: "The rate limit is reached; wait, then run the same command again: it goes on where it stopped.",
}


@dataclass(frozen=True)
class Plan:
    """What an upload would send, or has sent."""

    url: str
    model_id: str
    source: str
    payloads: int
    features: int
    left_out: int
    size: int
    already_sent: int
    sent: bool

    def __str__(self) -> str:
        did = "Sent" if self.sent else "Dry run: would send"
        return (
            f"{did} {self.features} latents in {self.payloads} requests ({self.size / 1e6:.1f} MB) to {self.url} as "
            f"{self.model_id}/{self.source}; {self.left_out} latents without activations left out, "
            f"{self.already_sent} sent before."
        )


def check_licences(records: RecordSet) -> None:
    """Refuse records of studies that must not leave.

    Raises:
        PrivacyError: a study is neither public nor synthetic, or no study is listed.
    """
    closed = [study for study in records.studies.values() if study.licence not in SHAREABLE]
    if closed or not records.studies:
        seen = (
            f"{len(closed)} of {len(records.studies)} studies are {closed[0].licence}"
            if closed
            else "no study is listed"
        )
        raise PrivacyError(
            f"Dashboards hold words of reports, and of these records {seen}; only public and synthetic studies may be "
            "uploaded, whatever is asked. Write records from such studies, or keep these dashboards on this machine."
        )


def upload(
    records: RecordSet,
    target: Target,
    journal: Path | str,
    interpretations: Mapping[int, Iterable[Interpretation]] | None = None,
    *,
    confirm: bool = False,
    localhost: bool = False,
    new_model: bool = False,
    key: str | None = None,
    base_url: str | None = None,
    max_features: int = MAX_FEATURES,
    max_bytes: int = MAX_BYTES,
    timeout: float = 120.0,
) -> Plan:
    """Check everything, and with `confirm` send it.

    Args:
        records: latent records; every study public or synthetic.
        target: names.
        journal: JSON lines file that remembers what was sent; the same file resumes.
        interpretations: per latent.
        confirm: send; without it no connection is made and no file written.
        localhost: use a Neuronpedia on this machine.
        new_model: make the model too; needed once per model.
        key: API key; taken from NEURONPEDIA_API_KEY if not given.
        base_url: another server; https, or http on this machine.
        max_features: latents per request, at most 128.
        max_bytes: of a request's body.
        timeout: seconds that one request may take.

    Returns:
        What was or would be sent.

    Raises:
        PrivacyError: a study must not leave; no connection was made.
        RecordError: a payload breaks the server's limits, or a latent changed since it was sent.
        ServerError: the server refused or the connection broke; names the item.
        ConfigError: no key, or an address that is not safe.
    """
    check_licences(records)
    url = _address(base_url or (LOCALHOST if localhost else SITE))
    book = Journal(
        Path(journal), {"url": url, "model": target.model_id, "source": target.source(records.meta.layer)}
    )
    count, features, size, all_features = 0, 0, 0, 0
    for payload in payloads(records, target, interpretations, max_features, max_bytes):
        for fault in payload_faults(payload, Line("payload", count + 1, payload)):
            raise RecordError(
                f"The server would refuse a payload: {fault}. Nothing was sent; mend the records first."
            )
        _known_studies(payload, records)
        all_features += len(payload["features"])
        fresh = [f for f in payload["features"] if not book.holds(f)]
        count += bool(fresh)
        features += len(fresh)
        size += len(line(payload | {"features": fresh}).encode()) if fresh else 0
    done = Plan(
        url=url,
        model_id=target.model_id,
        source=target.source(records.meta.layer),
        payloads=count,
        features=features,
        left_out=len(records) - all_features,
        size=size,
        already_sent=len(book.features),
        sent=confirm,
    )
    if not confirm:
        return done
    key = key or os.environ.get(KEY)
    if not key:
        raise ConfigError(f"Uploading needs a key; set the environment variable {KEY}.")
    server = _Server(url, key, timeout)
    book.start()
    if new_model:
        body = {
            "id": target.model_id,
            "layers": target.layers,
            "displayName": target.model_id,
            "url": target.url,
        }
        _make(
            server, book, "model", f"model {target.model_id}", f"model/{target.model_id}", "model/new", body
        )
    body = {
        "name": target.set_name,
        "modelId": target.model_id,
        "description": target.description,
        "url": target.url,
    }
    what, where = f"source set {target.set_name}", f"source-set/{target.model_id}/{target.set_name}"
    _make(server, book, "source-set", what, where, "source-set/new", body)
    for payload in payloads(
        records, target, interpretations, max_features, max_bytes, skip=set(book.features)
    ):
        numbers = [feature["index"] for feature in payload["features"]]
        server.post("feature/upload-batch", payload, f"latents {numbers[0]} to {numbers[-1]}")
        book.sent(payload["features"])
    return done


class Journal:
    """What an upload has done, a JSON line each, flushed to disk before the next request.

    The first line says where to; another destination needs another journal.

    Raises:
        RecordError: the file belongs to another upload, or is damaged.
    """

    def __init__(self, path: Path, upload: dict[str, str]) -> None:
        self.path, self.upload = path, upload
        self.features: dict[int, str] = {}
        self.steps: dict[str, str] = {}
        if not path.exists():
            return
        whole = path.read_text(encoding="utf-8")
        lines = whole[: whole.rfind("\n") + 1].splitlines()  # a line that was cut off was never acted on
        for number, text in enumerate(lines, 1):
            try:
                entry = json.loads(text)
                if number == 1 and entry["upload"] != upload:
                    raise RecordError(
                        f"{path} is the journal of an upload to {entry['upload']}, this one goes to {upload}. Give "
                        "another journal."
                    )
                self.features |= {int(index): digest for index, digest in entry.get("features", {}).items()}
                self.steps |= entry.get("steps", {})
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
                raise RecordError(
                    f"{path}, line {number} is damaged ({error}); what was sent is not known. Restore the file, or "
                    "upload under another source set."
                ) from None
        if whole and not whole.endswith("\n"):
            self._cut = len(whole[: whole.rfind("\n") + 1].encode())

    def start(self) -> None:
        """Make the file, or cut off a half-written last line."""
        if hasattr(self, "_cut"):
            os.truncate(self.path, self._cut)
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"upload": self.upload})

    def holds(self, feature: dict[str, Any]) -> bool:
        """Whether a feature was sent before.

        Raises:
            RecordError: another version of it was.
        """
        before = self.features.get(feature["index"])
        if before is not None and before != _digest(feature):
            raise RecordError(
                f"Latent {feature['index']} was sent before and has changed since; the site keeps the first version. "
                "Upload under another source set with another journal."
            )
        return before is not None

    def sent(self, features: list[dict[str, Any]]) -> None:
        """Note features that the server has taken."""
        digests = {str(feature["index"]): _digest(feature) for feature in features}
        self._write({"features": digests})
        self.features |= {int(index): digest for index, digest in digests.items()}

    def step(self, name: str, state: str) -> None:
        """Note that a step was "asked" or is "done"."""
        self._write({"steps": {name: state}})
        self.steps[name] = state

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _make(
    server: _Server, book: Journal, step: str, what: str, where: str, new: str, body: dict[str, Any]
) -> None:
    """Make a model or source set once; one that somebody else made is refused, one whose answer was lost is ours."""
    if book.steps.get(step) == "done":
        return
    if server.exists(where, what):
        if book.steps.get(step) != "asked":
            raise ServerError(
                f"The {what} exists already on {server.url} and this journal did not make it; uploading would mix "
                "two sets, and nothing there can be replaced. Choose another name, or give the journal that made it."
            )
    else:
        book.step(step, "asked")
        server.post(new, body, f"the {what}")
    book.step(step, "done")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


class _Server:
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


def _address(url: str) -> str:
    parts = urlsplit(url)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not (parts.scheme == "https" or (parts.scheme == "http" and local)) or "@" in parts.netloc:
        raise ConfigError(
            f"{url} is not an address to send a key to; expected https, or http on this machine. Mend the address."
        )
    return url.rstrip("/")


def _known_studies(payload: dict[str, Any], records: RecordSet) -> None:
    """Every study shown must be one whose licence was checked."""
    names = {f"⟦study {study}⟧" for study in records.studies}
    for feature in payload["features"]:
        for activation in feature["activations"]:
            if activation["tokens"][0] not in names:
                raise PrivacyError(
                    f"Latent {feature['index']} shows {activation['tokens'][0]}, which the table of studies does not "
                    "list; its licence is not known, so nothing was sent. Write the records again."
                )


def _digest(feature: dict[str, Any]) -> str:
    return hashlib.sha256(line(feature).encode()).hexdigest()[:16]

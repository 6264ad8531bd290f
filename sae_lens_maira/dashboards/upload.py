"""Guarded upload to Neuronpedia's self-serve API: nothing leaves unless asked, and nothing credentialed ever.

    plan      every record is read and every payload checked; a study that is not public or synthetic ends it here
    send      only with confirm=True: model, source set, then payloads; each answer goes into a journal on disk
    resume    the same call again skips what the journal holds; an answer that was lost is asked for again

The site keeps the first version of a feature for ever, so a latent that changed since it was sent is refused.
Redirects are not followed, since they could carry the key elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.api import MAX_BYTES, MAX_FEATURES, payloads
from sae_lens_maira.dashboards.faults import Line
from sae_lens_maira.dashboards.journal import Journal
from sae_lens_maira.dashboards.saedashboard import line
from sae_lens_maira.dashboards.site import KEY, Site, safe_address
from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.dashboards.validate import payload_faults
from sae_lens_maira.errors import ConfigError, PrivacyError, RecordError, ServerError
from sae_lens_maira.interp.records import Interpretation
from sae_lens_maira.latents.recordset import RecordSet

SITE = "https://www.neuronpedia.org/api"
LOCALHOST = "http://localhost:3000/api"
SHAREABLE = ("public", "synthetic")


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
    url = safe_address(base_url or (LOCALHOST if localhost else SITE))
    book = Journal(
        Path(journal), {"url": url, "model": target.model_id, "source": target.source(records.meta.layer)}
    )
    count, features, size, all_features = 0, 0, 0, 0
    for payload in payloads(records, target, interpretations, max_features, max_bytes):
        for fault in payload_faults(payload, Line("payload", count + 1, payload)):
            if fault.severity == "error":
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
    server = Site(url, key, timeout)
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


def _make(
    server: Site, book: Journal, step: str, what: str, where: str, new: str, body: dict[str, Any]
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

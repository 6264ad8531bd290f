"""Guarded upload to Neuronpedia's self-serve API, `POST /api/feature/upload-batch`.

    plan      read every record and check every payload; refuse if a study is not public or synthetic
    send      only with confirm=True: model, source set, then payloads; each answer is recorded in a journal on disk
    resume    the same call again skips what the journal contains; a step whose answer was lost is looked up again

A payload has at most 128 features, 1,024 tokens per sequence, 20 logits and 512 characters per explanation. The server
requires an activation per feature, so that dead latents are left out. The bounds of the top group are null. The server
never replaces a feature, so that a latent that changed since it was sent is refused.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.schema import MAX_EXPLANATION, MAX_FEATURES, MAX_LOGITS, Line
from sae_lens_maira.dashboards.sequences import Sequence, Window, clean, finite, sequences
from sae_lens_maira.dashboards.server import KEY, Journal, Site, safe_address
from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.dashboards.validate import payload_issues
from sae_lens_maira.dashboards.writing import (
    Interpretations,
    json_line,
    licence_of,
    new_folder,
    shorten,
    usable,
)
from sae_lens_maira.errors import ConfigError, PrivacyError, RecordError, ServerError
from sae_lens_maira.interp.records import Interpretation, explanation_type
from sae_lens_maira.latents.records import LatentRecord, TokenWeight
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.privacy import MARKER, SHAREABLE, check_shareable, is_marked, private_files

USUAL_FEATURES = 12
"""Features per request if not given: the server stores a request in one transaction of 5 s, which 128 can exceed."""
MAX_BYTES = 4_000_000
"""Size limit of a request body in bytes; hosting services commonly refuse larger ones."""


def api_feature(
    record: LatentRecord,
    interpretations: Iterable[Interpretation] = (),
    window: Window | None = None,
    listed: Container[str] | None = None,
) -> dict[str, Any] | None:
    """Build one entry of `features`; None for a latent without an activation, which the server would refuse.

    Raises:
        RecordError: A number is not finite.
    """
    activations = [_activation(sequence) for sequence in sequences(record, window, listed)]
    if record.status == "dead" or not any(max(activation["values"]) > 0 for activation in activations):
        return None
    return {
        "index": record.latent,
        "density": finite(record.density, record.latent, digits=17),
        "activations": activations,
        "explanations": [_explanation(one) for one in usable(interpretations)],
        "topLogits": _logits(record.top_tokens, record.latent),
        "bottomLogits": _logits(record.bottom_tokens, record.latent),
    }


def payloads(
    records: RecordSet,
    target: Target,
    interpretations: Interpretations | None = None,
    max_features: int = MAX_FEATURES,
    max_bytes: int = MAX_BYTES,
    window: Window | None = None,
    skip: Collection[int] = (),
) -> Iterator[dict[str, Any]]:
    """Yield payloads in the order of latents.

    Args:
        records: The record set.
        target: Names on Neuronpedia.
        interpretations: Interpretations per latent.
        max_features: Features per payload, at most 128.
        max_bytes: JSON bytes per payload; a single larger feature is sent alone.
        window: How much of each study is shown.
        skip: Latents to leave out, such as those sent before.

    Yields:
        Payloads with at least one feature.

    Raises:
        RecordError: A number is not finite.
        ConfigError: The limits are not within the server's.
    """
    if not 1 <= max_features <= MAX_FEATURES or max_bytes < 1:
        raise ConfigError(
            f"max_features is {max_features} and max_bytes is {max_bytes}; the server accepts 1 to {MAX_FEATURES} "
            "features per request and max_bytes must be positive. Change the one out of range."
        )
    head = {"modelId": target.model_id, "source": target.source(records.meta.layer)}
    features: list[dict[str, Any]] = []
    size = 0
    for record in records.stream():
        if record.latent in skip:
            continue
        feature = api_feature(record, (interpretations or {}).get(record.latent, ()), window, records.studies)
        if feature is None:
            continue
        length = len(json_line(feature).encode()) + 1
        if features and (len(features) == max_features or size + length > max_bytes):
            yield head | {"features": features}
            features, size = [], 0
        features.append(feature)
        size += length
    if features:
        yield head | {"features": features}


def write_payloads(
    records: RecordSet,
    target: Target,
    out: Path | str,
    interpretations: Interpretations | None = None,
    allow_credentialed: bool = False,
) -> Path:
    """Write the payloads to `payloads.jsonl` in a new folder, one per line, for inspection before an upload.

    With credentialed data (`allow_credentialed`) the file is `payloads.credentialed.jsonl` in a marked folder.

    Raises:
        PrivacyError: A study is not known to be public or synthetic, and `allow_credentialed` is not set.
        RecordError: The folder contains files, there is nothing to send, or a number is not finite.
    """
    licence = licence_of(records, "writing Neuronpedia files", allow_credentialed)
    with new_folder(out, licence) as folder:
        path = folder / ("payloads.jsonl" if licence in SHAREABLE else f"payloads.{licence}.jsonl")
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(
                json_line(payload) + "\n" for payload in payloads(records, target, interpretations)
            )
        if not path.stat().st_size:
            raise RecordError("No latent of these records ever fires, so there is nothing to upload.")
    return Path(out)


def _activation(sequence: Sequence) -> dict[str, Any]:
    top = sequence.group == "top"
    return {
        "tokens": sequence.tokens,
        "values": sequence.values,
        "quantileMin": None if top else sequence.low,
        "quantileMax": None if top else sequence.high,
        "quantileFraction": None if top else min(1.0, max(0.0, sequence.fraction)),
    }


def _explanation(one: Interpretation) -> dict[str, Any]:
    """Text and method. The server has no field for the explainer's name and fails on one."""
    row: dict[str, Any] = {"text": shorten(clean(one.explanation or ""), MAX_EXPLANATION)}
    method = explanation_type(one.method)
    return row | ({"methodName": method} if method else {})


def _logits(weights: tuple[TokenWeight, ...], latent: int) -> list[dict[str, Any]]:
    return [{"token": clean(w.token), "value": finite(w.weight, latent)} for w in weights[:MAX_LOGITS]]


SITE = "https://www.neuronpedia.org/api"
LOCALHOST = "http://localhost:3000/api"


@dataclass(frozen=True)
class Plan:
    """Summary of an upload: what would be sent, or was sent."""

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
    """Refuse records of studies that must not leave this machine.

    Raises:
        PrivacyError: A study is not known to be public or synthetic, no study is listed, or the folder is marked.
        RecordError: studies.jsonl is missing.
    """
    licences = [entry.licence for entry in records.studies.values()]
    check_shareable(licences, "uploading dashboards, which contain words of reports,", option=None)
    if is_marked(records.folder):
        raise PrivacyError(
            f"{records.folder} is marked as containing credentialed data ({MARKER}), so nothing was sent. Write the "
            "records of public or synthetic studies into another folder."
        )


def upload(
    records: RecordSet,
    target: Target,
    journal: Path | str,
    interpretations: Interpretations | None = None,
    *,
    confirm: bool = False,
    localhost: bool = False,
    new_model: bool = False,
    key: str | None = None,
    base_url: str | None = None,
    max_features: int = USUAL_FEATURES,
    max_bytes: int = MAX_BYTES,
    timeout: float = 120.0,
) -> Plan:
    """Check everything, and with `confirm` send it.

    Args:
        records: The record set; every study must be public or synthetic.
        target: Names on Neuronpedia.
        journal: JSON lines file that records what was sent; the same file resumes an upload.
        interpretations: Interpretations per latent.
        confirm: Send. Without it no connection is made and no file is written.
        localhost: Use a Neuronpedia server on this machine.
        new_model: Create the model too; needed once per model.
        key: API key; read from NEURONPEDIA_API_KEY if not given.
        base_url: Another server; https, or http on this machine.
        max_features: Latents per request, at most 128.
        max_bytes: Size limit of a request's body.
        timeout: Seconds that one request may take.

    Returns:
        What was or would be sent.

    Raises:
        PrivacyError: A study must not leave this machine; no connection was made.
        RecordError: A payload exceeds the server's limits, or a latent changed since it was sent.
        ServerError: The server refused or the connection broke; the message names the item.
        ConfigError: There is no key, or the address is not safe.
    """
    check_licences(records)
    url = safe_address(base_url or (LOCALHOST if localhost else SITE))
    history = Journal(
        Path(journal), {"url": url, "model": target.model_id, "source": target.source(records.meta.layer)}
    )
    count, features, size, all_features = 0, 0, 0, 0
    for payload in payloads(records, target, interpretations, max_features, max_bytes):
        for issue in payload_issues(payload, Line("payload", count + 1, payload)):
            if issue.severity == "error":
                raise RecordError(
                    f"The server would refuse a payload: {issue}. Nothing was sent; fix the records first."
                )
        all_features += len(payload["features"])
        fresh = [f for f in payload["features"] if not history.holds(f)]
        count += bool(fresh)
        features += len(fresh)
        size += len(json_line(payload | {"features": fresh}).encode()) if fresh else 0
    done = Plan(
        url=url,
        model_id=target.model_id,
        source=target.source(records.meta.layer),
        payloads=count,
        features=features,
        left_out=len(records) - all_features,
        size=size,
        already_sent=len(history.features),
        sent=confirm,
    )
    if not confirm:
        return done
    key = key or os.environ.get(KEY)
    if not key:
        raise ConfigError(f"Uploading needs a key; set the environment variable {KEY}.")
    server = Site(url, key, timeout)
    done_before = _check_names(server, history, target, new_model)
    with private_files(history.path):
        history.start()
    for step in done_before:
        history.step(step, "done")
    if new_model:
        body = {
            "id": target.model_id,
            "layers": target.layers,
            "displayName": target.model_id,
            "url": target.url,
        }
        _create(server, history, "model", "model/new", body, f"model {target.model_id}")
    body = {
        "name": target.set_name,
        "modelId": target.model_id,
        "description": target.description,
        "url": target.url,
    }
    _create(server, history, "source-set", "source-set/new", body, f"source set {target.set_name}")
    for payload in payloads(
        records, target, interpretations, max_features, max_bytes, skip=set(history.features)
    ):
        numbers = [feature["index"] for feature in payload["features"]]
        item = f"latents {numbers[0]} to {numbers[-1]}, {len(numbers)} in all"
        server.post("feature/upload-batch", payload, item)
        history.sent(payload["features"])
    return done


def _check_names(server: Site, journal: Journal, target: Target, new_model: bool) -> list[str]:
    """Look up model and source set before anything is created.

    Returns:
        Steps whose answer was lost (the journal marks them as "asked") and which the server has done.
    """
    done: list[str] = []
    for step, exists in (
        ("model", server.has_model(target.model_id)),
        ("source-set", server.has_source_set(target.model_id, target.set_name)),
    ):
        what = f"model {target.model_id}" if step == "model" else f"source set {target.set_name}"
        if step == "model" and not new_model:
            if not exists:
                raise ServerError(
                    f"{server.url} has no {what}, so nothing was created. Pass --new-model true to create it, or "
                    "--model-id with the name of an existing one."
                )
            continue
        state = journal.steps.get(step)
        if exists and state is None:
            raise ServerError(
                f"The {what} already exists on {server.url} and this journal did not create it; uploading would mix "
                "two sets, and nothing there can be replaced. Choose another name, or give the journal that created "
                "it" + (" (an existing model needs no --new-model)." if step == "model" else ".")
            )
        if exists and state == "asked":
            done.append(step)
    return done


def _create(server: Site, journal: Journal, step: str, path: str, body: dict[str, Any], what: str) -> None:
    """Create a model or source set once; the request is recorded before it is sent, and its success afterwards."""
    if journal.steps.get(step) == "done":
        return
    journal.step(step, "asked")
    server.post(path, body, f"the {what}")
    journal.step(step, "done")

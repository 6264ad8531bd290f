"""Build payloads of Neuronpedia's self-serve upload, `POST /api/feature/upload-batch`, within its limits.

A payload has at most 128 features, 1,024 tokens per sequence, 20 logits and 512 characters per explanation. The server
requires an activation per feature, so dead latents are left out. The bounds of the top group are null.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.explanations import Interpretations, shorten, usable
from sae_lens_maira.dashboards.sequences import Sequence, Window, clean, finite, sequences
from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.dashboards.writing import json_line, licence_of, new_folder
from sae_lens_maira.errors import ConfigError, RecordError
from sae_lens_maira.interp.records import Interpretation, explanation_type
from sae_lens_maira.latents.records import LatentRecord, TokenWeight
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.privacy import SHAREABLE

MAX_FEATURES = 128
USUAL_FEATURES = 12
"""Features per request if not given: the server stores a request in one transaction of 5 s, which 128 can exceed."""
MAX_LOGITS = 20
MAX_EXPLANATION = 512
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
        RecordError: a number is not finite.
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
        RecordError: a number is not finite.
        ConfigError: the limits are not within the server's.
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
        PrivacyError: a study is not known to be public or synthetic, and `allow_credentialed` is not set.
        RecordError: the folder contains files, there is nothing to send, or a number is not finite.
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

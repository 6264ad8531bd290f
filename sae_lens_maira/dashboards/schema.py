"""What a field of a dashboard file may hold: our own schema of the three formats, as tables of field and kind.

    "int" "number" "text" "bool" "name"      a trailing "?" also takes null, "[]" is a list of them

"name" is text with at least one character. `misfits` checks one object; it knows nothing about files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

_TABLES = dict.fromkeys(
    ("neuron_alignment_indices", "correlated_neurons_indices", "correlated_features_indices"), "int[]"
) | dict.fromkeys(
    (
        "neuron_alignment_values",
        "neuron_alignment_l1",
        "correlated_neurons_l1",
        "correlated_neurons_pearson",
        "correlated_features_l1",
        "correlated_features_pearson",
        "neg_values",
        "pos_values",
        "freq_hist_data_bar_values",
        "freq_hist_data_bar_heights",
        "logits_hist_data_bar_heights",
        "logits_hist_data_bar_values",
        "decoder_weights_dist",
        "vector",
    ),
    "number[]",
)
_STATISTICS = _TABLES | {"neg_str": "name[]", "pos_str": "name[]", "frac_nonzero": "number"}

BATCH = {"model_id": "text", "layer": "int", "sae_set": "name", "sae_id_suffix": "text?", "features": "any"}
BATCH_FEATURE = _STATISTICS | {
    "feature_index": "int",
    "n_prompts_total": "int",
    "n_tokens_in_prompt": "int",
    "dataset": "text",
    "activations": "any",
}
BATCH_ACTIVATION = {
    "bin_min": "number",
    "bin_max": "number",
    "bin_contains": "number",
    "tokens": "name[]",
    "values": "number[]",
    "qualifying_token_index": "int",
    "dfa_values": "number[]",
    "dfa_maxValue": "number",
    "dfa_targetIndex": "int",
}

HEADS = {
    "release": {"name": "name", "description": "text", "creatorId": "name", "urls": "text[]"},
    "model": {"id": "name", "layers": "int", "creatorId": "name", "inferenceEnabled": "bool"},
    "sourceset": {"modelId": "name", "name": "name", "creatorId": "name", "releaseName": "name"},
    "source": {"id": "name", "modelId": "name", "setName": "name", "creatorId": "name"},
}
EXPORT_ROWS = {
    "features": _STATISTICS
    | {
        "modelId": "name",
        "layer": "name",
        "index": "int",
        "creatorId": "name",
        "createdAt": "name",
        "maxActApprox": "number",
        "hasVector": "bool",
    },
    "activations": {
        "id": "name",
        "modelId": "name",
        "layer": "name",
        "index": "int",
        "creatorId": "name",
        "createdAt": "name",
        "tokens": "name[]",
        "values": "number[]",
        "maxValue": "number",
        "maxValueTokenIndex": "int",
        "minValue": "number",
        "binMin": "number",
        "binMax": "number",
        "binContains": "number",
        "qualifyingTokenIndex": "int",
    },
    "explanations": {
        "id": "name",
        "modelId": "name",
        "layer": "name",
        "index": "name",
        "description": "name",
        "authorId": "name",
        "typeName": "name?",
        "explanationModelName": "name?",
        "notes": "text?",
        "createdAt": "name",
    },
}

PAYLOAD = {"modelId": "name", "source": "name", "features": "any"}
PAYLOAD_FEATURE = {
    "index": "int",
    "density": "number",
    "activations": "any",
    "explanations": "any",
    "topLogits": "any",
    "bottomLogits": "any",
}
PAYLOAD_ACTIVATION = {
    "tokens": "name[]",
    "values": "number[]",
    "quantileMin": "number?",
    "quantileMax": "number?",
    "quantileFraction": "number?",
}
PAYLOAD_LOGIT = {"token": "name", "value": "number"}
PAYLOAD_EXPLANATION = {"text": "name"}


def misfits(row: Any, schema: dict[str, str], what: str, exact: bool = False) -> Iterator[str]:
    """Sentences on what is wrong with an object.

    Args:
        row: parsed JSON.
        schema: kind per field.
        what: how to call the object.
        exact: fields that the schema does not name are wrong too.
    """
    if not isinstance(row, dict):
        yield f"{what} is no object"
        return
    for name, kind in schema.items():
        if name not in row:
            yield f"{what} has no {name}"
        elif kind != "any" and not _fits(row[name], kind):
            yield f"{what} has {name} = {_short(row[name])}, expected {kind}"
    if exact and set(row) - set(schema):
        yield f"{what} has unknown fields {sorted(set(row) - set(schema))}"


def objects(row: dict[str, Any], name: str, what: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a list field, and sentences where it is none or holds something else."""
    found = row.get(name)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return [], [f"{what} has no list of objects {name}"]
    return found, []


def _fits(value: Any, kind: str) -> bool:
    if kind.endswith("?"):
        return value is None or _fits(value, kind[:-1])
    if kind.endswith("[]"):
        return isinstance(value, list) and all(_fits(one, kind[:-2]) for one in value)
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("text", "name"):
        return isinstance(value, str) and (kind == "text" or bool(value)) and "\0" not in value
    if isinstance(value, bool):
        return False
    return (
        isinstance(value, int) if kind == "int" else isinstance(value, (int, float)) and math.isfinite(value)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

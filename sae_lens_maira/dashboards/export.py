"""Write latent records as Neuronpedia's bulk export, which its importer reads into its database.

    release.jsonl  model.jsonl  sourceset.jsonl  source.jsonl             one row each
    features/  activations/  explanations/  batch-N.jsonl.gz              rows of the tables of those names

Activation ids are hashes of model, source, latent, study and interval, so that ids are unique over shards and a second
import changes nothing. Gzip headers contain no time stamp. Dead latents have a row and no activations. Rows are written
while records are read, so that memory does not grow with the number of latents.
"""

from __future__ import annotations

import gzip
import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.saedashboard import statistics
from sae_lens_maira.dashboards.sequences import Sequence, Window, finite, sequences
from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.dashboards.writing import (
    Interpretations,
    batches_of,
    json_line,
    licence_of,
    new_folder,
    note,
    parallel_map,
    usable,
)
from sae_lens_maira.interp.records import Interpretation, explanation_type
from sae_lens_maira.latents.records import LatentRecord, RecordsMeta
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.privacy import SHAREABLE

TABLES = ("features", "activations", "explanations")


def write_export(
    records: RecordSet,
    target: Target,
    out: Path | str,
    interpretations: Interpretations | None = None,
    batch_size: int = 1024,
    window: Window | None = None,
    workers: int | None = None,
    allow_credentialed: bool = False,
) -> Path:
    """Write the bulk export of one source.

    Args:
        records: The record set.
        target: Names on Neuronpedia.
        out: Output folder; one that an earlier run wrote is replaced.
        interpretations: Interpretations per latent; only usable ones are written.
        batch_size: Latents per shard.
        window: How much of each study is shown.
        workers: Number of processes that write shards; one per core if not given.
        allow_credentialed: Write data of credentialed studies too, in a marked folder.

    Returns:
        The folder.

    Raises:
        PrivacyError: A study is not known to be public or synthetic, and `allow_credentialed` is not set.
        RecordError: The folder contains files, or a record contains a number that is not finite.
        ConfigError: The target's model has no such layer.
    """
    meta, explained = records.meta, interpretations or {}
    licence = licence_of(records, "writing Neuronpedia files", allow_credentialed)
    target = target.marked(licence)
    source, batches = target.source(meta.layer), batches_of(records, batch_size)
    with new_folder(out, licence) as folder:
        for name, row in heads(meta, target, licence).items():
            (folder / f"{name}.jsonl").write_text(json_line(row) + "\n", encoding="utf-8")
        for table in TABLES[: 3 if explained else 2]:
            (folder / table).mkdir()

        def write(batch: tuple[int, list[int]]) -> None:
            number, latents = batch
            with ExitStack() as stack:
                files = {
                    path.name: stack.enter_context(_open(path / f"batch-{number}.jsonl.gz", stack, licence))
                    for path in sorted(p for p in folder.iterdir() if p.is_dir())
                }
                for latent in latents:
                    record = records[latent]
                    _put(files["features"], feature_row(record, meta, target))
                    if record.status != "dead":
                        for sequence in sequences(record, window, records.studies):
                            _put(files["activations"], activation_row(sequence, latent, source, target))
                    for interpretation in usable(explained.get(latent, ())):
                        _put(files["explanations"], explanation_row(interpretation, source, target))

        for _ in parallel_map(write, batches, workers):
            pass
    return Path(out)


def feature_row(record: LatentRecord, meta: RecordsMeta, target: Target) -> dict[str, Any]:
    """Build a row of Neuronpedia's table Neuron."""
    largest = finite(record.max, record.latent)
    return {
        "modelId": target.model_id,
        "layer": target.source(meta.layer),
        "index": str(record.latent),
        "creatorId": target.creator_id,
        "createdAt": target.created_at,
        "maxActApprox": largest,
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": largest,
        "hookName": meta.hook_name,
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
        **statistics(record),
        "decoder_weights_dist": [],
        "sourceSetName": None,
    }


def activation_row(sequence: Sequence, latent: int, source: str, target: Target) -> dict[str, Any]:
    """Build a row of Neuronpedia's table Activation."""
    largest = max(sequence.values)
    named = f"{target.model_id}|{source}|{latent}|{sequence.study}|{sequence.low!r}|{sequence.high!r}"
    return {
        "id": hashlib.sha256(named.encode()).hexdigest()[:25],
        "tokens": sequence.tokens,
        "index": str(latent),
        "layer": source,
        "modelId": target.model_id,
        "maxValue": largest,
        "maxValueTokenIndex": sequence.values.index(largest),
        "minValue": min(sequence.values),
        "values": sequence.values,
        "creatorId": target.creator_id,
        "dataSource": None,
        "dataIndex": None,
        "dfaValues": [],
        "dfaTargetIndex": -1,
        "dfaMaxValue": 0,
        "createdAt": target.created_at,
        "lossValues": [],
        "logitContributions": None,
        "binMin": sequence.low,
        "binMax": sequence.high,
        "binContains": sequence.fraction,
        "qualifyingTokenIndex": sequence.hit,
        "zIndices": None,
        "zValues": None,
    }


def explanation_row(interpretation: Interpretation, source: str, target: Target) -> dict[str, Any]:
    """Build a row of Neuronpedia's table Explanation.

    Scores and the explainer's name are in the notes: the import has no field for scores, and the explainer's column
    accepts only models that the site has.
    """
    text = interpretation.explanation or ""
    named = f"{target.model_id}|{source}|{interpretation.latent}|{interpretation.explainer}|{text}"
    return {
        "id": hashlib.sha256(named.encode()).hexdigest()[:25],
        "modelId": target.model_id,
        "layer": source,
        "index": str(interpretation.latent),
        "description": text,
        "authorId": target.creator_id,
        "triggeredByUserId": target.creator_id,
        "typeName": explanation_type(interpretation.method),
        "explanationModelName": None,
        "notes": note(interpretation),
        "createdAt": target.created_at,
    }


def heads(meta: RecordsMeta, target: Target, licence: str) -> dict[str, dict[str, Any]]:
    """Build the rows of release, model, source set and source, by file name."""
    urls = [target.url] if target.url else []
    common: dict[str, Any] = {
        "creatorId": target.creator_id,
        "visibility": "PUBLIC" if licence in SHAREABLE else "PRIVATE",
        "createdAt": target.created_at,
    }
    release = {
        "name": target.release_name,
        "description": target.description,
        "creatorName": target.creator,
        "isNewUi": False,
        "featured": False,
        "descriptionShort": target.description,
        "urls": urls,
        "creatorEmail": None,
        "creatorNameShort": target.creator,
        "defaultSourceSetName": None,
        "defaultSourceId": None,
        "defaultUmapSourceIds": [],
    }
    model = {
        "id": target.model_id,
        "instruct": False,
        "displayNameShort": target.model_id,
        "displayName": target.model_id,
        "tlensId": None,
        "dimension": meta.d_in,
        "defaultSourceSetName": None,
        "defaultSourceId": None,
        "inferenceEnabled": False,
        "layers": target.layers,
        "neuronsPerLayer": 0,
        "owner": "",
        "updatedAt": target.created_at,
        "website": None,
    }
    sourceset = {
        "modelId": target.model_id,
        "name": target.set_name,
        "hasDashboards": True,
        "description": target.description,
        "type": _set_type(meta.hook_name),
        "creatorName": target.creator,
        "urls": urls,
        "creatorEmail": None,
        "releaseName": target.release_name,
        "defaultOfModelId": None,
        "defaultRange": 1,
        "defaultShowBreaks": True,
        "showDfa": False,
        "showCorrelated": False,
        "showHeadAttribution": False,
        "showUmap": False,
    }
    source = {
        "id": target.source(meta.layer),
        "modelId": target.model_id,
        "setName": target.set_name,
        "hasDashboards": True,
        "inferenceEnabled": False,
        "inferenceHosts": [],
        "saelensConfig": None,
        "saelensRelease": None,
        "saelensSaeId": None,
        "hfRepoId": None,
        "hfFolderId": None,
        "defaultOfModelId": None,
        "hasUmap": False,
        "hasUmapLogSparsity": False,
        "hasUmapClusters": False,
        "num_prompts": meta.studies,
        "num_tokens_in_prompt": (meta.rows_text + meta.rows_image) // max(1, meta.studies),
        "dataset": target.dataset,
        "notes": f"{meta.control} SAE, {meta.d_sae} latents, at {meta.hook_name}",
    }
    return {
        "release": release | common,
        "model": model | common,
        "sourceset": sourceset | common,
        "source": source | common,
    }


def _set_type(hook_name: str) -> str:
    """Type of activations, which Neuronpedia shows as a breadcrumb."""
    if "mlp" in hook_name:
        return "MLP"
    return "Attention" if "attn" in hook_name else "Residual Stream"


def _open(path: Path, stack: ExitStack, licence: str) -> gzip.GzipFile:
    """Open a gzip file without a time stamp in its header; the header's name marks credentialed data."""
    raw = stack.enter_context(path.open("wb"))
    name = "" if licence in SHAREABLE else f"{licence}.jsonl"
    return gzip.GzipFile(filename=name, mode="wb", compresslevel=4, fileobj=raw, mtime=0)


def _put(file: gzip.GzipFile, row: dict[str, Any]) -> None:
    file.write(json_line(row).encode() + b"\n")

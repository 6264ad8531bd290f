"""Neuronpedia's bulk export folder from latent records: what its importer reads into its database.

    release.jsonl  model.jsonl  sourceset.jsonl  source.jsonl             one row each
    features/  activations/  explanations/  batch-N.jsonl.gz              rows of the tables of those names

Activation ids are a hash of what they name, so that shards never share one and a second import changes nothing;
gzip headers carry no time. Dead latents have a row and no activations. Rows are written as they come, shards
side by side: memory does not grow with latents.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.explanations import note, shown
from sae_lens_maira.dashboards.saedashboard import batches_of, line, new_folder, statistics
from sae_lens_maira.dashboards.sequences import Sequence, Window, finite, sequences
from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.dashboards.workers import each
from sae_lens_maira.interp.records import Interpretation
from sae_lens_maira.latents.records import LatentRecord, RecordsMeta
from sae_lens_maira.latents.recordset import RecordSet

TABLES = ("features", "activations", "explanations")


def write_export(
    records: RecordSet,
    target: Target,
    out: Path | str,
    interpretations: Mapping[int, Iterable[Interpretation]] | None = None,
    batch_size: int = 1024,
    window: Window | None = None,
    workers: int | None = None,
) -> Path:
    """Write the folder `{out}` of one source.

    Args:
        records: latent records.
        target: names.
        out: folder to make; it must not exist or be empty.
        interpretations: per latent; only usable ones are written.
        batch_size: latents per shard.
        window: how much of a study is shown.
        workers: processes that write shards; one a core if not given.

    Returns:
        The folder.

    Raises:
        RecordError: the folder has files, or a record holds a number that is not finite.
        ConfigError: the target's model has no such layer.
    """
    meta, told = records.meta, interpretations or {}
    source, batches = target.source(meta.layer), batches_of(records, batch_size)
    with new_folder(out) as folder:
        for name, row in heads(meta, target).items():
            (folder / f"{name}.jsonl").write_text(line(row) + "\n", encoding="utf-8")
        for table in TABLES[: 3 if told else 2]:
            (folder / table).mkdir()

        def write(batch: tuple[int, list[int]]) -> None:
            number, latents = batch
            with ExitStack() as stack:
                files = {
                    path.name: stack.enter_context(_open(path / f"batch-{number}.jsonl.gz", stack))
                    for path in sorted(p for p in folder.iterdir() if p.is_dir())
                }
                for latent in latents:
                    record = records[latent]
                    _put(files["features"], feature_row(record, meta, target))
                    if record.status != "dead":
                        for sequence in sequences(record, window):
                            _put(files["activations"], activation_row(sequence, latent, source, target))
                    for interpretation in shown(told.get(latent, ())):
                        _put(files["explanations"], explanation_row(interpretation, source, target))

        for _ in each(write, batches, workers):
            pass
    return Path(out)


def feature_row(record: LatentRecord, meta: RecordsMeta, target: Target) -> dict[str, Any]:
    """A row of Neuronpedia's table Neuron."""
    largest = finite(record.max, record.latent)
    return {
        "modelId": target.model_id,
        "layer": target.source(meta.layer),
        "index": record.latent,
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
    """A row of Neuronpedia's table Activation; its id is a hash of model, source, latent, study and interval."""
    largest = max(sequence.values)
    named = f"{target.model_id}|{source}|{latent}|{sequence.study}|{sequence.low!r}|{sequence.high!r}"
    return {
        "id": hashlib.sha256(named.encode()).hexdigest()[:25],
        "tokens": sequence.tokens,
        "index": latent,
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
    """A row of Neuronpedia's table Explanation, scores in its note: the import takes no scores of their own.

    The explainer's name stands in the note too, since the column for it takes only models that the site knows.
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
        "triggeredById": target.creator_id,
        "typeName": interpretation.method or None,
        "explanationModelName": None,
        "notes": note(interpretation),
        "createdAt": target.created_at,
    }


def heads(meta: RecordsMeta, target: Target) -> dict[str, dict[str, Any]]:
    """The rows of release, model, source set and source, by file name."""
    urls = [target.url] if target.url else []
    mine: dict[str, Any] = {
        "creatorId": target.creator_id,
        "visibility": "PUBLIC",
        "createdAt": target.created_at,
    }
    release = {
        "name": target.set_name,
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
        "type": "",
        "creatorName": target.creator,
        "urls": urls,
        "creatorEmail": None,
        "releaseName": target.set_name,
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
        "release": release | mine,
        "model": model | mine,
        "sourceset": sourceset | mine,
        "source": source | mine,
    }


def _open(path: Path, stack: ExitStack) -> gzip.GzipFile:
    """A gzip file whose bytes depend on its content alone: no time and no name in its header."""
    raw = stack.enter_context(path.open("wb"))
    return gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=raw, mtime=0)


def _put(file: gzip.GzipFile, row: dict[str, Any]) -> None:
    file.write(line(row).encode() + b"\n")

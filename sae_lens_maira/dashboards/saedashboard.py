"""Write latent records in the format of sae-dashboard: `batch-N.json`, `run_settings.json`, `skipped_indexes.json`.

Keys and meanings are those of sae-dashboard 0.8, and every key is always present. Numbers are finite and rounded to 5
digits; the density is not rounded. Quantities that records do not contain (alignment with neurons, correlations, logit
histograms, vectors) are empty lists. Features are written one per line while they are read, so memory does not grow
with the number of latents.
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.sequences import Sequence, Window, bars, clean, finite, sequences
from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.dashboards.writing import batches_of, json_line, licence_of, new_folder, parallel_map
from sae_lens_maira.latents.records import LatentRecord, RecordsMeta, TokenWeight
from sae_lens_maira.latents.recordset import RecordSet

EMPTY_TABLES = tuple(
    f"{table}_{column}"
    for table, columns in (
        ("neuron_alignment", ("indices", "values", "l1")),
        ("correlated_neurons", ("indices", "l1", "pearson")),
        ("correlated_features", ("indices", "l1", "pearson")),
    )
    for column in columns
)
LOGITS = 10


def feature(
    record: LatentRecord,
    meta: RecordsMeta,
    dataset: str,
    window: Window | None = None,
    listed: Container[str] | None = None,
) -> dict[str, Any]:
    """Build one entry of `features` in a batch file.

    Raises:
        RecordError: A number is not finite.
    """
    return (
        {"feature_index": record.latent}
        | statistics(record)
        | {
            "n_prompts_total": meta.studies,
            "n_tokens_in_prompt": (meta.rows_text + meta.rows_image) // max(1, meta.studies),
            "dataset": dataset,
            "decoder_weights_dist": [],
            "activations": [_activation(sequence) for sequence in sequences(record, window, listed)],
            "vector": [],
        }
    )


def statistics(record: LatentRecord) -> dict[str, Any]:
    """Fields that batch files and the bulk export share: tables, logits, density, histograms."""
    values, heights = bars(record.histogram, record.max)
    return {
        **{name: [] for name in EMPTY_TABLES},
        **_logits(record.bottom_tokens, "neg", record.latent),
        **_logits(record.top_tokens, "pos", record.latent),
        "frac_nonzero": finite(record.density, record.latent, digits=17),
        "freq_hist_data_bar_values": values,
        "freq_hist_data_bar_heights": heights,
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
    }


def write_saedashboard(
    records: RecordSet,
    target: Target,
    out: Path | str,
    batch_size: int = 128,
    window: Window | None = None,
    workers: int | None = None,
    allow_credentialed: bool = False,
) -> Path:
    """Write a folder that can be read as the output of sae-dashboard's runner.

    Args:
        records: The record set.
        target: Names on Neuronpedia.
        out: Output folder; one that an earlier run wrote is replaced.
        batch_size: Latents per batch file.
        window: How much of each study is shown.
        workers: Number of processes that write batches; one per core if not given.
        allow_credentialed: Write data of credentialed studies too, in a marked folder.

    Returns:
        The folder.

    Raises:
        PrivacyError: A study is not known to be public or synthetic, and `allow_credentialed` is not set.
        RecordError: The folder contains files, or a record contains a number that is not finite.
        ConfigError: The target's model has no such layer.
    """
    shown = window or Window()
    meta = records.meta
    licence = licence_of(records, "writing Neuronpedia files", allow_credentialed)
    target = target.marked(licence)
    target.source(meta.layer)
    head = {
        "model_id": target.model_id,
        "layer": meta.layer,
        "sae_set": target.set_name,
        "sae_id_suffix": None,
    }
    batches = batches_of(records, batch_size)
    with new_folder(out, licence) as folder:

        def write(batch: tuple[int, list[int]]) -> None:
            number, latents = batch
            with (folder / f"batch-{number}.json").open("w", encoding="utf-8", newline="\n") as file:
                file.write(json_line(head)[:-1] + ',"features":[\n')
                for place, latent in enumerate(latents):
                    file.write(",\n" if place else "")
                    file.write(
                        json_line(feature(records[latent], meta, target.dataset, shown, records.studies))
                    )
                file.write("\n]}\n")

        for _ in parallel_map(write, batches, workers):
            pass
        settings = _settings(meta, target, batch_size, shown, len(records)) | {"licence": licence}
        (folder / "run_settings.json").write_text(json.dumps(settings, indent=4), encoding="utf-8")
        skipped = {
            "model_id": target.model_id,
            "layer": str(meta.layer),
            "sae_set": target.set_name,
            "log_sparsity": 1,
            "skipped_indexes": [],
        }
        (folder / "skipped_indexes.json").write_text(json.dumps(skipped), encoding="utf-8")
    return Path(out)


def _activation(sequence: Sequence) -> dict[str, Any]:
    return {
        "bin_min": sequence.low,
        "bin_max": sequence.high,
        "bin_contains": sequence.fraction,
        "tokens": sequence.tokens,
        "values": sequence.values,
        "qualifying_token_index": sequence.hit,
        "dfa_values": [],
        "dfa_maxValue": 0,
        "dfa_targetIndex": -1,
    }


def _logits(weights: tuple[TokenWeight, ...], name: str, latent: int) -> dict[str, Any]:
    kept = weights[:LOGITS]
    return {
        f"{name}_str": [clean(weight.token) for weight in kept],
        f"{name}_values": [finite(weight.weight, latent) for weight in kept],
    }


def _settings(
    meta: RecordsMeta, target: Target, batch_size: int, window: Window, latents: int
) -> dict[str, Any]:
    """The runner's settings that apply here, under its names."""
    return {
        "sae_set": target.set_name,
        "sae_path": meta.sae,
        "np_set_name": target.set_name,
        "np_sae_id_suffix": None,
        "huggingface_dataset_path": target.dataset,
        "n_prompts_total": meta.studies,
        "n_tokens_in_prompt": (meta.rows_text + meta.rows_image) // max(1, meta.studies),
        "n_features_at_a_time": batch_size,
        "model_id": target.model_id,
        "layer": meta.layer,
        "hook_name": meta.hook_name,
        "control": meta.control,
        "latents": latents,
        "text_window": window.text,
        "most_patches": window.patches,
        "versions": meta.versions,
    }

"""Commands of dashboards: write Neuronpedia's files from latent records, check a folder, upload what may leave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal


def neuronpedia(
    records: Path,
    out: Path,
    set_name: str,
    kind: Literal["export", "saedashboard", "api"] = "export",
    model_id: str = "maira-2",
    layers: int = 32,
    description: str = "Sparse autoencoder latents of a radiology vision-language model",
    url: str | None = None,
    dataset: str = "chest radiographs with reports",
    text_window: int = 128,
    patches: int = 64,
    sae: Path | None = None,
    as_json: bool = False,
) -> None:
    """Write latent records as Neuronpedia's files, and check them.

    Example: sae-lens-maira dashboards neuronpedia --records records --out export --set-name res-16k

    Args:
        records: folder of latent records.
        out: folder to make.
        set_name: source set, lower case with single hyphens.
        kind: "export" for the bulk import, "saedashboard" for its batch files, "api" to read upload payloads.
        model_id: model's name on Neuronpedia.
        layers: the model's decoder layers.
        description: of the source set.
        url: page that shows more, such as one with the images.
        dataset: what the studies are.
        text_window: text tokens shown around a hit; "export" and "saedashboard".
        patches: image patches shown at most; "export" and "saedashboard".
        sae: folder of the SAE; its metadata get the names, so that SAELens' Neuronpedia helpers find the latents.
        as_json: print JSON instead of text.
    """
    from sae_lens_maira.dashboards.api import write_payloads
    from sae_lens_maira.dashboards.explanations import read_interpretations
    from sae_lens_maira.dashboards.export import write_export
    from sae_lens_maira.dashboards.saedashboard import write_saedashboard
    from sae_lens_maira.dashboards.sequences import Window
    from sae_lens_maira.dashboards.target import Target, save_metadata
    from sae_lens_maira.dashboards.validate import validate
    from sae_lens_maira.latents.recordset import RecordSet

    target = Target(
        set_name=set_name, model_id=model_id, layers=layers, description=description, url=url, dataset=dataset
    )
    window, opened = Window(text_window, patches), RecordSet.open(records)
    told = read_interpretations(records)
    if kind == "export":
        folder = write_export(opened, target, out, told, window=window)
    elif kind == "saedashboard":
        folder = write_saedashboard(opened, target, out, window=window)
    else:
        folder = write_payloads(opened, target, out, told)
    if sae is not None:
        save_metadata(sae, target, opened.meta)
    faults = validate(folder)[1]
    name = target.neuronpedia_id(opened.meta.layer)
    if as_json:
        figures = {
            "folder": str(folder),
            "neuronpedia_id": name,
            "latents": len(opened),
            "faults": len(faults),
        }
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write(f"{folder}: {len(opened)} latents as {name}\n")
    if faults:
        sys.stdout.write(f"{len(faults)} faults, the first: {faults[0]}\n")


def check(folder: Path, most: int = 50, as_json: bool = False) -> None:
    """Check a folder of dashboards: types, limits, ids, references; every fault with its file and line.

    Example: sae-lens-maira dashboards validate --folder export

    Args:
        folder: a bulk export, sae-dashboard's batch files, or upload payloads.
        most: faults printed; all are counted.
        as_json: print JSON instead of text.
    """
    from dataclasses import asdict

    from sae_lens_maira.dashboards.validate import validate
    from sae_lens_maira.errors import RecordError

    kind, faults = validate(folder)
    errors = sum(fault.severity == "error" for fault in faults)
    if as_json:
        shown = [asdict(fault) for fault in faults[:most]]
        sys.stdout.write(json.dumps({"format": kind, "errors": errors, "faults": shown}) + "\n")
    else:
        sys.stdout.writelines(f"{fault}\n" for fault in faults[:most])
        sys.stdout.write(f"{folder}: {kind}, {errors} errors, {len(faults) - errors} advices\n")
    if errors:
        raise RecordError(
            f"{folder} has {errors} errors that an import would refuse or lose in silence; mend them first."
        )


def upload(
    records: Path,
    set_name: str,
    journal: Path | None = None,
    confirm: bool = False,
    localhost: bool = False,
    new_model: bool = False,
    model_id: str = "maira-2",
    layers: int = 32,
    url: str | None = None,
    max_features: int = 128,
    max_bytes: int = 4_000_000,
    as_json: bool = False,
) -> None:
    """Say what an upload to Neuronpedia would send; with `--confirm true`, send it. Public and synthetic studies only.

    Example: sae-lens-maira dashboards upload --records records --set-name res-16k

    Args:
        records: folder of latent records.
        set_name: source set to make, lower case with single hyphens.
        journal: file that remembers what was sent; `upload-<set_name>.jsonl` beside the records if not given.
        confirm: "true" sends; the key comes from NEURONPEDIA_API_KEY.
        localhost: use a Neuronpedia on this machine.
        new_model: make the model too; needed once per model.
        model_id: model's name on Neuronpedia.
        layers: the model's decoder layers.
        url: page that shows more.
        max_features: latents per request, at most 128.
        max_bytes: of a request.
        as_json: print JSON instead of text.
    """
    from dataclasses import asdict

    from sae_lens_maira.dashboards.explanations import read_interpretations
    from sae_lens_maira.dashboards.target import Target
    from sae_lens_maira.dashboards.upload import upload as run
    from sae_lens_maira.latents.recordset import RecordSet

    plan = run(
        RecordSet.open(records),
        Target(set_name=set_name, model_id=model_id, layers=layers, url=url),
        journal or records / f"upload-{set_name}.jsonl",
        read_interpretations(records),
        confirm=confirm,
        localhost=localhost,
        new_model=new_model,
        max_features=max_features,
        max_bytes=max_bytes,
    )
    sys.stdout.write((json.dumps(asdict(plan)) if as_json else str(plan)) + "\n")

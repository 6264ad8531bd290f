"""Commands of dashboards: page, Neuronpedia's files, sae-dashboard, validation and upload."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sae_lens_maira.cli.options import StudyOptions, numbers
from sae_lens_maira.cli.parser import works_in


@works_in("out")
def html(
    records: Path,
    out: Path = Path("page"),
    images: bool | None = None,
    image_root: Path | None = None,
    allow_credentialed: bool = False,
    as_json: bool = False,
) -> None:
    """Write the page of a record set: static files, opened without a server.

    Example: sae-lens-maira dashboards html --records records --out page

    Args:
        records: Folder of latent records.
        out: Folder of the page; an existing page in it is replaced.
        images: Copy the images of the shown studies; if not given, only if every study is public or synthetic.
        image_root: Folder that image paths are relative to; the records' folder if not given.
        allow_credentialed: Write data of credentialed studies too, in a marked folder that stays on this machine.
        as_json: Print JSON instead of the page's path.
    """
    from sae_lens_maira.dashboards.html import write_page
    from sae_lens_maira.latents.recordset import RecordSet

    opened = RecordSet.open(records)
    page = write_page(
        opened, None, out, images=images, image_root=image_root, allow_credentialed=allow_credentialed
    )
    text = json.dumps({"page": str(page), "latents": len(opened)}) if as_json else page
    sys.stdout.write(f"{text}\n")


@works_in("out")
def neuronpedia(
    records: Path,
    out: Path,
    set_name: str,
    kind: Literal["export", "saedashboard", "api"] = "export",
    model_id: str | None = None,
    layers: int | None = None,
    description: str = "Sparse autoencoder latents of a radiology vision-language model",
    url: str | None = None,
    dataset: str = "chest radiographs with reports",
    text_window: int = 128,
    patches: int = 64,
    sae: Path | None = None,
    allow_credentialed: bool = False,
    as_json: bool = False,
) -> None:
    """Write latent records as Neuronpedia's files, and check them.

    Example: sae-lens-maira dashboards neuronpedia --records records --out export --set-name res-16k

    Args:
        records: Folder of latent records.
        out: Output folder.
        set_name: Source set, lower case with single hyphens.
        kind: "export" for the bulk import, "saedashboard" for its batch files, "api" for upload payloads to inspect.
        model_id: Name of the model on Neuronpedia; phantom for records of the phantom, else maira-2.
        layers: Number of decoder layers of the model; 8 for phantom, 32 for maira-2.
        description: Description of the source set.
        url: Address of a page that shows more, such as one with the images.
        dataset: Description of the studies.
        text_window: Number of text tokens shown around a peak ("export" and "saedashboard").
        patches: Largest number of image patches shown ("export" and "saedashboard").
        sae: Folder of the SAE; the names are added to its metadata, so that SAELens' Neuronpedia helpers find the
            latents.
        allow_credentialed: Write data of credentialed studies too, in a marked folder that stays on this machine.
        as_json: Print JSON instead of text.
    """
    from sae_lens_maira.dashboards.export import write_export
    from sae_lens_maira.dashboards.saedashboard import write_saedashboard
    from sae_lens_maira.dashboards.sequences import Window
    from sae_lens_maira.dashboards.target import Target, model_of, save_metadata
    from sae_lens_maira.dashboards.upload import write_payloads
    from sae_lens_maira.dashboards.validate import validate
    from sae_lens_maira.dashboards.writing import read_interpretations
    from sae_lens_maira.latents.recordset import RecordSet
    from sae_lens_maira.sae import open_sae

    window, opened = Window(text_window, patches), RecordSet.open(records)
    name, depth = model_of(opened.meta.model, model_id, layers)
    target = Target(
        set_name=set_name, model_id=name, layers=depth, description=description, url=url, dataset=dataset
    )
    if sae is not None:
        open_sae(sae)  # a damaged SAE is refused before anything is written
    explained = read_interpretations(records)
    if kind == "export":
        folder = write_export(
            opened, target, out, explained, window=window, allow_credentialed=allow_credentialed
        )
    elif kind == "saedashboard":
        folder = write_saedashboard(opened, target, out, window=window, allow_credentialed=allow_credentialed)
    else:
        folder = write_payloads(opened, target, out, explained, allow_credentialed=allow_credentialed)
    if sae is not None:
        save_metadata(sae, target, opened.meta)
    issues = validate(folder)[1]
    name = target.neuronpedia_id(opened.meta.layer)
    if as_json:
        figures = {
            "folder": str(folder),
            "neuronpedia_id": name,
            "latents": len(opened),
            "issues": len(issues),
        }
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write(f"{folder}: {len(opened)} latents as {name}\n")
    _print_issues(issues)


def check(folder: Path, most: int = 50, as_json: bool = False) -> None:
    """Check a folder of dashboards: types, limits, ids, references. Report every issue with its file and line.

    Example: sae-lens-maira dashboards validate --folder export

    Args:
        folder: A bulk export, sae-dashboard's batch files, or upload payloads.
        most: Number of issues to print; all are counted.
        as_json: Print JSON instead of text.
    """
    from dataclasses import asdict

    from sae_lens_maira.dashboards.validate import validate
    from sae_lens_maira.errors import RecordError

    kind, issues = validate(folder)
    errors = sum(issue.severity == "error" for issue in issues)
    if as_json:
        shown = [asdict(issue) for issue in issues[:most]]
        sys.stdout.write(json.dumps({"format": kind, "errors": errors, "issues": shown}) + "\n")
    else:
        sys.stdout.writelines(f"{issue}\n" for issue in issues[:most])
        warnings = _count(len(issues) - errors, "warning")
        sys.stdout.write(f"{folder}: {kind}, {_count(errors, 'error')}, {warnings}\n")
    if errors:
        raise RecordError(
            f"{folder} has {_count(errors, 'error')}. Neuronpedia would reject or silently drop the rows listed; fix "
            "them first."
        )


@works_in("records")
def upload(
    records: Path,
    set_name: str,
    journal: Path | None = None,
    confirm: bool = False,
    localhost: bool = False,
    new_model: bool = False,
    model_id: str | None = None,
    layers: int | None = None,
    url: str | None = None,
    max_features: int = 12,
    max_bytes: int = 4_000_000,
    as_json: bool = False,
) -> None:
    """Report what an upload to Neuronpedia would send; `--confirm true` sends it. Public and synthetic studies only.

    Example: sae-lens-maira dashboards upload --records records --set-name res-16k

    Args:
        records: Folder of latent records.
        set_name: Source set to create, lower case with single hyphens.
        journal: File that records what was sent; `upload-<set_name>.jsonl` in the records' folder if not given.
        confirm: Send the data; the key is read from NEURONPEDIA_API_KEY.
        localhost: Use a Neuronpedia server on this machine.
        new_model: Create the model too; needed once per model.
        model_id: Name of the model on Neuronpedia; phantom for records of the phantom, else maira-2.
        layers: Number of decoder layers of the model; 8 for phantom, 32 for maira-2.
        url: Address of a page that shows more.
        max_features: Latents per request, at most 128; the server has 5 s to store a request.
        max_bytes: Size limit of a request in bytes.
        as_json: Print JSON instead of text.
    """
    from dataclasses import asdict

    from sae_lens_maira.dashboards.target import Target, model_of
    from sae_lens_maira.dashboards.upload import upload as run
    from sae_lens_maira.dashboards.writing import read_interpretations
    from sae_lens_maira.latents.recordset import RecordSet

    opened = RecordSet.open(records)
    name, depth = model_of(opened.meta.model, model_id, layers)
    plan = run(
        opened,
        Target(set_name=set_name, model_id=name, layers=depth, url=url),
        journal or records / f"upload-{set_name}.jsonl",
        read_interpretations(records),
        confirm=confirm,
        localhost=localhost,
        new_model=new_model,
        max_features=max_features,
        max_bytes=max_bytes,
    )
    sys.stdout.write((json.dumps(asdict(plan)) if as_json else str(plan)) + "\n")


@works_in("out")
def saedashboard(
    sae: str,
    out: Path,
    set_name: str,
    latents: str = "0-31",
    options: StudyOptions = StudyOptions(model_dtype="float32"),
    studies: int = 50,
    seed: int | None = None,
    hook: str | None = None,
    model_id: str | None = None,
    context: int = 12,
    top: int = 20,
    page: bool | None = None,
    allow_credentialed: bool = False,
    as_json: bool = False,
) -> None:
    """Run sae-dashboard over some latents of an SAE, for its batch files and its classic page.

    It keeps all rows in memory and takes 20 to 30 ms per latent. For all latents of a model, write records and use
    `dashboards neuronpedia --kind saedashboard`. Needs the extra `dashboard`.

    Example: sae-lens-maira dashboards saedashboard --sae sae_image --out classic --set-name res-1k --latents 0-31

    Args:
        sae: Folder of the SAE, or a release.
        out: Output folder.
        set_name: Source set, lower case with single hyphens.
        latents: Numbers and ranges such as "0-49,77".
        options: The model that the SAE was trained on, and the studies.
        studies: Number of phantom studies, or of studies from the start of the table.
        seed: Random seed of sae-dashboard's choice of sequences; the study seed if not given.
        hook: Hook point, if the SAE does not name its own.
        model_id: Name of the model in the files; phantom for the phantom, else maira-2.
        context: Number of tokens before and after a peak.
        top: Number of sequences with the largest activations.
        page: Write the classic page, which loads scripts from two other hosts; if not given, only if every study is
            public or synthetic.
        allow_credentialed: Write data of credentialed studies too, in a marked folder that stays on this machine.
        as_json: Print JSON instead of text.
    """
    from sae_lens_maira.activations import layer_of
    from sae_lens_maira.dashboards.adapter import AdapterConfig, run_saedashboard
    from sae_lens_maira.dashboards.prompts import Readout
    from sae_lens_maira.dashboards.target import Target, name_of
    from sae_lens_maira.dashboards.validate import validate
    from sae_lens_maira.interface import load_sae
    from sae_lens_maira.latents.contexts import Pseudonyms
    from sae_lens_maira.latents.source import ModelSource
    from sae_lens_maira.privacy import check_shareable

    listed = options.table_studies()
    if listed is not None:  # before any weights are read
        check_shareable(
            [one.licence for one in listed[:studies]],
            "writing sae-dashboard's files",
            allow=allow_credentialed,
        )
    config = AdapterConfig(
        latents=numbers(latents, "--latents") or (),
        before=context,
        after=context,
        top=top,
        page=page,
        allow_credentialed=allow_credentialed,
        seed=options.study_seed if seed is None else seed,
    )
    dictionary = load_sae(sae, hook_name=hook, device=options.device)
    hook_name = str(dictionary.cfg.metadata.hook_name)
    maira = options.load_model()
    chosen = options.first_studies(studies, maira.processor)
    names, layer = Pseudonyms(), layer_of(maira.model.config, hook_name)
    depth = int(maira.model.config.get_text_config().num_hidden_layers)
    target = Target(set_name=set_name, model_id=name_of(options.model, model_id), layers=depth)
    folder = run_saedashboard(
        ModelSource(maira, chosen, hook_name),
        [(names.study(study), study.licence.value) for study in chosen],
        dictionary,
        Readout.of(maira),
        target,
        layer,
        out,
        config,
    )
    issues = [issue for issue in validate(folder)[1] if issue.severity == "error"]
    pages = sorted(path.name for path in folder.glob("page-*.html"))
    if as_json:
        figures = {
            "folder": str(folder),
            "latents": len(config.latents),
            "studies": len(chosen),
            "pages": pages,
            "issues": len(issues),
        }
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write(
        f"{folder}: {len(config.latents)} latents over {len(chosen)} studies as {target.neuronpedia_id(layer)}; "
        f"{', '.join(pages) or 'no page'}\n"
    )
    _print_issues(issues)


def _print_issues(issues: Sequence[object]) -> None:
    if issues:
        sys.stdout.write(f"{_count(len(issues), 'issue')}, the first: {issues[0]}\n")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

"""The command `dashboards saedashboard`: sae-dashboard's own files and page of some latents of a MAIRA-2 SAE."""

import json
import sys
from pathlib import Path


def saedashboard(
    sae: Path,
    out: Path,
    set_name: str,
    latents: str = "0-31",
    model: str = "phantom",
    studies: int = 50,
    study_seed: int = 10_000,
    seed: int | None = None,
    table: Path | None = None,
    root: Path | None = None,
    hook: str | None = None,
    model_id: str = "maira-2",
    context: int = 12,
    top: int = 20,
    page: bool | None = None,
    device: str = "auto",
    as_json: bool = False,
) -> None:
    """Run sae-dashboard itself over some latents of an SAE: its batch files and its classic page.

    It keeps every row in memory and takes 20 to 30 ms a latent; for all latents write records, then `dashboards
    neuronpedia --kind saedashboard`. Needs the extra `dashboard`.

    Example: sae-lens-maira dashboards saedashboard --sae sae_image --out classic --set-name res-1k --latents 0-31

    Args:
        sae: folder of the SAE.
        out: folder to make.
        set_name: source set, lower case with single hyphens.
        latents: numbers and ranges such as "0-49,77".
        model: the model it was trained on: "phantom", a folder or a hub id.
        studies: phantom studies to read, or studies from the table's start.
        study_seed: of the phantom studies; the phantom itself was trained on 0.
        seed: of sae-dashboard's draws; the study seed if not given.
        table: Parquet or CSV with one study a row, instead of phantom studies.
        root: folder that the table's image paths are relative to; the table's own if not given.
        hook: hook point, if the SAE does not name its own.
        model_id: model's name in the files.
        context: tokens on either side of a hit.
        top: sequences of largest activation.
        page: write the classic page, which loads scripts from two other hosts; if not given, only where no study is
            credentialed.
        device: of the model and the SAE: auto, cpu, cuda, ...
        as_json: print JSON instead of text.
    """
    from sae_lens_maira.activations import layer_of
    from sae_lens_maira.cli.numbers import numbers
    from sae_lens_maira.dashboards.saedashboard_adapter import AdapterConfig, run_saedashboard
    from sae_lens_maira.dashboards.saedashboard_input import Readout
    from sae_lens_maira.dashboards.target import Target
    from sae_lens_maira.dashboards.validate import validate
    from sae_lens_maira.errors import SAEError
    from sae_lens_maira.interface import named_model
    from sae_lens_maira.latents.source import ModelSource
    from sae_lens_maira.latents.study_info import Pseudonyms
    from sae_lens_maira.phantom import generate_studies
    from sae_lens_maira.sae import load_matryoshka
    from sae_lens_maira.studies import read_table

    config = AdapterConfig(
        latents=numbers(latents, "--latents") or (),
        before=context,
        behind=context,
        top=top,
        page=page,
        seed=study_seed if seed is None else seed,
    )
    maira = named_model(model, dtype="float32", device=device)
    dictionary = load_matryoshka(sae, device=str(maira.model.device))
    hook_name = hook or dictionary.cfg.metadata.hook_name
    if not hook_name:
        raise SAEError(
            "The SAE's metadata name no hook point; give --hook, for example blocks.15.hook_resid_post."
        )
    chosen = (
        generate_studies(studies, seed=study_seed, size=maira.processor.recipe.crop)
        if table is None
        else list(read_table(table, root).studies[:studies])
    )
    names, layer = Pseudonyms(), layer_of(maira, hook_name)
    target = Target(
        set_name=set_name,
        model_id=model_id,
        layers=int(maira.model.config.get_text_config().num_hidden_layers),
    )
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
    faults = [fault for fault in validate(folder)[1] if fault.severity == "error"]
    pages = sorted(path.name for path in folder.glob("page-*.html"))
    if as_json:
        said = {
            "folder": str(folder),
            "latents": len(config.latents),
            "studies": len(chosen),
            "pages": pages,
            "faults": len(faults),
        }
        sys.stdout.write(json.dumps(said) + "\n")
        return
    sys.stdout.write(
        f"{folder}: {len(config.latents)} latents over {len(chosen)} studies as {target.neuronpedia_id(layer)}; "
        f"{', '.join(pages) or 'no page'}\n"
    )
    if faults:
        sys.stdout.write(f"{len(faults)} faults, the first: {faults[0]}\n")

"""The commands that need no data: `quickstart`, `measure-phantom`, and `workbench` with the shipped SAE."""

import json
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Any

from sae_lens_maira.cli.options import StudyOptions
from sae_lens_maira.cli.parser import works_in


@works_in("out")
def quickstart(
    out: Path = Path("quickstart_out"),
    studies: int = 1200,
    layer: int = 3,
    text_layer: int = 6,
    finding: str = "cardiomegaly",
    seed: int = 0,
    model: str = "phantom",
    as_json: bool = False,
) -> None:
    """Train Matryoshka SAEs on the phantom and show what they found, in about five minutes.

    Example: sae-lens-maira quickstart --out quickstart_out

    Args:
        out: Folder of the report; created if missing.
        studies: Number of phantom studies to read.
        layer: Decoder layer, 0 to 7, whose output is read at image patches and steered.
        text_layer: Decoder layer, 0 to 7, whose output is read at report tokens.
        finding: Finding to steer into reports of studies that do not have it.
        seed: Random seed of the phantom studies and of all sampling.
        model: Only "phantom", since the quickstart needs known findings.
        as_json: Print the main figures as JSON instead of the report's path.
    """
    from sae_lens_maira.errors import ConfigError
    from sae_lens_maira.quickstart import QuickstartConfig, run_quickstart
    from sae_lens_maira.quickstart.report import summary

    if model != "phantom":
        raise ConfigError(
            f"--model is {model!r}, but the quickstart runs only on the phantom, whose findings are known. "
            "For another model use harvest, train, latents, interpret and steer with --model and --table; see the "
            "tutorial."
        )
    config = QuickstartConfig(
        out=out, studies=studies, layer=layer, text_layer=text_layer, finding=finding, seed=seed
    )
    result = run_quickstart(config)
    sys.stdout.write((json.dumps(summary(result)) if as_json else str(result.folder / "report.md")) + "\n")


def measure_phantom(
    studies: int = 500,
    study_seed: int = 10_000,
    model: str = "phantom",
    device: str = "auto",
    as_json: bool = False,
) -> None:
    """Measure what the phantom can do: findings, change words and boxes on held-out studies.

    Example: sae-lens-maira measure-phantom --studies 500

    Args:
        studies: Number of held-out studies.
        study_seed: Random seed of the studies; the phantom itself was trained on 0.
        model: "phantom" for the shipped one, or the folder of another phantom.
        device: Device of the model: auto, cpu, cuda, ...
        as_json: Print JSON instead of text.
    """
    from dataclasses import asdict

    from sae_lens_maira.interface import named_model
    from sae_lens_maira.phantom import generate_studies
    from sae_lens_maira.phantom.measure import measure

    score = measure(
        named_model(model, device=device, dtype="float32"), generate_studies(studies, seed=study_seed)
    )
    if as_json:
        sys.stdout.write(json.dumps(asdict(score) | {"mean_accuracy": score.mean_accuracy}) + "\n")
        return
    sys.stdout.write(
        score.to_frame().to_string(float_format=lambda x: f"{x:.3f}") + "\n"
        f"mean accuracy {score.mean_accuracy:.3f} (n = {score.n}, greedy)\n"
        f"change words {score.change_accuracy:.3f} (n = {score.n_changes})\n"
        f"grounded boxes, mean IoU {score.box_iou:.3f} (n = {score.n_boxes})\n"
        f"reports that ended by themselves {score.complete:.3f}\n"
    )


def open_workbench(
    options: StudyOptions,
    sae: str = "phantom-image",
    records: Path | None = None,
    studies: int = 20,
    port: int = 8765,
    open_browser: bool = True,
    allow_credentialed: bool = False,
) -> None:
    """Serve a local page: choose a study, ask why a sentence was written, steer latents, compare reports.

    Example: sae-lens-maira workbench --port 8765

    Args:
        options: The model and the studies.
        sae: Folder of an SAE, a release, or phantom-image.
        records: Folder of latent records with p99, names and maps; those of the SAE if not given.
        studies: Number of studies to choose from.
        port: Port on 127.0.0.1; 0 for a free one.
        open_browser: Open the page in the browser.
        allow_credentialed: Allow texts of studies that are not public or synthetic in exported sessions.
    """
    from sae_lens_maira.errors import WorkbenchError

    try:
        from sae_lens_maira.workbench.run import new_session, serve
    except ModuleNotFoundError as error:
        raise WorkbenchError(
            f"The workbench needs {error.name}. Install it: pip install 'sae-lens-maira[workbench]'"
        ) from error
    from sae_lens_maira.interface import load, load_sae
    from sae_lens_maira.workbench.catalogue import open_records
    from sae_lens_maira.workbench.export import Opening, quoted

    hooked: Any = load(options.model, options.device, options.model_dtype)
    dictionary: Any = load_sae(sae, records=records, device=options.device)
    every = options.all_studies(studies, hooked.processor)
    found = every[:studies]
    if options.table is None:
        side = hooked.processor.recipe.crop
        source = f"sm.phantom_studies({studies}, {options.study_seed}, size={side})"
    else:
        if len(every) > len(found):
            sys.stderr.write(f"{len(found)} of {len(every):,} studies; --studies {len(every)} shows all.\n")
        rest = (None if options.root is None else _whole(options.root), options.split)
        parts = [quoted(_whole(options.table)), *("None" if one is None else quoted(one) for one in rest)]
        source = f"sm.read_studies({', '.join(parts)})"
    where = f", device={quoted(hooked.W_E.device)}"
    held = "" if records is None else f", records={quoted(_whole(records))}"
    opening = Opening(
        f"sm.load({quoted(_whole(options.model))}{where})",
        f"sm.load_sae({quoted(_whole(sae))}{held}{where})",
        source,
    )
    session = new_session(
        hooked, dictionary, list(found), opening, open_records(dictionary, records), allow_credentialed
    )

    def started(url: str) -> None:
        sys.stdout.write(f"Workbench at {url}\nOnly this machine can open it. Stop it with Ctrl-C.\n")
        sys.stdout.flush()
        if open_browser:  # In a thread, since a browser in the terminal would block the start of the server.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    serve(session, port, started)


def _whole(name: str | Path) -> str:
    """Make an existing path absolute; other names are unchanged."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)

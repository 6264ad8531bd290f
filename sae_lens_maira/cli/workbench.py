"""The command `workbench`: a local page to steer and question reports by hand."""

import sys
import webbrowser
from pathlib import Path
from typing import Any


def open_workbench(
    model: str = "phantom",
    sae: str = "phantom-image",
    records: Path | None = None,
    table: Path | None = None,
    root: Path | None = None,
    split: str | None = None,
    studies: int = 20,
    study_seed: int = 10_000,
    port: int = 8765,
    open_browser: bool = True,
    allow_credentialed: bool = False,
    device: str = "auto",
) -> None:
    """Serve a page to this machine: choose a study, ask why a sentence was written, steer latents, compare reports.

    Example: sae-lens-maira workbench --port 8765

    Args:
        model: "phantom", a folder or a hub id.
        sae: Folder of an SAE, a release, or phantom-image.
        records: Folder of latent records: p99, names and maps of latents; the SAE's own if not given.
        table: Parquet or CSV with one study per row, see studies import.
        root: Folder that the table's relative image paths start from; the table's own if not given.
        split: Read only the table's studies of this split, for example test.
        studies: Number of studies to choose from.
        study_seed: Random seed of the phantom studies; the phantom itself was trained on 0.
        port: Port on 127.0.0.1; 0 takes a free one.
        open_browser: Open the page in the browser.
        allow_credentialed: Let exported sessions hold texts of studies that are not public or synthetic.
        device: auto, cpu, cuda, ...
    """
    from sae_lens_maira.errors import WorkbenchError

    try:
        from sae_lens_maira.workbench.run import by_id, serve
    except ModuleNotFoundError as error:
        raise WorkbenchError(
            f"The workbench needs {error.name}. Install it: pip install 'sae-lens-maira[workbench]'"
        ) from error
    from sae_lens_maira.interface import load, load_sae, phantom_studies, read_studies
    from sae_lens_maira.workbench.session import Session, open_records
    from sae_lens_maira.workbench.spec import quoted

    hooked: Any = load(model, device=device)
    dictionary: Any = load_sae(sae, records=records, device=device)
    if table is None:
        side = hooked.processor.recipe.crop
        found: Any = phantom_studies(studies, study_seed, size=side)
        source = f"sm.phantom_studies({studies}, {study_seed}, size={side})"
    else:
        found = read_studies(table, root, split)[:studies]
        extra = "".join(f", {quoted(one)}" if one is not None else ", None" for one in (root, split))
        source = f"sm.read_studies({quoted(table)}{extra})"
    opened = f"{quoted(sae)}{'' if records is None else f', records={quoted(records)}'}"
    session = Session(
        hooked,
        dictionary,
        by_id(list(found)),
        {"model": quoted(model), "sae": opened, "studies": source},
        open_records(dictionary, records),
        allow_credentialed,
    )

    def started(url: str) -> None:
        sys.stdout.write(f"Workbench at {url}\nOnly this machine can open it. Stop it with Ctrl-C.\n")
        sys.stdout.flush()
        if open_browser:
            webbrowser.open(url)

    serve(session, port, started)


__all__ = ["open_workbench"]

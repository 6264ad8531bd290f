"""The command `workbench`: a local page to steer and question reports by hand."""

import sys
import threading
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
        from sae_lens_maira.workbench.run import new_session, serve
    except ModuleNotFoundError as error:
        raise WorkbenchError(
            f"The workbench needs {error.name}. Install it: pip install 'sae-lens-maira[workbench]'"
        ) from error
    from sae_lens_maira.interface import load, load_sae, phantom_studies, read_studies
    from sae_lens_maira.workbench.catalogue import open_records
    from sae_lens_maira.workbench.export import Opening, quoted

    hooked: Any = load(model, device=device)
    dictionary: Any = load_sae(sae, records=records, device=device)
    if table is None:
        side = hooked.processor.recipe.crop
        found: Any = phantom_studies(studies, study_seed, size=side)
        source = f"sm.phantom_studies({studies}, {study_seed}, size={side})"
    else:
        every = read_studies(table, root, split)
        found = every[:studies]
        if len(every) > len(found):
            sys.stderr.write(f"{len(found)} of {len(every):,} studies; --studies {len(every)} shows all.\n")
        rest = (None if root is None else _whole(root), split)
        parts = [quoted(_whole(table)), *("None" if one is None else quoted(one) for one in rest)]
        source = f"sm.read_studies({', '.join(parts)})"
    where = f", device={quoted(hooked.W_E.device)}"
    held = "" if records is None else f", records={quoted(_whole(records))}"
    opening = Opening(
        f"sm.load({quoted(_whole(model))}{where})", f"sm.load_sae({quoted(_whole(sae))}{held}{where})", source
    )
    session = new_session(
        hooked, dictionary, list(found), opening, open_records(dictionary, records), allow_credentialed
    )

    def started(url: str) -> None:
        sys.stdout.write(f"Workbench at {url}\nOnly this machine can open it. Stop it with Ctrl-C.\n")
        sys.stdout.flush()
        if open_browser:  # In a thread: a browser in the terminal would keep the server from starting.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    serve(session, port, started)


def _whole(name: str | Path) -> str:
    """A path that exists, from the root; any other name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


__all__ = ["open_workbench"]

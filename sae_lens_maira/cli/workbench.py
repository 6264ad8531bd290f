"""The command `workbench`: a local page to steer and question reports by hand."""

import sys
import threading
import webbrowser
from pathlib import Path
from typing import Any

from sae_lens_maira.cli.options import StudyOptions


def open_workbench(
    options: StudyOptions,
    sae: str = "phantom-image",
    records: Path | None = None,
    studies: int = 20,
    port: int = 8765,
    open_browser: bool = True,
    allow_credentialed: bool = False,
) -> None:
    """Serve a page to this machine: choose a study, ask why a sentence was written, steer latents, compare reports.

    Example: sae-lens-maira workbench --port 8765

    Args:
        options: The model and the studies.
        sae: Folder of an SAE, a release, or phantom-image.
        records: Folder of latent records: p99, names and maps of latents; the SAE's own if not given.
        studies: Number of studies to choose from.
        port: Port on 127.0.0.1; 0 takes a free one.
        open_browser: Open the page in the browser.
        allow_credentialed: Let exported sessions hold texts of studies that are not public or synthetic.
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
        if open_browser:  # In a thread: a browser in the terminal would keep the server from starting.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    serve(session, port, started)


def _whole(name: str | Path) -> str:
    """A path that exists, from the root; any other name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


__all__ = ["open_workbench"]

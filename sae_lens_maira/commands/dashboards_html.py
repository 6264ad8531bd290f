"""The command `dashboards html`: the page of a folder of latent records."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def html(
    records: Path, out: Path = Path("page"), images: bool | None = None, image_root: Path | None = None
) -> None:
    """Write the page of a record set: static files, opened without a server.

    Example: sae-lens-maira dashboards html --records records --out page

    Args:
        records: folder of latent records.
        out: folder of the page; made if missing, an older page in it is replaced.
        images: copy the radiographs of the contexts shown; if not given, only where no study is credentialed.
        image_root: folder that image paths are relative to; the records' folder if not given.
    """
    from sae_lens_maira.dashboards.html import write_page
    from sae_lens_maira.latents.recordset import RecordSet

    page = write_page(RecordSet.open(records), None, out, images=images, image_root=image_root)
    sys.stdout.write(f"{page}\n")


COMMANDS: dict[str, Callable[..., None]] = {"dashboards html": html}

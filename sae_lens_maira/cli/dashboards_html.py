"""The command `dashboards html`: the page of a folder of latent records."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def html(
    records: Path,
    out: Path = Path("page"),
    images: bool | None = None,
    image_root: Path | None = None,
    as_json: bool = False,
) -> None:
    """Write the page of a record set: static files, opened without a server.

    Example: sae-lens-maira dashboards html --records records --out page

    Args:
        records: folder of latent records.
        out: folder of the page; made if missing, an older page in it is replaced.
        images: copy the radiographs of the contexts shown; if not given, only where no study is credentialed.
        image_root: folder that image paths are relative to; the records' folder if not given.
        as_json: print JSON instead of the page's path.
    """
    from sae_lens_maira.dashboards.html import write_page
    from sae_lens_maira.latents.recordset import RecordSet

    opened = RecordSet.open(records)
    page = write_page(opened, None, out, images=images, image_root=image_root)
    told = json.dumps({"page": str(page), "latents": len(opened)}) if as_json else page
    sys.stdout.write(f"{told}\n")

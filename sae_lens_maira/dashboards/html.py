"""A page of our own over latent records: static files that open from a folder, without a server or a network.

    index.html, app.js, style.css   the page; its content policy allows no remote source
    data/index.js                   one column per quantity, one entry per latent
    data/latents/000/00012.js       one latent, loaded when it is opened
    images/                         centre crops of the radiographs, as the model saw them

Data are JavaScript calls around JSON, since a page opened from a file may load scripts but not fetch. Radiographs stay
out unless every study may be shared, or they are asked for. It knows nothing about models or SAEs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.html_columns import IndexColumns, index_row
from sae_lens_maira.dashboards.html_images import ImageFolder
from sae_lens_maira.dashboards.html_latent import latent_page
from sae_lens_maira.dashboards.saedashboard import batches_of
from sae_lens_maira.dashboards.workers import each
from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.records import Interpretation, load
from sae_lens_maira.latents.records import RecordsMeta, StudyInfo
from sae_lens_maira.latents.recordset import RecordSet

PAGE_FILES = ("index.html", "app.js", "latent.js", "style.css")
LATENT_BYTES = 150_000


def write_page(
    records: RecordSet,
    interpretations: Iterable[Interpretation] | None,
    out: Path,
    images: bool | None = None,
    image_root: Path | None = None,
    workers: int | None = None,
) -> Path:
    """Write the page of a record set.

    Args:
        records: the latents.
        interpretations: explanations and scores; None reads `interpretations.jsonl` of the record set, if there.
        out: folder of the page; a page already there is replaced, other files stop the writing.
        images: copy the radiographs of shown contexts. None: only if no study is credentialed.
        image_root: what the studies' image paths are relative to; the record set's folder if not given.
        workers: processes that write latents; one a core if not given.

    Returns:
        Path of `index.html`.

    Raises:
        RecordError: `out` holds something else, a context names an unknown study, or an image is missing.
    """
    out = Path(out)
    _clear(out)
    studies = records.studies
    credentialed = any(entry.licence == "credentialed" for entry in studies.values())
    shown = not credentialed if images is None else images
    folder = ImageFolder(out / "images", image_root or records.folder, list(studies)) if shown else None
    said = _by_latent(load(records.folder) if interpretations is None else interpretations)
    columns = IndexColumns()

    def write(batch: tuple[int, list[int]]) -> list[dict[str, Any]]:
        rows = []
        for latent in batch[1]:
            record, mine = records[latent], said.get(latent, [])
            path = out / latent_file(latent)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_call(path, "saeLatent", latent_page(record, mine, studies, folder, LATENT_BYTES))
            rows.append(index_row(record, mine))
        return rows

    for rows in each(write, batches_of(records, 64), workers):
        for row in rows:
            columns.add(row)
    index = {"about": about(records.meta, studies, shown)} | columns.to_plain()
    _write_call(out / "data" / "index.js", "saeIndex", index)
    source = files("sae_lens_maira.dashboards") / "page"
    for name in PAGE_FILES:
        (out / name).write_bytes((source / name).read_bytes())
    return out / "index.html"


def latent_file(latent: int) -> str:
    """Where a latent's data lie, relative to the page; 256 in a folder."""
    return f"data/latents/{latent // 256:03d}/{latent:05d}.js"


def about(meta: RecordsMeta, studies: dict[str, StudyInfo], images: bool) -> dict[str, Any]:
    """What the page says of its own origin."""
    licences = sorted({entry.licence for entry in studies.values()})
    return {
        "model": meta.model,
        "hook": meta.hook_name,
        "layer": meta.layer,
        "sae": meta.sae,
        "control": meta.control,
        "d_in": meta.d_in,
        "d_sae": meta.d_sae,
        "widths": list(meta.level_widths),
        "rows_text": meta.rows_text,
        "rows_image": meta.rows_image,
        "studies": meta.studies,
        "licences": licences,
        "phantom": meta.model == "phantom" or "synthetic" in licences,
        "images": images,
        "seed": meta.seed,
        "versions": meta.versions,
    }


def _by_latent(interpretations: Iterable[Interpretation]) -> dict[int, list[Interpretation]]:
    found: dict[int, list[Interpretation]] = {}
    for one in interpretations:
        found.setdefault(one.latent, []).append(one)
    return found


def _clear(out: Path) -> None:
    """Remove an older page, and nothing else."""
    known: Sequence[str] = (*PAGE_FILES, "data", "images")
    if out.is_dir():
        foreign = sorted(path.name for path in out.iterdir() if path.name not in known)
        if foreign:
            raise RecordError(
                f"{out} holds {foreign[0]!r}, which is no part of a page; a page takes a folder of its own. Give an "
                "empty or new folder."
            )
        for name in ("data", "images"):
            shutil.rmtree(out / name, ignore_errors=True)
    (out / "data").mkdir(parents=True, exist_ok=True)


def _write_call(path: Path, function: str, payload: dict[str, Any]) -> None:
    """Write `function(payload);`, ASCII only, so that no text can end the script it lies in."""
    text = json.dumps(payload, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(f"{function}({text});\n", encoding="ascii")

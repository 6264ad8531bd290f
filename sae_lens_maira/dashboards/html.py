"""Write the multimodal page of a record set: static files that open from a folder, without a server or a network.

    index.html, app.js, latent.js, style.css   the page; its content policy allows no remote source
    data/index.js                              one column per quantity, one entry per latent
    data/latents/000/00012.js                  one latent, loaded when it is opened
    images/                                    centre crops of the radiographs, as the model saw them

Data files are JavaScript calls with a JSON argument, since a page opened from a file can load scripts but cannot fetch.
Studies that are not public or synthetic are refused, with their images, unless the caller allows them. A page is
written atomically.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.html_latent import ImageFolder, latent_page, readable, rounded
from sae_lens_maira.dashboards.writing import (
    batches_of,
    best_named,
    by_latent,
    control_of,
    leading_score,
    licence_of,
    parallel_map,
)
from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.records import Interpretation, load
from sae_lens_maira.io import atomic_folder
from sae_lens_maira.latents.records import Firing, LatentRecord, RecordsMeta, StudyInfo
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.latents.space import spatial_of_records
from sae_lens_maira.privacy import MARKER, SHAREABLE, mark_folder, private_files

PAGE_FILES = ("index.html", "app.js", "latent.js", "style.css")
LATENT_BYTES = 150_000
WORDS_SHOWN = 4
NAME_LENGTH = 160


def write_page(
    records: RecordSet,
    interpretations: Iterable[Interpretation] | None,
    out: Path,
    images: bool | None = None,
    image_root: Path | None = None,
    workers: int | None = None,
    allow_credentialed: bool = False,
) -> Path:
    """Write the page of a record set.

    Args:
        records: The record set.
        interpretations: Explanations and scores; None reads `interpretations.jsonl` of the record set, if it exists.
        out: Folder of the page. An existing page is replaced; any other file in the folder is an error.
        images: Copy the radiographs of the contexts shown. None copies them only if every study is public or synthetic.
        image_root: Folder that image paths are relative to; the record set's folder if not given.
        workers: Number of processes that write latents; one per core if not given.
        allow_credentialed: Write data of credentialed studies too, in a marked folder.

    Returns:
        Path of `index.html`.

    Raises:
        PrivacyError: A study is not known to be public or synthetic and `allow_credentialed` is not set, or an image
            path leaves its folder.
        RecordError: `out` contains other files, a context refers to an unknown study, or an image is missing.
    """
    out, studies = Path(out), records.studies
    licence = licence_of(records, "writing a page", allow_credentialed)
    _refuse_other_files(out)
    with_images = licence in SHAREABLE if images is None else images
    grouped = by_latent(load(records.folder) if interpretations is None else interpretations)
    space = _space_of(records)
    with private_files(out), atomic_folder(out, existing="replace") as draft:
        root = image_root or records.folder
        copies = ImageFolder(draft / "images", root, list(studies), licence) if with_images else None

        def write(batch: tuple[int, list[int]]) -> list[dict[str, Any]]:
            rows = []
            for latent in batch[1]:
                record, own = records[latent], grouped.get(latent, [])
                path = draft / latent_file(latent)
                path.parent.mkdir(parents=True, exist_ok=True)
                page = latent_page(record, own, studies, copies, LATENT_BYTES) | {"licence": licence}
                page["space"] = space.get(latent, [])
                _write_call(path, "saeLatent", page)
                rows.append(index_row(record, own))
            return rows

        columns = IndexColumns()
        for rows in parallel_map(write, batches_of(records, 64), workers):
            for row in rows:
                columns.add(row)
        origin = about(records.meta, studies, with_images, licence) | {"records": records.fingerprint}
        index = {"about": origin} | columns.to_plain()
        _write_call(draft / "data" / "index.js", "saeIndex", index)
        source = files("sae_lens_maira.dashboards") / "page"
        for name in PAGE_FILES:
            (draft / name).write_bytes((source / name).read_bytes())
        mark_folder(draft, licence, "dashboards html")
    return out / "index.html"


def _space_of(records: RecordSet) -> dict[int, list[dict[str, Any]]]:
    """Latent -> spatial scores, for the best image latent of each finding, against the boxes of this finding."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in spatial_of_records(records).to_dict("records"):
        scores = {
            str(key): rounded(float(value)) if value == value else None  # NaN is not JSON
            for key, value in row.items()
            if key not in ("finding", "latent", "n")
        }
        found.setdefault(int(row["latent"]), []).append(
            {"finding": row["finding"], "n": int(row["n"])} | scores
        )
    return found


def latent_file(latent: int) -> str:
    """Path of a latent's data relative to the page; 256 latents per folder."""
    return f"data/latents/{latent // 256:03d}/{latent:05d}.js"


def about(meta: RecordsMeta, studies: dict[str, StudyInfo], images: bool, licence: str) -> dict[str, Any]:
    """Make the page's description of its source."""
    licences = sorted({str(entry.licence) for entry in studies.values()})
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
        "licence": licence,
        "licences": licences,
        "phantom": meta.model == "phantom" or "synthetic" in licences,
        "images": images,
        "seed": meta.seed,
        "versions": meta.versions,
    }


COLUMNS = (
    *("latent", "level", "status", "text", "image", "max", "finding", "f1", "at"),
    *("name", "category", "score", "control", "words", "refines"),
)


def index_row(record: LatentRecord, interpretations: Sequence[Interpretation]) -> dict[str, Any]:
    """Make the row of one latent in the index: column -> value, None if it is unknown."""
    best = max(record.agreement, key=lambda a: a.f1, default=None)
    name = best_named(interpretations)
    lead = leading_score(name.scores) if name else None
    control = control_of(name) if name else None
    density: dict[str, Firing] = {firing.modality: firing for firing in record.firing if firing.rows}
    return {
        "latent": record.latent,
        "level": record.level,
        "status": record.status,
        "text": rounded(density["text"].density) if "text" in density else None,
        "image": rounded(density["image"].density) if "image" in density else None,
        "max": rounded(record.max),
        "finding": best.finding if best else None,
        "f1": rounded(best.f1) if best else None,
        "at": best.modality[0] if best else "",
        "name": (name.explanation or "")[:NAME_LENGTH] if name else "",
        "category": (name.category or None) if name else None,
        "score": rounded(lead.balanced_accuracy) if lead else None,
        "control": rounded(control.balanced_accuracy) if control else None,
        "words": " ".join(readable(t.token).strip() for t in record.top_tokens[:WORDS_SHOWN]),
        # The page inverts these, so that a coarse latent lists the latents that refine it.
        "refines": [[n.latent, rounded(n.value)] for n in record.neighbours if n.relation == "refines"],
    }


class IndexColumns:
    """The index as columns: one list per quantity, aligned by latent.

    16,384 latents take about two megabytes, which a browser parses in tens of milliseconds. Repeated strings are
    stored once, in small tables.
    """

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._tables: dict[str, dict[str, int]] = {"status": {}, "finding": {}, "category": {}}

    def add(self, row: dict[str, Any]) -> None:
        """Append the row of one latent; strings of the small tables become their number, -1 if unknown."""
        for key, column in self._columns.items():
            value, table = row[key], self._tables.get(key)
            if table is not None:
                value = -1 if value is None else table.setdefault(value, len(table))
            column.append(value)

    def to_plain(self) -> dict[str, Any]:
        """Return `{"columns": {...}, "tables": {...}}`, ready for JSON."""
        return {
            "columns": self._columns,
            "tables": {name: list(table) for name, table in self._tables.items()},
        }


def _refuse_other_files(out: Path) -> None:
    """Refuse a folder that contains anything but an older page, which will be replaced."""
    known = (*PAGE_FILES, "data", "images", MARKER)
    if out.exists() and not out.is_dir():
        raise RecordError(f"{out} is a file. Give an empty or new folder.")
    if out.is_dir() and (other := sorted(path.name for path in out.iterdir() if path.name not in known)):
        raise RecordError(
            f"{out} contains {other[0]!r}, which is not part of a page. Give an empty or new folder."
        )


def _write_call(path: Path, function: str, payload: dict[str, Any]) -> None:
    """Write `function(payload);` in ASCII, with "<" escaped so that no text can end the script element."""
    text = json.dumps(payload, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(f"{function}({text});\n", encoding="ascii")

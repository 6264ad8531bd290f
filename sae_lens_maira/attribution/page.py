"""Static pages of attributions: one self-contained HTML file per study, and an index.

A page contains the report with its sentences; a sentence shows its map over the image, its latents, the ablation check,
and the report that is written without its strongest entries. Nothing is loaded from elsewhere, and text of studies is
only ever inserted as text. Studies that are not known to be public or synthetic are refused by default.
"""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from sae_lens_maira.attribution.attribute import VIEWS, Attribution, ReportAttribution
from sae_lens_maira.attribution.edges import SentenceGraph
from sae_lens_maira.attribution.graph_svg import summary
from sae_lens_maira.attribution.regenerate import Removal
from sae_lens_maira.io import atomic_write, write_json
from sae_lens_maira.maira2.images import centre_crop
from sae_lens_maira.privacy import check_shareable, mark_folder, private_files
from sae_lens_maira.studies import Study
from sae_lens_maira.studies.words import compare_words

IMAGE_SIDE = 518
SHOWN_LATENTS = 12
_PAGE = re.compile(r"study-\d{4,}\.(?:html|json)")
CAUTION = (
    "An attribution shows what made this model write a sentence, not that the sentence is true. "
    "Judge it by its check."
)


@dataclass(frozen=True)
class StudyPage:
    """What the page of one study shows.

    Attributes:
        study: The study.
        found: Its attribution.
        removals: Per sentence, the report written without what causes it; None where it was not written.
        graphs: Per sentence, its graph from image latents to text latents; None where it was not measured.
    """

    study: Study
    found: ReportAttribution
    removals: Sequence[Removal | None] = ()
    graphs: Sequence[SentenceGraph | None] = ()


def write_pages(
    folder: Path, pages: Sequence[StudyPage], about: str = "", allow_credentialed: bool = False
) -> Path:
    """Write one page per study, its graphs as JSON next to it, and an index.

    Pages and graphs of an earlier run into the same folder are replaced or removed.

    Args:
        folder: Output folder; created if missing.
        pages: The studies.
        about: A sentence on model and SAE for every page.
        allow_credentialed: Also write studies that are not public or synthetic; the folder is then marked, and only
            its owner can read the files.

    Returns:
        The index, or the only page.

    Raises:
        PrivacyError: A study is not known to be public or synthetic.
    """
    licences = [page.study.licence for page in pages]
    found = check_shareable(licences, "writing attribution pages", allow=allow_credentialed)
    folder.mkdir(parents=True, exist_ok=True)
    with private_files(folder):
        mark_folder(folder, found, "attribute")  # first, so that a kill leaves no page without the mark
        names = [f"study-{number:04d}.html" for number in range(len(pages))]
        _remove_earlier(folder)
        for name, page in zip(names, pages, strict=True):
            atomic_write(folder / name, page_html(page, about))
            if page.graphs:
                graphs = [None if graph is None else graph.to_dict() for graph in page.graphs]
                write_json(
                    (folder / name).with_suffix(".json"), {"study": page.found.study_id, "graphs": graphs}
                )
        atomic_write(folder / "index.html", _index(names, pages, about))
    return folder / ("index.html" if len(pages) != 1 else names[0])


def _remove_earlier(folder: Path) -> None:
    """Remove the pages and graphs of an earlier run, and first the index that names them."""
    (folder / "index.html").unlink(missing_ok=True)
    for path in folder.iterdir():
        if _PAGE.fullmatch(path.name):
            path.unlink()


def page_html(page: StudyPage, about: str = "") -> str:
    """The page of one study as one HTML document."""
    template = (files("sae_lens_maira.attribution") / "page.html").read_text(encoding="utf-8")
    # JSON inside a script element: only "<" could end it.
    return template.replace("__DATA__", json.dumps(page_data(page, about)).replace("<", "\\u003c"))


def page_data(page: StudyPage, about: str = "") -> dict[str, Any]:
    """What the page's script reads: plain JSON values."""
    found, study = page.found, page.study
    removals = list(page.removals) or [None] * len(found.sentences)
    graphs = list(page.graphs) or [None] * len(found.sentences)
    licence = getattr(study.licence, "value", study.licence)
    return {
        "study": found.study_id,
        "hook": found.hook_name,
        "method": found.sentences[0].method if found.sentences else "",
        "about": about,
        "banner": f"Licence of this study: {licence}. {CAUTION}",
        "images": [
            {
                "view": name,
                "png": "data:image/png;base64," + base64.b64encode(radiograph_png(image)).decode(),
                "rows": rows,
                "cols": cols,
            }
            for name, image, (rows, cols) in _images(study, found)
        ],
        "sentences": [
            sentence_data(found, item, removal) | {"graph": _graph(graph)}
            for item, removal, graph in zip(found.sentences, removals, graphs, strict=True)
        ],
    }


def sentence_data(found: ReportAttribution, item: Attribution, removal: Removal | None) -> dict[str, Any]:
    """One sentence for a page's script: its map, latents, check, and the report without what causes it."""
    table = item.latents(found.names).head(SHOWN_LATENTS)
    check = None
    if item.check is not None:
        c = item.check
        check = {
            "n": c.n,
            "drop": c.drop,
            "random": c.drop_random,
            "largest": c.drop_largest,
            "gradient": c.drop_gradient,
            "sum": c.sum_of_attributions,
            "true": c.true_difference,
            "problems": c.problems,
            "deletion": c.deletion,
            "insertion": c.insertion,
        }
    return {
        "text": item.sentence.text,
        "score": item.score,
        "map": _sparse_maps(found, enumerate(item.by_position.tolist())),
        "latents": [
            {
                "latent": int(row["latent"]),
                "name": str(row["name"]),
                "share": float(row["share"]),
                "positions": int(row["positions"]),
                "map": _sparse_maps(
                    found,
                    (
                        (int(p), float(v))
                        for p, j, v in zip(item.position, item.latent, item.value, strict=True)
                        if int(j) == int(row["latent"])
                    ),
                ),
            }
            for row in table.to_dict("records")
        ],
        "check": check,
        "regenerated": None
        if removal is None
        else {
            "n": len(removal),
            "rounds": removal.rounds,
            "gone": removal.gone,
            "pieces": _pieces(found.report, removal.report),
        },
    }


def _graph(graph: SentenceGraph | None) -> dict[str, str] | None:
    """The drawing as an image, so that nothing in it can act, and its summary in words."""
    if graph is None:
        return None
    drawn = base64.b64encode(graph.svg().encode()).decode()
    return {"svg": f"data:image/svg+xml;base64,{drawn}", "summary": summary(graph)}


def _sparse_maps(found: ReportAttribution, values: Any) -> dict[str, list[tuple[int, float]]]:
    """Per view, (patch number, value) of the positions that are patches and above 0."""
    encoding = found.encoding
    maps: dict[str, list[tuple[int, float]]] = {}
    columns = {name: _columns(found, name) for name in VIEWS}
    for position, value in values:
        view = int(encoding.view[0, position])
        if view >= 0 and value > 0:
            row, col = int(encoding.patch_row[0, position]), int(encoding.patch_col[0, position])
            maps.setdefault(VIEWS[view], []).append((row * columns[VIEWS[view]] + col, round(value, 6)))
    return maps


def _columns(found: ReportAttribution, view: str) -> int:
    here = found.encoding.view[0] == VIEWS.index(view)
    return int(found.encoding.patch_col[0][here].max()) + 1 if bool(here.any()) else 0


def _images(study: Study, found: ReportAttribution) -> list[tuple[str, Any, tuple[int, int]]]:
    shown = []
    for name, image in zip(VIEWS, (study.frontal, study.lateral, study.prior_frontal), strict=True):
        columns = _columns(found, name)
        if image is not None and columns:
            here = found.encoding.view[0] == VIEWS.index(name)
            shown.append((name, image, (int(found.encoding.patch_row[0][here].max()) + 1, columns)))
    return shown


def radiograph_png(image: Any) -> bytes:
    """The centre square of an image, which is what the model sees, as a grey PNG of at most 518 pixels."""
    square, _ = centre_crop(image, (), IMAGE_SIDE)
    buffer = io.BytesIO()
    square.save(buffer, "PNG")
    return buffer.getvalue()


def _pieces(before: str, after: str) -> list[tuple[str, bool]]:
    """`after` in pieces, each with whether `before` lacks its words there."""
    return [(piece.text, piece.marked) for piece in compare_words(before, after)[1]]


def _index(names: Sequence[str], pages: Sequence[StudyPage], about: str) -> str:
    rows = "".join(
        f'<li><a href="{name}">{escape(page.found.study_id)}</a> {len(page.found.sentences)} sentences, '
        f"{sum(s.check is not None and not s.check.passed for s in page.found.sentences)} checks failed</li>"
        for name, page in zip(names, pages, strict=True)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Attributions</title>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<style>:root{color-scheme:light dark}body{font:16px/1.6 system-ui;max-width:800px;margin:24px auto;"
        f"padding:0 16px}}</style></head><body><h1>Attributions</h1><p>{escape(about)}</p><ul>{rows}</ul></body></html>"
    )


__all__ = ["StudyPage", "page_data", "page_html", "radiograph_png", "sentence_data", "write_pages"]

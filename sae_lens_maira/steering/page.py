"""Static HTML page of a steering run: summary with controls, figure, and reports before and after.

The page is made from the tables that `SteeringTables.save` wrote. Figure and images are part of the file, nothing is
loaded from elsewhere, and it opens without a server. Images and text of credentialed studies are left out unless asked
for; a study of unknown licence counts as credentialed.
"""

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sae_lens_maira.checksums import read_parquet
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.io import atomic_write
from sae_lens_maira.maira2.images import centre_crop
from sae_lens_maira.privacy import is_shareable, private_files
from sae_lens_maira.studies import Study
from sae_lens_maira.studies.words import Piece, compare_words

PAGE = "index.html"
IMAGE_SIDE = 320
# Columns of a summary: name, heading, factor, format, meaning.
SHOWN = (
    ("on_target", "on target", 100, "{:.0f} %", "reports as wanted: the finding stated (or gone)"),
    ("off_target", "off target", 100, "{:.1f} %", "other labels that differ from the unsteered report"),
    ("kl", "KL", 1, "{:.3f}", "of the next word, unsteered to steered, in nats"),
    ("perplexity", "perplexity", 1, "{:.2f}", "of the steered text under the unsteered model"),
    ("repetition", "repetition", 100, "{:.1f} %", "4-grams seen before in the report"),
    ("length", "length", 1, "{:.2f}", "words, relative to the unsteered report"),
    ("ratio", "|Δ| / |h|", 1, "{:.2f}", "size of the change, relative to the stream"),
)
CAUTION = (
    "An effect on a report is an effect on text. It does not show that a latent means what its name says, nor that "
    "the finding is there. Judge a method by its difference to its controls."
)


@dataclass(frozen=True)
class PageOptions:
    """Options of a page.

    Attributes:
        title: Heading; None uses the name of the finding.
        method: Method whose reports are shown; None for the one of largest on - off target that is neither a
            control nor supervised.
        reports: Number of pairs of reports.
        credentialed: Also show images and text of credentialed studies.
        about: Sentence on model, SAE and studies, below the heading.
    """

    title: str | None = None
    method: str | None = None
    reports: int = 8
    credentialed: bool = False
    about: str = ""


def write_page(
    folder: Path,
    finding: str,
    studies: Sequence[Study] | None = None,
    options: PageOptions | None = None,
) -> Path:
    """Write `folder/index.html`, next to the tables of a run.

    Args:
        folder: Folder that `SteeringTables.save` wrote: studies.parquet, summary.parquet, dose_response.png.
        finding: What was steered.
        studies: Studies of the reporting half, in the order in which they were steered. Without them no image is
            shown, and text only if `options.credentialed` is set.
        options: Options of the page.

    Returns:
        Path of the page.

    Raises:
        InterventionError: A table is missing, there is no such method, or the studies are not those of the run.
    """
    options = options or PageOptions()
    for name in ("studies.parquet", "summary.parquet"):
        if not (folder / name).is_file():
            raise InterventionError(
                f"{folder} has no {name}; give the folder that a steering run (SteeringTables.save) wrote."
            )
    try:
        table, summary = (read_parquet(folder / f"{name}.parquet") for name in ("studies", "summary"))
    except ValueError as error:
        raise InterventionError(
            f"The tables in {folder} cannot be read ({error}); they are damaged. Steer again."
        ) from error
    title = options.title or f"Steering {finding.replace('_', ' ')}"
    method = options.method or _best(summary)
    if method not in set(summary.method):
        raise InterventionError(
            f"There is no method {method!r} in this run; it has {', '.join(map(repr, summary.method))}."
        )
    reported = table.loc[(table.half == "report") & (table.method == method)].sort_values("study")
    if studies is not None and len(studies) != len(reported):
        raise InterventionError(
            f"{len(studies)} studies were given and the run reports on {len(reported)}; give the studies of its "
            "reporting half, in their order."
        )
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(options.about)}</p>" if options.about else "",
        f'<p class="note">{escape(CAUTION)}</p>',
        "<h2>Methods and controls</h2>",
        _summary(summary),
        "<h2>Dose and response</h2>",
        _figure(folder / "dose_response.png"),
        f"<h2>Reports before and after: {escape(method)}</h2>",
        _reports(reported, studies, options),
    ]
    style = files("sae_lens_maira.steering").joinpath("page.css").read_text(encoding="utf-8")
    page = folder / PAGE
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )
    with private_files(folder):
        atomic_write(page, text)
    return page


def _best(summary: pd.DataFrame) -> str:
    # Neither a control nor the supervised reference, if there is anything else.
    own = ~summary.method.astype(str).str.contains("random|flipped|supervised")
    ranked = summary[own] if bool(own.any()) else summary
    return str(ranked.method.iloc[int(np.argmax(ranked.on_target - ranked.off_target))])


def _summary(summary: pd.DataFrame) -> str:
    shown = [row for row in SHOWN if row[0] in summary]
    n, before = int(summary.n.iloc[0]), float(summary.unsteered.iloc[0])
    surprise = ""
    if "unsteered_perplexity" in summary:
        surprise = f"; perplexity of the unsteered reports: {float(summary.unsteered_perplexity.iloc[0]):.2f}"
    head = "".join(f'<th scope="col" title="{escape(row[4])}">{escape(row[1])}</th>' for row in shown)
    rows = []
    if "control_of" in summary:
        controls = set(summary.method[summary.control_of.notna()])
    else:
        controls = {name for name in summary.method if re.search(r"random|flipped", str(name))}
    for row in summary.to_dict("records"):
        cells = [f"<td>{float(row['strength']):g}</td>"]
        for column, _, factor, form, _ in shown:
            value = float(row[column])
            text = "–" if math.isnan(value) else form.format(factor * value)
            if f"{column}_low" in summary and not math.isnan(value):
                low, high = (form.format(factor * float(row[f"{column}_{end}"])) for end in ("low", "high"))
                text += f"<small>{low} to {high}</small>"
            cells.append(f"<td>{text}</td>")
        kind = ' class="control"' if row["method"] in controls else ""
        rows.append(f'<tr{kind}><th scope="row">{escape(str(row["method"]))}</th>{"".join(cells)}</tr>')
    meanings = "; ".join(f"<b>{escape(row[1])}</b> {escape(row[4])}" for row in shown)
    return (
        f'<div class="scroll"><table><caption>{n} studies that had no part in choosing latents or strength, with 95 % '
        f"intervals. As wanted without steering: {100 * before:.0f} %{surprise}.</caption>"
        f'<thead><tr><th scope="col">method</th><th scope="col">strength</th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="faint">{meanings}.</p>'
    )


def _figure(file: Path) -> str:
    if not file.is_file():
        return '<p class="faint">The run saved no figure.</p>'
    return (
        f'<img class="figure" src="{_data(file.read_bytes())}" alt="On-target and off-target effect by strength, a '
        'line per method">'
    )


def _reports(reported: pd.DataFrame, studies: Sequence[Study] | None, options: PageOptions) -> str:
    # Half of them where it worked and half where it did not, so that the page is not biased towards successes.
    worked = reported[reported.on_target > 0]
    failed = reported[reported.on_target == 0]
    half = options.reports // 2
    n_failed = min(len(failed), max(half, options.reports - len(worked)))
    picked = pd.concat([worked.head(options.reports - n_failed), failed.head(n_failed)])
    parts = [
        f'<p class="faint">{len(picked)} of {len(reported)}: the first with the wanted effect and the first without '
        f"it ({len(worked)} and {len(failed)} in all). Struck out: words removed; bold: words added.</p>"
    ]
    for row in picked.to_dict("records"):
        study = studies[int(row["study"])] if studies is not None else None
        parts.append(_pair(row, study, options.credentialed))
    return "\n".join(parts)


def _pair(row: dict[Any, Any], study: Study | None, credentialed: bool) -> str:
    free = credentialed or (study is not None and is_shareable(study.licence))
    name = study.study_id if free and study is not None else f"study {int(row['study'])} of the half"
    facts = [
        "as wanted" if row["on_target"] else "not as wanted",
        f"{100 * row['off_target']:.0f} % of other labels changed",
        f"KL {row['kl']:.3f}",
    ]
    if not math.isnan(row.get("perplexity", math.nan)):
        facts.append(f"perplexity {row['perplexity']:.2f}")
    head = f'<h3>{escape(name)} <span class="faint">{escape(", ".join(facts))}</span></h3>'
    if not free:
        return (
            f'<article>{head}<div class="image withheld">credentialed image, not shown</div><p class="faint">The text '
            "of a credentialed study is not shown. PageOptions(credentialed=True) "
            "shows it, for a page that stays on this machine.</p></article>"
        )
    before, after = compare_words(str(row["unsteered"]), str(row["text"]))
    columns = "".join(
        f'<div><h4>{label}</h4><p class="report">{_marked(pieces, tag)}</p></div>'
        for label, pieces, tag in (("unsteered", before, "del"), ("steered", after, "ins"))
    )
    return f"<article>{head}{_image(study)}{columns}</article>"


def _marked(pieces: Sequence[Piece], tag: str) -> str:
    found = []
    for piece in pieces:
        words = piece.text.lstrip()
        lead = piece.text[: len(piece.text) - len(words)]
        found.append(
            f"{lead}<{tag}>{escape(words)}</{tag}>" if piece.marked and words else escape(piece.text)
        )
    return "".join(found)


def _image(study: Study | None) -> str:
    if study is None or study.frontal is None:
        return '<div class="image withheld">no image</div>'
    square, _ = centre_crop(study.frontal, (), IMAGE_SIDE)
    buffer = io.BytesIO()
    square.save(buffer, format="PNG")
    return f'<img class="image" src="{_data(buffer.getvalue())}" alt="frontal image of {escape(study.study_id)}">'


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

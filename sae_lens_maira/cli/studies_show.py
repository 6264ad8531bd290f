"""The command `studies show`: contents of a table, one of its studies, and a figure of its images.

Prevalence of observations comes from `rule_labels` of a sample of reports, with Wilson's interval. It counts what
reports mention, which is not the same as what patients have. Texts and images are shown on this machine only.
"""

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_maira.io import save_figure

if TYPE_CHECKING:
    from sae_lens_maira.studies import Study, StudyTable


def show(
    table: Path,
    root: Path | None = None,
    study: str | None = None,
    figure: Path | None = None,
    labels: int = 2000,
    shown: int = 12,
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Show the contents of a table of studies: splits, views, licences, sections, priors, and findings of reports.

    Example: sae-lens-maira studies show --table studies.parquet --figure studies.png

    Args:
        table: Parquet or CSV.
        root: Folder that image paths are relative to; the table's folder if not given.
        study: Id of one study to show instead, with its text and rule labels.
        figure: PNG file for a figure: the images of the study, or the frontal images of a sample.
        labels: Number of randomly chosen reports whose rule labels are counted; 0 for none.
        shown: Number of images in the figure of a sample.
        seed: Random seed of the samples.
        as_json: Print JSON instead of text.
    """
    from sae_lens_maira.cli.studies import open_table
    from sae_lens_maira.errors import StudyError

    opened = open_table(table, root)
    if study is None:
        facts = opened.counts() | {"rule_labels": prevalence(opened, labels, seed)}
        sys.stdout.write(json.dumps(facts) + "\n" if as_json else _overview(facts, table))
        if figure is not None:
            draw_frontals(_sample(opened, shown, seed), figure)
        return
    found = opened.where(study_id=study)
    if not len(found):
        raise StudyError(
            f"{table} has no study {study!r}; its first ids are "
            f"{', '.join(opened.frame['study_id'].head(5))}. Give one of its ids."
        )
    row = next(found.rows())
    labelled = _labels(row["report"] or "")
    if as_json:
        sys.stdout.write(json.dumps(row | {"rule_labels": labelled}) + "\n")
    else:
        sys.stdout.write(_one(row, labelled))
    if figure is not None:
        draw_study(found.studies[0], figure)


def prevalence(table: "StudyTable", n: int, seed: int) -> dict[str, Any]:
    """Count observations in a sample of reports.

    Args:
        table: Table of studies.
        n: Number of reports to sample; all if there are fewer.
        seed: Random seed of the sample.

    Returns:
        {"n": reports read, observation: {"present", "uncertain", "absent": counts, "low", "high": 95 % Wilson interval
        of the share of reports that state it as present}}.
    """
    import numpy as np
    from tqdm.auto import tqdm

    from sae_lens_maira.stats import wilson
    from sae_lens_maira.studies.labels import RuleStatus, rule_labels
    from sae_lens_maira.studies.phrases import OBSERVATIONS

    reports = table.frame["report"].dropna()
    drawn = np.random.default_rng(seed).permutation(len(reports))[:n]
    counts = {name: dict.fromkeys((status.value for status in RuleStatus), 0) for name in OBSERVATIONS}
    for text in tqdm(reports.to_numpy()[drawn], unit="report", desc="rule labels", disable=not len(drawn)):
        for name, label in rule_labels(text).items():
            counts[name][label.status.value] += 1
    unknown = counts["no_finding"]["unknown"]  # not English, or without a statement: left out of all rates
    read = len(drawn) - unknown
    facts: dict[str, Any] = {"n": read, "unknown": unknown}
    if read:
        for name, count in counts.items():
            low, high = wilson(count["present"], read)
            facts[name] = count | {"low": low, "high": high}
    return facts


def _labels(report: str) -> dict[str, dict[str, str]]:
    from sae_lens_maira.studies.labels import rule_labels

    return {
        name: {"status": label.status.value, "evidence": label.evidence}
        for name, label in rule_labels(report).items()
    }


def _overview(facts: dict[str, Any], table: Path) -> str:
    lines = [f"{table}: {facts['studies']:,} studies of {facts['patients']:,} patients"]
    filled = [
        name
        for name, value in facts.items()
        if isinstance(value, int) and name not in ("studies", "patients")
    ]
    lines += [f"  with {name:14} {facts[name]:9,}" for name in filled]
    for name in ("split", "view", "licence"):
        lines.append(f"  {name}: " + ", ".join(f"{key} {count:,}" for key, count in facts[name].items()))
    labels = facts["rule_labels"]
    if labels["n"]:
        lines.append(f"rule labels of {labels['n']:,} reports (present with 95 % Wilson interval):")
        lines.append(f"  {'observation':26} {'present':>8} {'uncertain':>9} {'absent':>7}  share present")
        for name, count in labels.items():
            if name not in ("n", "unknown"):
                share = f"{count['present'] / labels['n']:.3f} ({count['low']:.3f} to {count['high']:.3f})"
                lines.append(
                    f"  {name:26} {count['present']:8} {count['uncertain']:9} {count['absent']:7}  {share}"
                )
    return "\n".join(lines) + "\n"


def _one(row: dict[str, str | None], labels: dict[str, dict[str, str]]) -> str:
    lines = []
    for name, value in row.items():
        if value is not None:
            lines += textwrap.wrap(f"{name}: {value}", 110, subsequent_indent="    ")
    lines.append("rule labels of the report:")
    lines += [f"  {name}: {label['status']} ({label['evidence']})" for name, label in labels.items()]
    return "\n".join(lines) + "\n"


def _sample(table: "StudyTable", n: int, seed: int) -> "list[Study]":
    import numpy as np

    rows = np.flatnonzero(table.frame["frontal"].notna())
    studies = table.studies
    return [studies[int(row)] for row in np.sort(np.random.default_rng(seed).permutation(rows)[:n])]


def draw_frontals(studies: "Sequence[Study]", file: Path) -> None:
    """Draw frontal images side by side, with study ids and the observations that the reports state as present.

    Raises:
        StudyError: No study has a frontal image.
        ImageError: An image cannot be read.
    """
    from matplotlib.figure import Figure

    from sae_lens_maira.errors import StudyError
    from sae_lens_maira.studies.labels import present_observations

    if not studies:
        raise StudyError(
            "No study has a frontal image, so there is nothing to draw. Give the table's images."
        )
    columns = min(len(studies), 4)
    rows = -(-len(studies) // columns)
    canvas = Figure(figsize=(3 * columns, 3.6 * rows), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, study in zip(axes.flat, studies, strict=False):
        stated = ", ".join(sorted(present_observations([study.report or ""])[0])).replace("_", " ")
        _draw_image(axis, study.frontal, f"{study.study_id}\n{textwrap.fill(stated, 34)}")
    _save(canvas, file)


def draw_study(study: "Study", file: Path) -> None:
    """Draw all images of one study next to its text. Raises StudyError without an image, ImageError for a bad one."""
    from matplotlib.figure import Figure

    from sae_lens_maira.errors import StudyError

    named = {"frontal": study.frontal, "lateral": study.lateral, "prior frontal": study.prior_frontal}
    images = {name: image for name, image in named.items() if image is not None}
    if not images:
        raise StudyError(f"Study {study.study_id} has no image to draw; give the table's images.")
    canvas = Figure(figsize=(3.4 * len(images) + 4.6, 4.2), layout="constrained")
    ratios = [3.4] * len(images) + [4.6]
    axes = canvas.subplots(1, len(images) + 1, squeeze=False, width_ratios=ratios)[0]
    for axis, (name, image) in zip(axes, images.items(), strict=False):
        axis.axis("off")
        _draw_image(axis, image, name)
    axes[-1].axis("off")
    sections = ("indication", "technique", "comparison", "report")
    facts = [f"{name.upper()}: {text}" for name in sections if (text := getattr(study, name))]
    text = "\n\n".join(textwrap.fill(part, 58) for part in facts)
    text = text.replace("$", r"\$")  # matplotlib would read it as mathematics
    axes[-1].text(
        0, 1, f"{study.study_id} ({study.licence.value})\n\n{text}", va="top", fontsize=8, wrap=False
    )
    _save(canvas, file)


def _draw_image(axis: Any, image: Any, title: str) -> None:
    from sae_lens_maira.maira2.images import read_grey, stretch_contrast

    axis.imshow(stretch_contrast(read_grey(image)), cmap="gray", vmin=0, vmax=255)
    axis.set_title(title.replace("$", r"\$"), fontsize=8)


def _save(canvas: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_figure(canvas, file, dpi=110)
    sys.stderr.write(f"drew {file}\n")

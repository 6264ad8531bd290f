"""Measure the phantom: greedy reports of held-out studies against the known truth.

Accuracy of a finding is the share of studies in which the report mentions it present exactly when it is present.
Change accuracy is the share of stated-in-truth changes (new, larger, ...) that the report states alike. A grounded
box counts by its best overlap (IoU) with the truth, averaged over true boxes; a missing box counts 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_lens_maira.maira2 import Maira2, generate_reports
from sae_lens_maira.phantom.reading import read_report
from sae_lens_maira.phantom.sampling import FINDING_KEYS
from sae_lens_maira.studies import Study

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class PhantomScore:
    """Scores of one model on held-out studies.

    Attributes:
        n: Studies read.
        accuracy: Per finding key, share of studies read correctly.
        positives: Per finding key, studies in which it is present.
        change_accuracy: Share of true changes stated correctly.
        n_changes: True changes.
        box_iou: Mean overlap of true boxes with the best box that the grounded report gives that finding's side.
        n_boxes: True boxes.
        complete: Share of reports that ended by themselves.
    """

    n: int
    accuracy: dict[str, float]
    positives: dict[str, int]
    change_accuracy: float
    n_changes: int
    box_iou: float
    n_boxes: int
    complete: float

    @property
    def mean_accuracy(self) -> float:
        return float(np.mean(list(self.accuracy.values())))

    def to_frame(self) -> pd.DataFrame:
        """One row per finding: accuracy and number of positive studies."""
        return pd.DataFrame({"accuracy": self.accuracy, "positives": self.positives}).rename_axis("finding")


def measure(
    maira: Maira2,
    studies: Sequence[Study],
    batch_size: int = 50,
    grounded: bool = True,
    progress: bool = True,
) -> PhantomScore:
    """Generate greedily for every study and compare with its truth.

    Args:
        maira: Model and processor.
        studies: Phantom studies that carry their truth.
        batch_size: Studies per generated batch.
        grounded: Also generate grounded reports and score their boxes.
        progress: Show a progress bar.

    Returns:
        The scores.
    """
    hits = np.zeros(len(FINDING_KEYS), dtype=int)
    positives = np.zeros(len(FINDING_KEYS), dtype=int)
    changes, overlaps, complete = [], [], []
    starts = tqdm(
        range(0, len(studies), batch_size), desc="reading studies", unit="batch", disable=not progress
    )
    for start in starts:
        part = studies[start : start + batch_size]
        reports = generate_reports(maira.model, maira.processor, part, task="findings")
        boxed = generate_reports(maira.model, maira.processor, part, task="grounded") if grounded else None
        for row, (study, report) in enumerate(zip(part, reports, strict=True)):
            labels = read_report(report.text)
            complete.append(report.complete)
            truth = {f.key for f in study.truth or () if f.present}
            for column, key in enumerate(FINDING_KEYS):
                positives[column] += key in truth
                hits[column] += (key in labels.present) == (key in truth)
            changes += [
                labels.changes.get(f.key) == f.change for f in study.truth or () if f.change is not None
            ]
            if boxed is not None:
                overlaps += box_overlaps(study, [(item.text, item.boxes) for item in boxed[row].findings])
    n = len(studies)
    return PhantomScore(
        n=n,
        accuracy=dict(zip(FINDING_KEYS, (hits / n).round(4).tolist(), strict=True)),
        positives=dict(zip(FINDING_KEYS, positives.tolist(), strict=True)),
        change_accuracy=float(np.mean(changes)) if changes else float("nan"),
        n_changes=len(changes),
        box_iou=float(np.mean(overlaps)) if overlaps else float("nan"),
        n_boxes=len(overlaps),
        complete=float(np.mean(complete)),
    )


def box_overlaps(study: Study, statements: Sequence[tuple[str, Sequence[Box]]]) -> list[float]:
    """For every true box, the best IoU among the boxes of statements that name its finding (0 if none does)."""
    named = [(read_report(text).present, boxes) for text, boxes in statements]
    overlaps = []
    for finding in study.truth or ():
        if finding.present and finding.box is not None:
            candidates = [box for present, boxes in named if finding.key in present for box in boxes]
            overlaps.append(max((iou(finding.box, box) for box in candidates), default=0.0))
    return overlaps


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x_min, y_min, x_max, y_max)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / area if area > 0 else 0.0

"""Compare where an image latent fires with the boxes of a finding.

Per study with a boxed finding, with activations a_p at the patches of the frontal image and the share c_p of patch p
that its boxes cover:

    pointing   1 if the strongest patch touches a box, else 0; shared equally among patches of equal strength
    energy     sum a_p c_p / sum a_p
    IoU        sum min(m_p, c_p) / sum max(m_p, c_p),   m_p = 1 where a_p > t, else 0

A study in which the latent does not fire counts as 0. The threshold t of the IoU is selected on one half of the
patients, and all three scores are reported on the other half. The control is the same latent's map from another study
with the finding: for a latent that always fires at the usual place of the finding, it scores the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.agreement import split_by_patient
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.stats import bootstrap_mean

if TYPE_CHECKING:
    from sae_lens_maira.studies import FindingReader, Study

Box = tuple[float, float, float, float]
MEASURES = ("pointing", "energy", "iou")
_SHARES = np.arange(0, 1, 0.05)


@dataclass(frozen=True)
class SpatialScores:
    """Spatial scores of one latent and one finding on the reporting half.

    Attributes:
        threshold: Activation above which a patch belongs to the map, selected on the other half.
        values: (n, 3) pointing, energy and IoU per study, for paired comparisons.
        elsewhere: (n, 3) the same scores with the latent's map from another study with the finding (the control).
        fired: (n,) whether the latent fires in the study.
    """

    threshold: float
    values: np.ndarray
    elsewhere: np.ndarray
    fired: np.ndarray

    def summary(self, seed: int = 0) -> dict[str, float]:
        """Means with 95 % bootstrap intervals over studies, the control's means and the paired differences."""
        found: dict[str, float] = {"n": len(self.values), "fired": float(self.fired.mean())}
        for name, sample in (("", self.values), ("elsewhere_", self.elsewhere)):
            found |= {f"{name}{m}": float(v) for m, v in zip(MEASURES, sample.mean(0), strict=True)}
        for name, sample in (("", self.values), ("gain_", self.values - self.elsewhere)):
            interval = bootstrap_mean(sample, seed=seed)
            for i, measure in enumerate(MEASURES):
                found |= {f"{name}{measure}_low": float(interval.low[i])}
                found |= {f"{name}{measure}_high": float(interval.high[i])}
        return found


def covered(boxes: Sequence[Box], grid: tuple[int, int], oversample: int = 8) -> np.ndarray:
    """(rows * cols,) share of each patch that one or more boxes (x_min, y_min, x_max, y_max) cover.

    Args:
        boxes: Boxes in 0..1 of the image.
        grid: Rows and columns of patches.
        oversample: Number of sample points per patch and axis; a box smaller than their distance counts at its centre.
    """
    rows, cols = grid
    y = (np.arange(rows * oversample) + 0.5) / (rows * oversample)
    x = (np.arange(cols * oversample) + 0.5) / (cols * oversample)
    inside = np.zeros((len(y), len(x)), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        tall, wide = (y >= y0) & (y < y1), (x >= x0) & (x < x1)
        if not tall.any():
            tall[min(int((y0 + y1) / 2 * len(y)), len(y) - 1)] = True
        if not wide.any():
            wide[min(int((x0 + x1) / 2 * len(x)), len(x) - 1)] = True
        inside |= tall[:, None] & wide[None]
    return inside.reshape(rows, oversample, cols, oversample).mean((1, 3)).ravel()


def spatial_scores(maps: np.ndarray, cover: np.ndarray, choose: np.ndarray) -> SpatialScores:
    """Score a latent's maps against a finding's boxes.

    Args:
        maps: (n, P) activations at the frontal patches of n studies that have the finding.
        cover: (n, P) share of each patch inside the boxes, as `covered` gives it.
        choose: (n,) True in the half on which the threshold is chosen.

    Raises:
        RecordError: A half has too few studies, a study has no box, or the shapes differ.
    """
    n = len(maps)
    if maps.shape != cover.shape or choose.shape != (n,):
        raise RecordError(
            f"The shapes of maps {maps.shape}, boxes {cover.shape} and halves {choose.shape} differ; give one map and "
            "one set of boxes per study, on one grid."
        )
    if not choose.any() or (~choose).sum() < 2:
        raise RecordError(
            f"The selection half has {int(choose.sum())} studies and the other {int((~choose).sum())}; spatial scores "
            "need one and two or more with a box of the finding. Read more studies."
        )
    if not (cover.sum(1) > 0).all():
        raise RecordError("A study has no box of the finding; leave it out.")
    thresholds = _SHARES * maps[choose].max()
    ious = [_iou(maps[choose], cover[choose], t).mean() for t in thresholds]
    threshold = float(thresholds[int(np.argmax(ious))])
    reported, boxes = maps[~choose], cover[~choose]
    other = np.roll(reported, 1, axis=0)
    return SpatialScores(
        threshold,
        _measures(reported, boxes, threshold),
        _measures(other, boxes, threshold),
        reported.max(1) > 0,
    )


def spatial_of_records(
    records: RecordSet, best: Mapping[str, int] | None = None, seed: int = 0
) -> pd.DataFrame:
    """Compute spatial scores of image latents from their recorded contexts.

    Only contexts of studies with a box of the finding are used. The scores therefore describe the studies that the
    records sampled: those of largest activation, some of every octave, and some in which the latent does not fire.

    Args:
        records: Latent records with boxes.
        best: Finding -> latent; None for the latent with the highest F1 at image positions for each finding.
        seed: Random seed of the halves by patient and of the intervals.

    Returns:
        One row per finding that could be scored: finding, latent, f1 and `SpatialScores.summary`.
    """
    boxes: dict[tuple[str, str], list[Box]] = {}
    for study in records.studies.values():
        for name, *box in study.boxes:
            boxes.setdefault((study.study, name), []).append((box[0], box[1], box[2], box[3]))
    if not boxes or len({study.patient for study in records.studies.values()}) < 2:
        return pd.DataFrame()
    infos = list(records.studies.values())
    halves = split_by_patient([info.patient for info in infos], seed)
    choosing = {info.study for info, mine in zip(infos, halves.choose.tolist(), strict=True) if mine}
    rows = []
    for finding, latent in (_best_of(records) if best is None else dict(best)).items():
        record = records[latent]
        contexts = [*record.top, *(c for i in record.intervals for c in i.contexts), *record.zero]
        own = {c.study: c for c in contexts if (c.study, finding) in boxes}
        maps, cover, choose = [], [], []
        for study, context in own.items():
            frontal = next((m for m in context.maps if m.view == "frontal"), None)
            if frontal is None:
                continue
            values = np.zeros(frontal.rows * frontal.cols)
            values[list(frontal.patches)] = frontal.values
            maps.append(values)
            cover.append(covered(boxes[study, finding], (frontal.rows, frontal.cols)))
            choose.append(study in choosing)
        if sum(choose) < 1 or len(choose) - sum(choose) < 2:
            continue
        scores = spatial_scores(np.stack(maps), np.stack(cover), np.array(choose))
        agreed = [a.f1 for a in record.agreement if (a.finding, a.modality) == (finding, "image")]
        rows.append(
            {"finding": finding, "latent": latent, "f1": max(agreed, default=np.nan)} | scores.summary(seed)
        )
    return pd.DataFrame(rows)


def grounded_boxes(study: Study, reader: FindingReader) -> dict[str, tuple[Box, ...]]:
    """Read boxes by finding from a study's grounded report, for studies whose truth has no boxes.

    Args:
        study: Study with a `grounded_report`, for instance one that MAIRA-2 generated.
        reader: Reader of the findings that a statement names.
    """
    found: dict[str, tuple[Box, ...]] = {}
    for statement in study.grounded_report or ():
        for name in reader.read(statement.text) if statement.boxes else ():
            found[name] = (*found.get(name, ()), *statement.boxes)
    return found


def _best_of(records: RecordSet) -> dict[str, int]:
    best: dict[str, tuple[float, int]] = {}
    for record in records.stream():
        for a in record.agreement:
            if a.modality == "image" and a.f1 > best.get(a.finding, (0.0, 0))[0]:
                best[a.finding] = (a.f1, record.latent)
    return {finding: best[finding][1] for finding in records.meta.findings if finding in best}


def _iou(maps: np.ndarray, cover: np.ndarray, threshold: float) -> np.ndarray:
    on = maps > threshold
    return np.minimum(on, cover).sum(1) / np.maximum(on, cover).sum(1)


def _measures(maps: np.ndarray, cover: np.ndarray, threshold: float) -> np.ndarray:
    """(n, 3) pointing, energy and IoU."""
    total = maps.sum(1)
    peak = (maps == maps.max(1, keepdims=True)) & (maps > 0)
    pointing = (peak & (cover > 0)).sum(1) / np.maximum(peak.sum(1), 1)
    energy = np.divide((maps * cover).sum(1), total, out=np.zeros(len(maps)), where=total > 0)
    return np.stack([pointing, energy, _iou(maps, cover, threshold)], 1)


def by_study(values: Any, study: np.ndarray, patch: np.ndarray, n_studies: int, patches: int) -> np.ndarray:
    """(n_studies, patches) maps from activations (n,) of rows at `patch` of `study`."""
    maps = np.zeros((n_studies, patches))
    maps[study, patch] = values
    return maps

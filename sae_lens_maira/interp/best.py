"""Select the best latent of each finding on train patients, and report its scores on the other patients.

    agreement(latent, finding) = (share of active studies with the finding + share of silent studies without it) / 2

over the latent's train examples. Latents are ranked by the lower 95 % limit, so that rare latents do not win by
chance. The selection uses no explanation and no test patient. For the selected latent the table reports whether its
explanation names the finding, and its detection score on test patients with the shuffled control. Record sets of
controls (an untrained SAE, raw dimensions) are treated in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.examples import Example, split_examples, train_patients
from sae_lens_maira.interp.offline import EXPLAINER, name_and_side, named_findings
from sae_lens_maira.interp.records import Interpretation, Score, load
from sae_lens_maira.io import save_figure
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.stats import bootstrap_mean, wilson_arrays


@dataclass(frozen=True)
class Best:
    """Best latent of one finding.

    Attributes:
        finding: Finding key.
        place: Name of the record set that contains the latent.
        latent: Latent number.
        agreement, low: Agreement with the finding on train examples, and its lower 95 % limit, by which latents are
            ranked.
        n: Number of train examples.
        interpretation: Interpretation of the latent; None where it has none.
        named: Whether the explanation names the finding, and its side if it states one.
        exact: Whether the explanation names this finding and no other.
    """

    finding: str
    place: str
    latent: int
    agreement: float
    low: float
    n: int
    interpretation: Interpretation | None
    named: bool
    exact: bool

    @property
    def detection(self) -> Score | None:
        """Detection score by the known findings on test patients."""
        return _by_truth(self.interpretation.scores) if self.interpretation else None

    @property
    def control(self) -> Score | None:
        """Detection score with another latent's explanation."""
        return _by_truth(self.interpretation.control) if self.interpretation else None


def best_latents(
    places: Mapping[str, Path | str], seed: int = 0, least: int = 5, explainer: str = EXPLAINER
) -> list[Best]:
    """Select the best latent of every finding over one or more record sets.

    Args:
        places: Name, such as "text" or "image" -> folder of an interpreted record set; all of one model.
        seed: Random seed of the split by patient; use that of the interpretations.
        least: Smallest number of active and of silent train examples.
        explainer: Explainer whose interpretations are read.

    Raises:
        RecordError: The sets have different findings, or a set has no interpretation by that explainer.
    """
    sets = {name: RecordSet.open(folder) for name, folder in places.items()}
    keys = next(iter(sets.values())).meta.findings
    best: dict[str, tuple[float, float, str, int, int]] = {}
    for name, records in sets.items():
        if records.meta.findings != keys:
            raise RecordError(
                f"{records.folder} measures other findings than {next(iter(sets.values())).folder}; give record sets "
                "of the same findings."
            )
        train = train_patients(records.studies.values(), seed)
        for record in records.stream():
            examples = split_examples(record, records.studies, train).train
            values, lows = agreement(examples, keys, least)
            for key, value, low in zip(keys, values.tolist(), lows.tolist(), strict=True):
                if low > best.get(key, (0.0,))[0]:
                    best[key] = (low, value, name, record.latent, len(examples))
    interpretations = {name: _interpretations(records, explainer) for name, records in sets.items()}
    found = []
    for key, (low, value, name, latent, n) in best.items():
        one = interpretations[name].get(latent)
        named = named_findings(one.explanation or "", keys) if one else frozenset()
        found.append(Best(key, name, latent, value, low, n, one, key in named, _exact(key, named)))
    return sorted(found, key=lambda b: keys.index(b.finding))


def agreement(
    examples: Sequence[Example], keys: Sequence[str], least: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """(F,) agreement of a latent with each finding, and its lower 95 % limit; 0 if there are too few examples."""
    active = np.array([e.active for e in examples], dtype=bool)
    n_active, n_silent = int(active.sum()), int((~active).sum())
    if min(n_active, n_silent) < least:
        return np.zeros(len(keys)), np.zeros(len(keys))
    present = np.array([[key in e.study.findings for key in keys] for e in examples], dtype=bool)
    with_it, without = present[active].sum(0), (~present[~active]).sum(0)
    sensitivity, specificity = with_it / n_active, without / n_silent
    value = (sensitivity + specificity) / 2
    below = np.hypot(
        sensitivity - wilson_arrays(with_it, np.full(len(keys), n_active))[0],
        specificity - wilson_arrays(without, np.full(len(keys), n_silent))[0],
    )
    return value, value - below / 2


def best_table(best: Sequence[Best]) -> pd.DataFrame:
    """Make a table of one row per finding."""
    return pd.DataFrame(
        [
            {
                "finding": b.finding,
                "place": b.place,
                "latent": b.latent,
                "train": b.agreement,
                "named": b.named,
                "exact": b.exact,
                "detection": b.detection.balanced_accuracy if b.detection else None,
                "low": b.detection.low if b.detection else None,
                "high": b.detection.high if b.detection else None,
                "n": b.detection.answered if b.detection else 0,
                "control": b.control.balanced_accuracy if b.control else None,
                "explanation": b.interpretation.explanation if b.interpretation else None,
            }
            for b in best
        ]
    )


def paired_detection(table: pd.DataFrame, control: pd.DataFrame) -> tuple[float, float, float, int] | None:
    """Mean difference of detection over findings that both name, its 95 % bootstrap interval, and their number.

    Args:
        table: `best_table` of the SAE.
        control: `best_table` of a control.

    Returns:
        The four numbers; None if both name fewer than two findings.
    """
    own, other = (
        frame.loc[frame["named"]].set_index("finding")["detection"].dropna() for frame in (table, control)
    )
    difference = (own - other).dropna().to_numpy(dtype=float)
    if len(difference) < 2:
        return None
    interval = bootstrap_mean(difference)
    return float(difference.mean()), float(interval.low), float(interval.high), len(difference)


def write_best_figure(sets: Mapping[str, Sequence[Best]], path: Path | str) -> None:
    """Draw detection per finding as PNG: a dot with its 95 % interval per set, and the first set's shuffled control.

    Args:
        sets: Name -> best latents; the first set is the reported one, the others are controls.
        path: Path of the PNG.

    Raises:
        RecordError: The first set has no score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(sets))
    rows = [b.finding for b in sets[first]]
    if not any(b.detection for b in sets[first]):
        raise RecordError(
            f"No best latent of {first} has a detection score, so there is nothing to draw. Run "
            "`sae-lens-maira interpret run` on its record sets first."
        )
    figure = Figure(figsize=(7.5, 0.42 * len(rows) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, best) in enumerate(sets.items()):
        kept = [b for b in best if b.detection and b.detection.balanced_accuracy is not None and b.named]
        scores = [b.detection for b in kept if b.detection]
        values = np.array([s.balanced_accuracy for s in scores], dtype=float)
        spread = np.array([[s.balanced_accuracy or 0, s.low or 0, s.high or 1] for s in scores]).reshape(
            -1, 3
        )
        y = np.array([rows.index(b.finding) for b in kept]) + 0.16 * number - 0.16
        error = np.stack([spread[:, 0] - spread[:, 1], spread[:, 2] - spread[:, 0]])
        mean = f", mean {values.mean():.2f}" if len(values) else ""
        label = f"{name} ({len(kept)} of {len(rows)} named{mean})"
        axes.errorbar(values, y, xerr=error, fmt="o", markersize=4, linewidth=1, label=label)
    shuffled = [(b.finding, b.control.balanced_accuracy) for b in sets[first] if b.control and b.named]
    axes.scatter(
        np.array([value for _, value in shuffled], dtype=float),
        [rows.index(finding) for finding, _ in shuffled],
        marker="x",
        color="0.4",
        s=18,
        label="shuffled explanations",
    )
    axes.axvline(0.5, color="0.5", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [" ".join(filter(None, reversed(name_and_side(row)))) for row in rows])
    axes.set(xlabel="balanced accuracy of detection on unseen patients", xlim=(0, 1.02))
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="lower left")
    save_figure(figure, path, dpi=150, metadata={"Software": None})


def _interpretations(records: RecordSet, explainer: str) -> dict[int, Interpretation]:
    found = {one.latent: one for one in load(records.folder) if one.explainer == explainer}
    if not found:
        raise RecordError(
            f"{records.folder} has no interpretation by {explainer!r}; run `sae-lens-maira interpret run` on it first."
        )
    return found


def _exact(key: str, named: frozenset[str]) -> bool:
    """Whether only this finding is named; if its key has no side, both sides count as one finding."""
    return key in named and len({name_and_side(other)[0] for other in named}) == 1


def _by_truth(scores: Sequence[Score]) -> Score | None:
    return next((s for s in scores if (s.method, s.judge) == ("detection", "truth")), None)

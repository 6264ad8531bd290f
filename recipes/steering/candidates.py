"""Choose the latent map that inserts a finding: try candidates on studies of the selection half, keep the best.

    kept = argmax over candidates and strengths of   on target - off target - 2 max(0, off target - 0.06)

Candidates are the mean map of all studies with the finding, the map of an exemplar (one study), and the mean map of a
few exemplars, each restricted to several regions. Exemplars are studies of the selection half that state the finding
and few others. Studies of the reporting half are not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from sae_lens_maira.steering.cohort import Cohort
from sae_lens_maira.steering.maps import LatentMap, boxes_place, exemplar_map
from sae_lens_maira.steering.methods import EXEMPLAR, MAPS, POOLED, MethodFactory
from sae_lens_maira.steering.prompts import Job
from sae_lens_maira.steering.statistics import encoder_of

ALLOWED = 0.06
"""Share of changed other labels above which each further change counts three times."""
MARGINS: tuple[int | None, ...] = (0, 1, None)
"""Number of patches around an exemplar's boxes; None for the whole image."""
SCREENED_AT = 2.0
STRENGTHS = {MAPS: (1.5, 2.0, 3.0), EXEMPLAR: (1.5, 2.0, 3.0), POOLED: (1.5, 2.5)}
POOLS = (2, 4)
"""Number of exemplars in a mean."""
FINALISTS = 2
"""Number of single-exemplar maps that pass the screening."""


@dataclass(frozen=True)
class Candidate:
    """Candidate map and its origin.

    Attributes:
        kind: `MAPS`, `EXEMPLAR` or `POOLED`.
        place: Boxes, boxes and patches around, usual place, or whole image.
        studies: Indices of the exemplars; empty for the mean of all studies.
        map: Map that is added.
    """

    kind: str
    place: str
    studies: tuple[int, ...]
    map: LatentMap


@dataclass(frozen=True)
class Trial:
    """Candidate at one strength on studies of the selection half; shares as in `evaluate_steering`."""

    candidate: Candidate
    strength: float
    on_target: float
    off_target: float

    @property
    def gain(self) -> float:
        """Quantity that the selection maximises."""
        return self.on_target - self.off_target - 2 * max(0.0, self.off_target - ALLOWED)


@dataclass(frozen=True)
class Choice:
    """All trials on the same studies of the selection half.

    Attributes:
        trials: Every screened candidate at every strength.
        n: Number of studies of a trial.
    """

    trials: tuple[Trial, ...]
    n: int

    def best(self, kind: str | None = None) -> Trial:
        """Trial of largest gain, of one kind of candidate or of all; of equal ones the weakest, then the first."""
        mine = [trial for trial in self.trials if kind in (None, trial.candidate.kind)]
        return max(mine, key=lambda trial: (trial.gain, -trial.strength))

    def table(self) -> pd.DataFrame:
        """Table of one row per trial, with a mark for the selected one."""
        kept = self.best()
        return pd.DataFrame(
            {
                "kind": trial.candidate.kind,
                "place": trial.candidate.place,
                "exemplars": " ".join(map(str, trial.candidate.studies)),
                "latents": len(trial.candidate.map.latents),
                "strength": trial.strength,
                "n": self.n,
                "on_target": trial.on_target,
                "off_target": trial.off_target,
                "gain": trial.gain,
                "kept": trial is kept,
            }
            for trial in self.trials
        )


def choose_map(
    factory: MethodFactory,
    cohort: Cohort,
    finding: str,
    which: Sequence[int],
    n_exemplars: int = 6,
    screened_on: int = 8,
) -> Choice:
    """Try maps of a finding on studies of the selection half without it.

    Every exemplar is screened in every region on the first few studies. The best maps of one exemplar, means over the
    best exemplars and the mean map of all studies are then tried at several strengths on all of these studies.

    Args:
        factory: SAE and statistics.
        cohort: Studies and their prompts.
        finding: Name of the finding.
        which: Indices of studies of the selection half without the finding.
        n_exemplars: Number of studies with it that are screened, those with fewest findings.
        screened_on: Number of studies of the screening.

    Raises:
        InterventionError: Fewer than 4 studies of the selection half have and state the finding.
    """
    numbers = cohort.pick("choose", [finding], [], len(cohort.prompts))
    crowd = {i: sum(item.present for item in cohort.study(i).truth or ()) for i in numbers}
    exemplars = sorted(numbers, key=lambda i: (crowd[i], i))[:n_exemplars]
    singles = [_shown(factory, cohort, finding, (i,), margin) for i in exemplars for margin in MARGINS]
    singles = [candidate for candidate in singles if candidate is not None]
    screened = try_maps(factory, cohort, finding, [(c, SCREENED_AT) for c in singles], which[:screened_on])
    screened.sort(key=lambda trial: -trial.gain)
    # Exemplars, ordered by the gain of their best map.
    order = list(dict.fromkeys(trial.candidate.studies[0] for trial in screened))
    finalists = [trial.candidate for trial in screened[:FINALISTS]]
    pools = [_shown(factory, cohort, finding, tuple(order[:n]), m) for n in POOLS for m in MARGINS[1:]]
    finalists += [pool for pool in pools if pool is not None]
    finalists += _means(factory, finding)
    wanted = [(c, strength) for c in finalists for strength in STRENGTHS[c.kind]]
    return Choice(tuple(try_maps(factory, cohort, finding, wanted, which)), len(which))


def try_maps(
    factory: MethodFactory,
    cohort: Cohort,
    finding: str,
    wanted: Sequence[tuple[Candidate, float]],
    which: Sequence[int],
) -> list[Trial]:
    """Steer the same studies with every candidate at its strength, and count findings."""
    jobs = [Job(which, candidate.map.interventions(strength)) for candidate, strength in wanted]
    written = cohort.prompts.write_all(jobs, factory.sae, factory.statistics.p99, cohort.max_new_tokens)
    before = [cohort.reader.stated(text) for text in cohort.prompts.unsteered(which, cohort.max_new_tokens)]
    trials = []
    for (candidate, strength), out in zip(wanted, written, strict=True):
        now = [cohort.reader.stated(text) for text in out.texts]
        # A report that cannot be read states no finding, and all of its other labels count as changed.
        on = sum(stated is not None and finding in stated for stated in now) / len(now)
        most = len(cohort.reader.names) - 1
        changed = sum(
            most if a is None or b is None else len((a ^ b) - {finding})
            for a, b in zip(now, before, strict=True)
        )
        trials.append(Trial(candidate, strength, on, changed / (len(now) * (len(cohort.reader.names) - 1))))
    return trials


def _shown(
    factory: MethodFactory, cohort: Cohort, finding: str, studies: tuple[int, ...], margin: int | None
) -> Candidate | None:
    """Mean map of some exemplars; None for a margin around a finding without boxes."""
    truth = [item for i in studies for item in cohort.study(i).truth or ()]
    boxes = [item.box for item in truth if item.key == finding and item.present and item.box is not None]
    if margin is not None and not boxes:
        return None
    learned, column = factory.statistics, factory.statistics.column(finding)
    encode = encoder_of(factory.sae)
    acts = torch.stack([encode(cohort.prompts.frontal(i)) for i in studies]).mean(0)
    place = boxes_place([] if margin is None else boxes, learned.shape, margin or 0)
    found = exemplar_map(acts, learned.absent[column], factory.decoder, place, learned.shape, factory.n)
    name = {None: "whole image", 0: "boxes"}.get(margin, f"boxes and {margin} around")
    return Candidate(EXEMPLAR if len(studies) == 1 else POOLED, name, studies, found)


def _means(factory: MethodFactory, finding: str) -> list[Candidate]:
    """Mean map of all studies, over the whole image and at the usual place of the finding."""
    learned, column = factory.statistics, factory.statistics.column(finding)
    image, usual = torch.ones(learned.boxes.shape[1]), factory.place(finding)
    places = {"whole image": image} | ({} if bool(usual.all()) else {"usual place": usual})
    return [
        Candidate(
            MAPS,
            name,
            (),
            exemplar_map(
                learned.present[column],
                learned.absent[column],
                factory.decoder,
                place,
                learned.shape,
                factory.n,
            ),
        )
        for name, place in places.items()
    ]

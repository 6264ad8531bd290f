"""Which latent map puts a finding in: candidates are tried on studies of the choosing half, and the best is kept.

    kept = argmax over candidates and strengths of   on target - off target - 2 max(0, off target - 0.06)

Candidates are the mean map of all studies with the finding, an exemplar's (one study's), and the mean of a few
exemplars', each in some places. Exemplars are studies of the choosing half that state the finding and few others. What
is kept is counted on the other half by whoever asked; nothing of that half is read here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from sae_lens_maira.cli.steering_methods import EXEMPLAR, MAPS, POOLED, Bench
from sae_lens_maira.cli.steering_subjects import MAX_NEW_TOKENS, Subjects
from sae_lens_maira.phantom import FINDING_KEYS, read_report
from sae_lens_maira.steering.maps import LatentMap, boxes_place, exemplar_map
from sae_lens_maira.steering.prompts import Job

ALLOWED = 0.06
"""Share of other labels that may change before it counts three times."""
MARGINS: tuple[int | None, ...] = (0, 1, None)
"""Patches around an exemplar's boxes; None is the whole film."""
SCREENED_AT = 2.0
STRENGTHS = {MAPS: (1.5, 2.0, 3.0), EXEMPLAR: (1.5, 2.0, 3.0), POOLED: (1.5, 2.5)}
POOLS = (2, 4)
"""Exemplars in a mean."""
FINALISTS = 2
"""Maps of one exemplar that pass the screening."""


@dataclass(frozen=True)
class Candidate:
    """A map and where it is from.

    Attributes:
        kind: `MAPS`, `EXEMPLAR` or `POOLED`.
        place: boxes, boxes and patches around, usual place, or whole film.
        studies: numbers of the exemplars; none for the mean of all.
        map: what is added.
    """

    kind: str
    place: str
    studies: tuple[int, ...]
    map: LatentMap


@dataclass(frozen=True)
class Trial:
    """A candidate at one strength on studies of the choosing half; shares as in `evaluate_steering`."""

    candidate: Candidate
    strength: float
    on_target: float
    off_target: float

    @property
    def gain(self) -> float:
        """What the choice maximizes."""
        return self.on_target - self.off_target - 2 * max(0.0, self.off_target - ALLOWED)


@dataclass(frozen=True)
class Choice:
    """All trials on the same studies of the choosing half.

    Attributes:
        trials: every finalist at every strength.
        n: studies of a trial.
    """

    trials: tuple[Trial, ...]
    n: int

    def best(self, kind: str | None = None) -> Trial:
        """The trial of largest gain, of one kind of candidate or of all; of equal ones the weakest, then the first."""
        mine = [trial for trial in self.trials if kind in (None, trial.candidate.kind)]
        return max(mine, key=lambda trial: (trial.gain, -trial.strength))

    def table(self) -> pd.DataFrame:
        """A row a trial, and which one was kept."""
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
    bench: Bench,
    subjects: Subjects,
    finding: str,
    which: Sequence[int],
    n_exemplars: int = 6,
    screened_on: int = 8,
) -> Choice:
    """Try maps of a finding on studies of the choosing half that lack it.

    Every exemplar is screened in every place on the first few studies. The best maps of one exemplar, means over the
    best exemplars and the mean map of all studies are then tried at several strengths on all of them.

    Args:
        bench: SAE and mean activations.
        subjects: studies and their prompts.
        finding: its key.
        which: numbers of studies of the choosing half without it.
        n_exemplars: how many studies with it are screened, those with fewest findings.
        screened_on: studies of the screening.

    Raises:
        InterventionError: fewer than 4 studies of the choosing half have and state the finding.
    """
    numbers = subjects.pick("choose", [finding], [], len(subjects.prompts))
    crowd = {i: sum(item.present for item in subjects.study(i).truth or ()) for i in numbers}
    exemplars = sorted(numbers, key=lambda i: (crowd[i], i))[:n_exemplars]
    singles = [_shown(bench, subjects, finding, (i,), margin) for i in exemplars for margin in MARGINS]
    singles = [candidate for candidate in singles if candidate is not None]
    screened = try_maps(bench, subjects, finding, [(c, SCREENED_AT) for c in singles], which[:screened_on])
    screened.sort(key=lambda trial: -trial.gain)
    # The exemplars in the order of what their best map does.
    order = list(dict.fromkeys(trial.candidate.studies[0] for trial in screened))
    finalists = [trial.candidate for trial in screened[:FINALISTS]]
    pools = [_shown(bench, subjects, finding, tuple(order[:n]), m) for n in POOLS for m in MARGINS[1:]]
    finalists += [pool for pool in pools if pool is not None]
    finalists += _means(bench, finding)
    wanted = [(c, strength) for c in finalists for strength in STRENGTHS[c.kind]]
    return Choice(tuple(try_maps(bench, subjects, finding, wanted, which)), len(which))


def try_maps(
    bench: Bench,
    subjects: Subjects,
    finding: str,
    wanted: Sequence[tuple[Candidate, float]],
    which: Sequence[int],
) -> list[Trial]:
    """Steer the same studies with every candidate at its strength, and count."""
    jobs = [Job(which, candidate.map.interventions(strength)) for candidate, strength in wanted]
    written = subjects.prompts.write_all(jobs, bench.sae, bench.learned.p99, MAX_NEW_TOKENS)
    before = [read_report(text).present for text in subjects.prompts.unsteered(which, MAX_NEW_TOKENS)]
    trials = []
    for (candidate, strength), out in zip(wanted, written, strict=True):
        now = [read_report(text).present for text in out.texts]
        on = sum(finding in said for said in now) / len(now)
        changed = sum(len((a ^ b) - {finding}) for a, b in zip(now, before, strict=True))
        trials.append(Trial(candidate, strength, on, changed / (len(now) * (len(FINDING_KEYS) - 1))))
    return trials


def _shown(
    bench: Bench, subjects: Subjects, finding: str, studies: tuple[int, ...], margin: int | None
) -> Candidate | None:
    """What some exemplars show on average; None for a margin around a finding without boxes."""
    truth = [item for i in studies for item in subjects.study(i).truth or ()]
    boxes = [item.box for item in truth if item.key == finding and item.present and item.box is not None]
    if margin is not None and not boxes:
        return None
    learned, column = bench.learned, FINDING_KEYS.index(finding)
    with torch.no_grad():
        acts = torch.stack([bench.sae.encode(subjects.prompts.frontal(i)) for i in studies]).mean(0)
    place = boxes_place([] if margin is None else boxes, learned.shape, margin or 0)
    found = exemplar_map(acts, learned.absent[column], bench.decoder, place, learned.shape, bench.n)
    name = {None: "whole film", 0: "boxes"}.get(margin, f"boxes and {margin} around")
    return Candidate(EXEMPLAR if len(studies) == 1 else POOLED, name, studies, found)


def _means(bench: Bench, finding: str) -> list[Candidate]:
    """The mean map, over the whole film and where the finding usually lies."""
    learned, column = bench.learned, FINDING_KEYS.index(finding)
    film, usual = torch.ones(learned.boxes.shape[1]), bench.place(finding)
    places = {"whole film": film} | ({} if bool(usual.all()) else {"usual place": usual})
    return [
        Candidate(
            MAPS,
            name,
            (),
            exemplar_map(
                learned.present[column], learned.absent[column], bench.decoder, place, learned.shape, bench.n
            ),
        )
        for name, place in places.items()
    ]

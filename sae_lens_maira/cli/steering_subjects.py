"""The phantom studies of a steering experiment: halves, truth, and whom to steer.

Studies with one film and no prior are steered: with a prior "unchanged" could be right as well, and a lateral film
shows the finding a second time. Negatives lack a finding in truth and in the unsteered report, positives have it in
both, so that an unsteered model scores 0. It knows nothing about SAEs.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.latents import split_by_patient
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, read_report, truth_labels
from sae_lens_maira.steering.prompts import SharedPrompts
from sae_lens_maira.studies import Study

MAX_NEW_TOKENS = 76
"""Reports of the phantom have at most 68 words; a steered one that goes on is cut here."""


class Subjects:
    """Studies dealt to two halves by patient, and the prompts of those that are steered.

    Args:
        maira: the phantom.
        studies: all of them, or how many to draw.
        hook_name: where they will be steered.
        seed: of the draw and of the halves.
        pool: studies of the choosing and of the reporting half that may be steered, at most.
    """

    def __init__(
        self,
        maira: Maira2,
        studies: int | Sequence[Study],
        hook_name: str,
        seed: int = 0,
        pool: tuple[int, int] = (240, 240),
    ) -> None:
        self.studies = (
            generate_studies(studies, seed=20_000 + seed) if isinstance(studies, int) else list(studies)
        )
        self.maira, self.hook_name = maira, hook_name
        self.truth = np.stack([truth_labels(study) for study in self.studies])
        self.halves = split_by_patient([study.patient_id for study in self.studies], seed)
        plain = np.array([s.prior_frontal is None and s.lateral is None for s in self.studies])
        self._numbers = {
            half: np.flatnonzero(mask & plain)[:most]
            for half, mask, most in (
                ("choose", self.halves.choose, pool[0]),
                ("report", self.halves.report, pool[1]),
            )
        }

    @cached_property
    def prompts(self) -> SharedPrompts:
        """Prompts of both pools, the choosing half first."""
        chosen = np.concatenate([self._numbers["choose"], self._numbers["report"]])
        return SharedPrompts(self.maira, self.hook_name, [self.studies[int(i)] for i in chosen])

    @cached_property
    def said(self) -> list[frozenset[str]]:
        """What the unsteered report of every pooled study states."""
        texts = self.prompts.unsteered(range(len(self.prompts)), MAX_NEW_TOKENS)
        return [read_report(text).present for text in texts]

    def study(self, number: int) -> Study:
        """The pooled study of this number."""
        chosen = np.concatenate([self._numbers["choose"], self._numbers["report"]])
        return self.studies[int(chosen[number])]

    def pick(self, half: str, present: Sequence[str], absent: Sequence[str], n: int) -> list[int]:
        """Numbers of pooled studies that have some findings and lack others, in truth and in the unsteered report.

        Args:
            half: "choose" or "report".
            present: findings that they have.
            absent: findings that they lack.
            n: at most so many.

        Raises:
            InterventionError: there are fewer than 4.
        """
        first = 0 if half == "choose" else len(self._numbers["choose"])
        found: list[int] = []
        for place, number in enumerate(self._numbers[half]):
            truth = {key for key, known in zip(FINDING_KEYS, self.truth[number], strict=True) if known}
            said = self.said[first + place]
            if all(k in truth and k in said for k in present) and not any(
                k in truth or k in said for k in absent
            ):
                found.append(first + place)
        if len(found) < 4:
            raise InterventionError(
                f"Only {len(found)} studies of the half {half!r} have {list(present)} and lack {list(absent)}; draw "
                "more."
            )
        return found[:n]

"""Cohort of a steering experiment: studies in two halves, their findings, and which of them are steered.

By default only studies with one image and no prior are steered: with a prior "unchanged" could be right as well, and a
lateral image shows the finding a second time. Negatives lack a finding both in the known findings and in the unsteered
report, positives have it in both, so that an unsteered model scores 0.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.latents import split_by_patient
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.steering.prompts import SharedPrompts
from sae_lens_maira.studies import FindingReader, Study, known_findings, readable_studies

MAX_NEW_TOKENS = 120
"""Default maximum length of a report in tokens."""


class Cohort:
    """Studies split in two halves by patient, and the prompts of those that may be steered.

    Args:
        maira: The model.
        studies: All studies.
        hook_name: Hook point at which they will be steered.
        reader: Reader of findings in reports.
        seed: Random seed of the halves.
        pool: Maximum number of studies of the selection and of the reporting half that may be steered.
        views: "frontal" steers only studies with one image and no prior, "all" any study with a frontal image.
        max_new_tokens: Maximum length of a report.

    Attributes:
        known: (n, F) findings of the studies.
        studies: Studies whose findings are known.
        left_out: Number of studies whose report cannot be read.
        source: "truth", or the source of the reader where labels come from the reports.
        halves: Choose on one half, report on the other.
    """

    def __init__(
        self,
        maira: Maira2,
        studies: Sequence[Study],
        hook_name: str,
        reader: FindingReader,
        seed: int = 0,
        pool: tuple[int, int] = (240, 240),
        views: Literal["frontal", "all"] = "frontal",
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        self.maira, self.hook_name, self.reader = maira, hook_name, reader
        self.studies = readable_studies(studies, reader)
        self.left_out = len(studies) - len(self.studies)
        studies = self.studies
        self.max_new_tokens = max_new_tokens
        self.known, self.source = known_findings(studies, reader)
        self.halves = split_by_patient([study.patient_id for study in studies], seed)
        usable = np.array(
            [
                s.frontal is not None and (views == "all" or (s.prior_frontal is None and s.lateral is None))
                for s in studies
            ]
        )
        self._pool = {
            half: np.flatnonzero(mask & usable)[:most]
            for half, mask, most in (
                ("choose", self.halves.choose, pool[0]),
                ("report", self.halves.report, pool[1]),
            )
        }

    @cached_property
    def prompts(self) -> SharedPrompts:
        """Prompts of both pools, the selection half first."""
        return SharedPrompts(self.maira, self.hook_name, [self.study(i) for i in range(self.size)])

    @property
    def size(self) -> int:
        """Number of studies in both pools."""
        return len(self._pool["choose"]) + len(self._pool["report"])

    def study(self, number: int) -> Study:
        """The pooled study of this index."""
        n = len(self._pool["choose"])
        half, place = ("choose", number) if number < n else ("report", number - n)
        return self.studies[int(self._pool[half][place])]

    def stated(self, number: int) -> frozenset[str] | None:
        """Findings that the unsteered report of a pooled study states; None if it cannot be read."""
        return self.reader.stated(self.prompts.unsteered([number], self.max_new_tokens)[0])

    def pick(self, half: str, present: Sequence[str], absent: Sequence[str], n: int) -> list[int]:
        """Pooled studies that have some findings and lack others, both as known and in the unsteered report.

        Args:
            half: "choose" or "report".
            present: Findings that they have.
            absent: Findings that they lack.
            n: Maximum number of studies.

        Returns:
            Indices in the pool.

        Raises:
            InterventionError: There are fewer than 4, or none is in the pool.
        """
        first = 0 if half == "choose" else len(self._pool["choose"])
        candidates = []
        for place, number in enumerate(self._pool[half]):
            known = {name for name, has in zip(self.reader.names, self.known[number], strict=True) if has}
            if known.issuperset(present) and known.isdisjoint(absent):
                candidates.append(first + place)
        texts = self.prompts.unsteered(candidates, self.max_new_tokens) if candidates else []
        read = [self.reader.stated(text) for text in texts]
        picked = [
            number
            for number, stated in zip(candidates, read, strict=True)
            if stated is not None and stated.issuperset(present) and stated.isdisjoint(absent)
        ]
        if len(picked) < 4:
            wanted = [f"have {', '.join(present)}"] * bool(present) + [f"lack {', '.join(absent)}"] * bool(
                absent
            )
            raise InterventionError(
                f"{len(self._pool[half])} studies of the half {half!r}: {len(candidates)} {' and '.join(wanted)} as "
                f"known from the table. The reader cannot read the unsteered reports of {read.count(None)} of them, "
                f"and {len(picked)} {' and '.join(wanted)} in the unsteered report too; 4 are needed. Read more "
                "studies, or steer studies of all views."
            )
        return picked[:n]

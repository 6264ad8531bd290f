"""Studies through the model to activation rows: several hook points a pass, stopped behind the last of them.

    rows(numbers) = rows of the studies of these numbers, by study, source and position

Which rows a study gives depends on its id and the settings, never on its neighbours; the harvest to disk and training
straight from the model share this one path. Encoding (reading images, tokens) runs ahead of the model in threads. It
knows nothing about stores or SAEs.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from sae_lens_maira.activations.ahead import in_order
from sae_lens_maira.activations.generated import generate_reports
from sae_lens_maira.activations.sampling import RoleRates, kept_positions, rate_table, role_rates
from sae_lens_maira.activations.store import COLUMNS, SOURCES
from sae_lens_maira.errors import StoreError
from sae_lens_maira.hooks.hooked import HookedMaira2
from sae_lens_maira.maira2 import Maira2, Maira2Encoding, TokenRole
from sae_lens_maira.studies import Study

Reports = Literal["teacher", "generated", "both"]


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What decides which rows come out of which study, and their values.

    Attributes:
        roles: a preset or roles.
        rates: share to keep by role, e.g. `{"image": 0.05}`; adds the role if `roles` lacks it.
        reports: the studies' own, those the model writes, or both after one another.
        batch_size: studies a forward. Padding changes rounding, so it belongs to what a store is.
        max_norm: rows with a larger norm at any of the hook points are dropped; None keeps all.
        max_new_tokens: budget of a generated report.
        seed: of the sample of rows.
    """

    roles: str | Collection[TokenRole | str] = "paper"
    rates: RoleRates | None = None
    reports: Reports = "teacher"
    batch_size: int = 8
    max_norm: float | None = None
    max_new_tokens: int = 300
    seed: int = 0
    kept: dict[TokenRole, float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.reports not in ("teacher", "generated", "both"):
            raise StoreError(f"reports is {self.reports!r}; expected teacher, generated or both.")
        object.__setattr__(self, "kept", role_rates(self.roles, self.rates))

    @property
    def sources(self) -> tuple[int, ...]:
        """Numbers of the sources in `SOURCES`."""
        return {"teacher": (0,), "generated": (1,), "both": (0, 1)}[self.reports]


@dataclass(frozen=True)
class Taken:
    """Rows of one forward."""

    values: dict[str, torch.Tensor]
    """(n, d_in) float32 by hook point."""
    index: pd.DataFrame
    """n rows of `COLUMNS`."""
    studies: int
    """How many studies went in."""


class RowReader:
    """Reads rows of studies at hook points.

    Args:
        maira: model and processor.
        studies: any sequence; items are read when needed.
        hook_names: hook points of the language model's token sequence.
        settings: what to keep.
        workers: threads that encode ahead of the model; 0 encodes in between.

    Attributes:
        hooks: hook name -> d_in.

    Raises:
        StoreError: no hook points or studies, or a hook point does not lie on the token sequence.
        HookError: an unknown hook point.
    """

    def __init__(
        self,
        maira: Maira2,
        studies: Sequence[Study],
        hook_names: Sequence[str],
        settings: RowSettings,
        workers: int = 1,
    ) -> None:
        if not hook_names or not len(studies):
            raise StoreError(
                f"{len(hook_names)} hook points and {len(studies)} studies were given; give at least one each."
            )
        self._maira, self._studies, self._names = maira, studies, list(hook_names)
        self._settings, self._workers = settings, workers
        self._table = rate_table(settings.kept)
        self._hooked = HookedMaira2(maira.model, maira.processor)
        points = self._hooked.points
        self.hooks = {name: points.width(name) or 0 for name in self._names}
        wrong = [n for n in self._names if points.resolve(n).prefill_only or not self.hooks[n]]
        if wrong:
            raise StoreError(
                f"{', '.join(wrong)} gives no row of numbers per token, which is what is kept here. Choose a hook "
                "point of the language model's token sequence."
            )
        stops = [points.resolve(name).stop for name in self._names]
        known = [stop for stop in stops if stop is not None]
        self._stop = max(known) if len(known) == len(stops) else None

    def batches(self, numbers: Sequence[int]) -> Iterator[Taken]:
        """Rows of one forward after another.

        Args:
            numbers: studies by number; those of like length go through the model together.

        Raises:
            StoreError: a study lacks its report.
        """
        for chosen, source, encoded in in_order(self._encodings(numbers), self._workers):
            encoding = encoded
            if SOURCES[source] == "generated":
                encoding = generate_reports(self._maira, encoded, self._settings.max_new_tokens)
            with torch.no_grad():
                _, cache = self._hooked.run_with_cache(
                    encoding.forward_inputs(), names_filter=self._names, stop_at_layer=self._stop
                )
            yield self._kept(encoding, {name: cache[name] for name in self._names}, chosen, source)

    def ordered(self, parts: Sequence[Taken]) -> Taken:
        """Parts of `batches` as one, by study, source and position."""
        index = pd.concat([part.index for part in parts], ignore_index=True)[list(COLUMNS)]
        order = np.lexsort((index["position"], index["source"], index["study"]))
        turned = torch.from_numpy(order)
        values = {name: torch.cat([part.values[name] for part in parts])[turned] for name in self._names}
        return Taken(values, index.iloc[order], sum(part.studies for part in parts))

    def _encodings(self, numbers: Sequence[int]) -> Iterator[partial[tuple[list[int], int, Maira2Encoding]]]:
        """One job a batch."""
        lengths = {i: study_length(self._studies[i]) for i in numbers}
        if 0 in self._settings.sources:
            lacking = [i for i in numbers if not self._studies[i].report]
            if lacking:
                raise StoreError(
                    f"{len(lacking)} studies have no report to teach, the first is "
                    f"{self._studies[lacking[0]].study_id}. Leave them out, or harvest with reports='generated'."
                )
        order = sorted(numbers, key=lengths.__getitem__)
        for start in range(0, len(order), self._settings.batch_size):
            chosen = order[start : start + self._settings.batch_size]
            for source in self._settings.sources:
                yield partial(self._encode, chosen, source)

    def _encode(self, chosen: list[int], source: int) -> tuple[list[int], int, Maira2Encoding]:
        batch, processor = [self._studies[i] for i in chosen], self._maira.processor
        if SOURCES[source] == "teacher":
            return chosen, source, processor.encode(batch, report="teacher", padding_side="right")
        return chosen, source, processor.encode(batch)

    def _kept(
        self, encoding: Maira2Encoding, values: dict[str, torch.Tensor], chosen: list[int], source: int
    ) -> Taken:
        cpu = encoding.to("cpu")
        keep = np.zeros(tuple(cpu.roles.shape), dtype=bool)
        for row, (length, number) in enumerate(zip(cpu.attention_mask.sum(1).tolist(), chosen, strict=True)):
            roles, name = cpu.roles[row, :length].numpy(), self._studies[number].study_id
            keep[row, :length] = kept_positions(roles, self._table, self._settings.seed, name, source)
        mask = torch.from_numpy(keep)
        taken = {
            name: value[mask.to(value.device)].flatten(1).float().cpu() for name, value in values.items()
        }
        row, position = np.nonzero(keep)
        columns: dict[str, Any] = {
            "study": np.asarray(chosen, dtype=np.int64)[row],
            "position": position.astype(np.int32),
            "role": cpu.roles[mask].numpy(),
            "token": cpu.input_ids[mask].numpy().astype(np.int32),
            "kind": cpu.view[mask].numpy(),
            "patch_row": cpu.patch_row[mask].numpy(),
            "patch_col": cpu.patch_col[mask].numpy(),
            "source": np.full(len(row), source, dtype=np.int8),
        }
        index = pd.DataFrame(columns)
        if (most := self._settings.max_norm) is not None:
            small = torch.stack([value.norm(dim=1) <= most for value in taken.values()]).all(0)
            taken = {name: value[small] for name, value in taken.items()}
            index = index.loc[small.numpy()]
        return Taken(taken, index, len(chosen))


def study_length(study: Study) -> tuple[int, int]:
    """What batches are sorted by: images, then characters of text."""
    images = sum(image is not None for image in (study.frontal, study.lateral, study.prior_frontal))
    texts = (study.indication, study.technique, study.comparison, study.prior_report, study.report)
    return images, sum(len(text or "") for text in texts)

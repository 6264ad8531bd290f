"""The quickstart's last step: records of the latents that matter, explained offline, as a page to open.

    latents shown = best unit of every finding + the coarsest level + some of each other level
    studies shown = studies of the held-out half, the one that no latent was chosen on

Either SAE is recorded at the positions it was trained on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.dashboards.html import write_page
from sae_lens_maira.interp.run import interpret_offline
from sae_lens_maira.latents import Halves
from sae_lens_maira.latents.collect import CollectConfig, collect_records
from sae_lens_maira.maira2 import Maira2
from sae_lens_maira.phantom import FINDING_KEYS
from sae_lens_maira.quickstart.results import PlaceResult, QuickstartResult
from sae_lens_maira.studies import Study

STUDIES, COARSE, EACH = 240, 48, 16
"""Studies shown at most; latents of the coarsest level, and of every other."""


class RowsInMemory:
    """Activation source over rows in memory; studies are numbered among those chosen."""

    def __init__(self, rows: ActivationRows, chosen: np.ndarray, unit: int = 40) -> None:
        number = np.full(int(rows.study.max()) + 1, -1)
        number[chosen] = np.arange(len(chosen))
        kept = rows.where(number[rows.study] >= 0)
        self._rows = replace(kept, study=number[kept.study])
        self._n, self._unit = len(chosen), unit

    def __len__(self) -> int:
        return (self._n + self._unit - 1) // self._unit

    def __getitem__(self, unit: int, /) -> Iterable[ActivationRows]:
        return [self._rows.where(self._rows.study // self._unit == unit)]


def write_pages(
    result: QuickstartResult,
    maira: Maira2,
    studies: Sequence[Study],
    rows: Mapping[str, ActivationRows],
    halves: Halves,
) -> dict[str, Path]:
    """Records, explanations and a page of either SAE.

    Returns:
        Paths of `index.html` by place: the image SAE's is `page/index.html`, the text SAE's `page_text/index.html`.
    """
    chosen = np.flatnonzero(halves.report)[:STUDIES]
    own = [studies[i] for i in chosen]
    pages = {}
    for place, name in ((result.image, ""), (result.text, "_text")):
        config = CollectConfig(
            model="phantom",
            sae=f"sae_{place.place}",
            latents=shown_latents(place),
            top=8,
            intervals=4,
            per_interval=3,
            zero=8,
            seed=result.config.seed,
        )
        records = collect_records(
            RowsInMemory(rows[place.place], chosen),
            own,
            place.sae.inference,
            maira,
            result.folder / f"records{name}",
            config,
            findings=FINDING_KEYS,
        )
        interpret_offline(records)
        pages[place.place] = write_page(records, None, result.folder / f"page{name}")
    return pages


def shown_latents(place: PlaceResult) -> tuple[int, ...]:
    """The best unit of every finding, the coarsest level's first latents, and some of each other level."""
    widths = (0, *place.sae.widths)
    found = {int(unit) for unit in place.trained.unit} | set(range(min(COARSE, widths[1])))
    for low, high in pairwise(widths[1:]):
        found |= set(np.linspace(low, high - 1, min(EACH, high - low)).astype(int).tolist())
    return tuple(sorted(found))

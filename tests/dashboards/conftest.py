"""Synthetic latent records: small, deterministic, with every trap that an importer has."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.latents.records import (
    Context,
    Firing,
    Histogram,
    Interval,
    LatentRecord,
    RecordsMeta,
    StudyInfo,
    StudyText,
    TokenWeight,
)
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.latents.writing import write_records

WORDS = (
    "▁left",
    "▁pleural",
    "▁effusion",
    "▁is",
    "▁small",
    "<0x0A>",
    "▁no",
    "▁pneumothorax",
    "",
    "<script>",
    ".",
)


def make_text(study: str, length: int = 200) -> StudyText:
    rng = random.Random(study)
    return StudyText(
        study,
        tokens=tuple(rng.choice(WORDS) for _ in range(length)),
        positions=tuple(range(length)),
        roles=("indication",) * 20 + ("report",) * (length - 20),
        read=tuple(i >= 3 for i in range(length)),
        span=(0, length),
        views=(("frontal", 37, 37), ("lateral", 37, 37)),
    )


def make_context(rng: random.Random, study: str, value: float, kind: str, length: int = 200) -> Context:
    peak = rng.randrange(3, length) if value > 0 and kind == "text" else None
    cells, values = (), ()
    if value > 0 and peak is None:
        cells = tuple(sorted(rng.sample(range(37 * 37), 90)))
        best = rng.choice(cells)
        values = tuple(value if cell == best else value * rng.random() * 0.9 for cell in cells)
    return Context(
        study=study,
        start=0,
        end=length,
        modality=kind,
        token_indices=() if peak is None else (peak,),
        token_values=() if peak is None else (value,),
        patches=((cells, values), ((), ())),
        texts={study: make_text(study, length)},
    )


def make_record(latent: int, studies: list[str], length: int = 200, dead: bool = False) -> LatentRecord:
    rng = random.Random(latent)
    names = rng.sample(studies, min(24, len(studies)))
    largest = 10.0 + latent / 7
    kinds = ("text", "image")
    top = tuple(
        make_context(rng, s, largest * (1 - i / 20), kinds[(latent + i) % 2], length)
        for i, s in enumerate(names[:8])
    )
    middle = tuple(make_context(rng, s, largest / 3, "text", length) for s in names[6:13])
    zero = tuple(make_context(rng, s, 0.0, "text", length) for s in names[13:19])
    low, high = largest / 4, largest / 2
    density = 0.0 if dead else 0.0123456789
    return LatentRecord(
        latent=latent,
        level=0,
        status="dead" if dead else "alive",
        density=density,
        max=0.0 if dead else largest,
        p99=0.0 if dead else largest,
        histogram=Histogram(
            tuple(largest * i / 64 for i in range(65)),
            (0,) * 64 if dead else tuple(64 - i for i in range(64)),
        ),
        firing=tuple(
            Firing(kind, 1000, 0 if dead else 12, 40, 0 if dead else 9, 1.0, largest, 5.0) for kind in kinds
        ),
        top_tokens=tuple(TokenWeight(f"▁up{i}", i, 1.0 - i / 40) for i in range(30)),
        bottom_tokens=tuple(TokenWeight(f"▁down{i}", i, -1.0 + i / 40) for i in range(30)),
        agreement=(),
        neighbours=(),
        maps=(),
        top=() if dead else top,
        intervals=() if dead else (Interval(low, high, 0.004, middle),),
        zero=zero,
    )


def make_meta(d_sae: int, studies: int) -> RecordsMeta:
    return RecordsMeta(
        model="microsoft/maira-2",
        hook_name="blocks.15.hook_resid_post",
        layer=15,
        sae="sae_text",
        control="trained",
        d_in=4096,
        d_sae=d_sae,
        level_widths=(d_sae,),
        rows_text=2000,
        rows_image=4000,
        studies=studies,
        findings=(),
        seed=0,
        versions={"sae-lens-maira": "0.1.0"},
    )


def make_studies(n: int, licence: str = "synthetic") -> list[StudyInfo]:
    return [StudyInfo(f"s{i:04x}", f"p{i:04x}", licence) for i in range(n)]


Maker = Callable[..., RecordSet]


@pytest.fixture
def make_set(tmp_path: Path) -> Maker:
    """Makes record sets: `make_set(latents=6, licence="public", change=lambda records: ...)`; latent 2 is dead."""
    made: list[int] = []

    def make(
        latents: int = 6,
        licence: str = "synthetic",
        change: Callable[[list[LatentRecord]], Iterable[LatentRecord]] | None = None,
        length: int = 200,
    ) -> RecordSet:
        studies = make_studies(40, licence)
        records = [make_record(i, [s.study for s in studies], length, dead=i == 2) for i in range(latents)]
        written = list(change(records) if change else records)
        shown = {c.study for one in written for c in (*one.top, *one.zero)} | {s.study for s in studies}
        made.append(latents)
        return write_records(
            tmp_path / f"records{len(made)}",
            make_meta(latents, len(studies)),
            studies,
            [make_text(study, length) for study in sorted(shown)],
            written,
        )

    return make


@pytest.fixture
def target() -> Target:
    return Target(set_name="res-matryoshka-16k")

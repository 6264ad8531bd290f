"""Hand-made records: latents that follow one finding exactly, in a language of two findings and two sides."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from PIL import Image

from sae_lens_maira.latents import records as r
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.latents.writing import write_records

SENTENCES = {
    "pleural_effusion_left": "There is a left pleural effusion .",
    "pleural_effusion_right": "There is a right pleural effusion .",
    "pneumothorax_left": "There is a left pneumothorax .",
    "pneumothorax_right": "There is a right pneumothorax .",
    "pacemaker": "A pacemaker is seen .",
    "nodule": "A nodule is seen .",
}
KEYS = tuple(SENTENCES)


def make_studies(n: int = 240, seed: int = 0, licence: str = "synthetic") -> dict[str, r.StudyInfo]:
    """Studies of n / 2 patients; every finding in a quarter of them, independently."""
    rng = random.Random(seed)
    entries = {}
    for i in range(n):
        found = tuple(key for key in KEYS if rng.random() < 0.25)
        text = " ".join(SENTENCES[key] for key in found) or "The chest is clear ."
        entries[f"s{i}"] = r.StudyInfo(
            f"s{i}", f"p{i // 2}", licence, text, findings=found, labelled_by="truth"
        )
    return entries


def text_of(study: r.StudyInfo) -> r.StudyText:
    tokens = tuple((study.report or "").split())
    n = len(tokens)
    return r.StudyText(
        study.study, tokens, tuple(range(n)), ("report",) * n, (True,) * n, (0, n), (("frontal", 8, 8),)
    )


def context(study: r.StudyInfo, value: float, word: str, kind: str = "text") -> r.Context:
    text = text_of(study)
    token, patch = (value > 0 and kind == wanted for wanted in ("text", "image"))
    return r.Context(
        study=study.study,
        start=0,
        end=len(text.tokens),
        modality=kind,
        token_indices=(text.tokens.index(word),) if token else (),
        token_values=(value,) if token else (),
        patches=(((54,), (value,)) if patch else ((), ()),),
        texts={study.study: text},
    )


def make_record(
    latent: int, finding: str, studies: dict[str, r.StudyInfo], kind: str = "text"
) -> r.LatentRecord:
    """A latent that fires exactly in the studies with `finding`, at the finding's last word or at a patch."""
    word = SENTENCES[finding].split()[-2] if "_" in finding else SENTENCES[finding].split()[1]
    rng = random.Random(latent)
    hits = [context(s, 0.5 + rng.random() * 9, word, kind) for s in studies.values() if finding in s.findings]
    hits.sort(key=lambda c: -c.value)
    silent = tuple(context(s, 0.0, word, kind) for s in studies.values() if finding not in s.findings)
    largest = hits[0].value
    cuts = [largest * i / 5 for i in range(6)]
    intervals = tuple(
        r.Interval(low, high, 0.1, tuple(c for c in hits if low <= c.value < high))
        for low, high in reversed(list(itertools.pairwise(cuts)))
    )
    return r.LatentRecord(
        latent=latent,
        level=0,
        status="alive",
        density=0.1,
        max=largest,
        p99=largest,
        histogram=r.Histogram((0.0, largest), (len(hits),)),
        firing=(),
        top_tokens=(),
        bottom_tokens=(),
        agreement=(),
        neighbours=(),
        maps=(),
        top=tuple(hits[:10]),
        intervals=intervals,
        zero=silent[:80],
    )


def make_meta(control: str = "trained", d_sae: int = 8) -> r.RecordsMeta:
    return r.RecordsMeta(
        model="phantom",
        hook_name="blocks.3.hook_resid_post",
        layer=3,
        sae="sae",
        control=control,
        d_in=4,
        d_sae=d_sae,
        level_widths=(d_sae,),
        rows_text=10,
        rows_image=20,
        studies=240,
        findings=KEYS,
        seed=0,
        versions={},
    )


@pytest.fixture
def hand_made(tmp_path) -> Callable[..., RecordSet]:
    """Write records of one latent per finding; returns the opened set.

    With `images`, every study has a frontal image of 80 x 80 pixels in which patch 54 of 8 x 8 is bright on its left
    side for a nodule and on its right side for a pacemaker.
    """

    def make(
        findings: Iterable[str] = KEYS,
        kind: str = "text",
        licence: str = "synthetic",
        name: str = "records",
        images: bool = False,
    ) -> RecordSet:
        studies = make_studies(licence=licence)
        if images:
            (tmp_path / name).mkdir(exist_ok=True)
            for key, study in studies.items():
                pixels = np.full((80, 80), 60, dtype=np.uint8)
                pixels[62:68, 61:64] = 200 if "nodule" in study.findings else 60
                pixels[62:68, 66:69] = 200 if "pacemaker" in study.findings else 60
                Image.fromarray(pixels).save(tmp_path / name / f"{key}.png")
                studies[key] = dataclasses.replace(study, images=(("frontal", f"{key}.png"),))
        records = [make_record(i, finding, studies, kind) for i, finding in enumerate(findings)]
        return write_records(
            tmp_path / name, make_meta(), studies.values(), map(text_of, studies.values()), records
        )

    return make

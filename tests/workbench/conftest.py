"""A workbench over the phantom and its shipped image SAE."""

from pathlib import Path

import pytest

import sae_lens_maira
from sae_lens_maira.interface import load, load_sae, phantom_studies
from sae_lens_maira.latents import RecordSet
from sae_lens_maira.workbench.session import Session

RECORDS = Path(sae_lens_maira.__file__).parent / "phantom" / "saes" / "image" / "records"
OPENING = {"model": '"phantom"', "sae": '"phantom-image"', "studies": "sm.phantom_studies(6, 10000)"}


@pytest.fixture(scope="package")
def parts():
    return load("phantom"), load_sae("phantom-image"), phantom_studies(6, 10_000), RecordSet.open(RECORDS)


@pytest.fixture
def session(parts) -> Session:
    model, sae, studies, records = parts
    return Session(model, sae, {study.study_id: study for study in studies}, OPENING, records)

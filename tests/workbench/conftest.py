"""A workbench over the phantom and its shipped image SAE."""

import pytest

from sae_lens_maira.interface import load, load_sae, phantom_studies
from sae_lens_maira.workbench.catalogue import open_records
from sae_lens_maira.workbench.export import Opening
from sae_lens_maira.workbench.run import new_session
from sae_lens_maira.workbench.session import Session

OPENING = Opening('sm.load("phantom")', 'sm.load_sae("phantom-image")', "sm.phantom_studies(6, 10000)")


@pytest.fixture(scope="package")
def parts():
    return load("phantom"), load_sae("phantom-image"), phantom_studies(6, 10_000)


@pytest.fixture
def session(parts) -> Session:
    model, sae, studies = parts
    return new_session(model, sae, studies, OPENING, open_records(sae, None), False)


@pytest.fixture
def first(session) -> str:
    """Id of the first study."""
    return next(iter(session.shelf))

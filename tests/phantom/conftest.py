"""Two thousand phantom studies, drawn once: the texts and truths that several tests read."""

import pytest

from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.studies import Study


@pytest.fixture(scope="session")
def many_studies() -> list[Study]:
    """2,000 studies with tiny images: text and truth do not depend on the size."""
    return generate_studies(2000, seed=7, size=32)

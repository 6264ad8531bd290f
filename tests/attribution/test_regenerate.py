"""Removal of statements: what is removed is what is reported, rounds continue until the statement is gone."""

import pytest
import torch

from sae_lens_maira.attribution.regenerate import generate_with_delta, remove_statement, same_statement
from sae_lens_maira.errors import PromptError
from sae_lens_maira.phantom import read_report

pytestmark = pytest.mark.compat
HOOK = "blocks.3.hook_resid_post"


def read(text):
    return read_report(text).present


@pytest.fixture(scope="module")
def written(hooked, study):
    (report,) = hooked.generate(study, return_type="reports")
    return report.text


def test_the_removed_entries_are_the_edit_and_the_edit_is_the_report(hooked, study, sae, written):
    """The delta is the sum of the named entries' decoder rows, and generating with it gives the report."""
    finding = min(read(written))
    found = remove_statement(
        hooked,
        study,
        sae,
        lambda text: finding in read(text),
        written,
        roles="image_only",
        step=40,
        max_rounds=2,
    )
    assert 1 <= found.rounds <= 2
    assert 0 < len(found) <= 40 * found.rounds
    assert found.gone == (finding not in read(found.report))
    prompt = hooked.processor.encode([study])
    assert generate_with_delta(hooked, prompt, HOOK, found.delta).text == found.report
    touched = found.delta.norm(dim=1).nonzero()[:, 0].tolist()
    assert touched == sorted({int(p) for p in found.position})
    assert bool((prompt.view[0][touched] >= 0).all())
    # At one position of the first round, the edit is in the span of the removed latents' decoder rows.
    place = touched[0]
    rows = sae.W_dec[found.latent[found.position == place]].T
    solved = torch.linalg.lstsq(rows, found.delta[place][:, None]).solution
    torch.testing.assert_close(rows @ solved, found.delta[place][:, None], rtol=1e-3, atol=1e-3)


def test_no_round_leaves_the_report(hooked, study, sae, written):
    """Without a round nothing is removed and the report stays."""
    finding = min(read(written))
    none = remove_statement(
        hooked, study, sae, lambda text: finding in read(text), written, roles="image_only", max_rounds=0
    )
    assert (none.report, none.gone, len(none)) == (written, False, 0)


def test_a_statement_that_is_not_made_is_refused(hooked, study, sae, written):
    with pytest.raises(PromptError, match="makes the statement"):
        remove_statement(hooked, study, sae, lambda text: False, written, roles="image_only")


def test_the_same_statement_in_other_words():
    """Sentences with findings match by finding, others by their text."""
    states = same_statement("There is a small left pleural effusion.", read)
    assert states("Left pleural effusion is seen.")
    assert not states("There is a right pneumothorax.")
    assert same_statement("Clear lungs.", read)("Clear lungs.")
    assert not same_statement("Clear lungs.", read)("The lungs are clear.")

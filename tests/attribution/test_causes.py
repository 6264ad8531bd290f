"""Causes of statements: gathered attributions are the first-order effects of what the latents write."""

import pytest

from sae_lens_maira.attribution.causes import Causes, gather
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.errors import InterventionError

pytestmark = pytest.mark.compat
HOOK = "blocks.3.hook_resid_post"


def test_nothing_gathered_has_no_direction():
    with pytest.raises(InterventionError, match="Read more studies"):
        _ = Causes(4, 4).direction


def test_gathered_attributions_are_the_first_order_effects(hooked, study, sae):
    """One sentence: the latents' sum is the gradient's effect of everything that they write at the frontal patches."""
    (report,) = hooked.generate(study, return_type="reports")
    into = Causes(sae.cfg.d_sae, sae.cfg.d_in)
    from sae_lens_maira.attribution.inputs import encode_with_report
    from sae_lens_maira.attribution.sentences import report_sentences

    run = ResidualRun(hooked, encode_with_report(hooked, study, report.text), HOOK)
    sentence = report_sentences(run.encoding, hooked.tokenizer)[0]
    gather(hooked, sae, HOOK, study, report.text, [(into, sentence.text), (into, "Not in the report.")])
    assert into.n == 1
    gradient = run.gradients(run.hidden, [sentence.positions])[1][0]
    frontal = run.encoding.view[0] == 0
    written = sae.encode(run.hidden[frontal]) @ sae.W_dec
    assert float(into.latents.sum()) == pytest.approx(
        float((written * gradient[frontal]).sum().detach()), rel=1e-3, abs=1e-4
    )
    assert float(into.direction.norm()) == pytest.approx(1, abs=1e-5)

"""Corrections by cause: only the chosen part of the chosen latents changes, and silent latents change nothing."""

import pytest
import torch

from sae_lens_maira.attribution.causes import NOTHING, CauseCorrection, Causes, gather, spared
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.errors import InterventionError

pytestmark = pytest.mark.compat
HOOK = "blocks.3.hook_resid_post"


def test_a_part_is_removed_and_the_rest_of_the_row_stays(sae):
    """The change along a direction is the row's own part there; amount -1 leaves nothing of it."""
    u = torch.nn.functional.normalize(torch.randn(128), dim=0)
    made = CauseCorrection.along(sae, [3, 5], u, -1.0)
    left = sae.W_dec[[3, 5]] + made.change
    torch.testing.assert_close(left @ u, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(left, sae.W_dec[[3, 5]] - (sae.W_dec[[3, 5]] @ u)[:, None] * u)
    both = made + CauseCorrection.along(sae, [7], u, 1.0)
    assert both.latents == (3, 5, 7)
    assert (NOTHING + made) is made
    assert (made + NOTHING) is made


def test_a_spared_direction_keeps_no_part_of_the_others():
    a, b, c = torch.randn(3, 16)
    left = spared(a, [b, c])
    assert float(left.norm()) == pytest.approx(1, abs=1e-5)
    assert float((left @ b).abs()) < 1e-4
    assert float((left @ c).abs()) < 1e-4
    with pytest.raises(InterventionError, match="span"):
        spared(b, [2 * b])
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
        float((written * gradient[frontal]).sum()), rel=1e-3, abs=1e-4
    )
    assert float(into.direction.norm()) == pytest.approx(1, abs=1e-5)


def test_reports_with_a_correction(hooked, study, sae):
    """No correction is the plain report; a large one is another; its norm grows with the activations."""
    (plain,) = hooked.generate(study, return_type="reports", max_new_tokens=30)
    assert NOTHING.reports(hooked, sae, HOOK, [study], 30) == [plain.text]
    u = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(0)), dim=0)
    made = CauseCorrection(tuple(range(96)), 5 * u.expand(96, 128))
    assert made.reports(hooked, sae, HOOK, [study], 30) != [plain.text]
    acts = torch.zeros(2, 96)
    acts[0, 1] = 2.0
    assert made.norm(acts) == pytest.approx(5.0, rel=1e-5)
    assert made.norm(torch.zeros(2, 96)) == 0

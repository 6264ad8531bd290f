"""Attribution: the model above a hook point is the model, gradients are derivatives, sums are true differences."""

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from sae_lens_maira.attribution import attribute, split_sentences
from sae_lens_maira.attribution.baselines import attention_rollout, gradient_maps
from sae_lens_maira.attribution.entries import active_entries
from sae_lens_maira.attribution.faithfulness import Faithfulness, _gradient_step
from sae_lens_maira.attribution.inputs import encode_with_report
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.attribution.sentences import report_sentences
from sae_lens_maira.errors import ConfigError, HookError, PromptError, SAEError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.phantom import load_phantom

HOOK = "blocks.3.hook_resid_post"
pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def run(hooked, study):
    return ResidualRun(hooked, encode_with_report(hooked, study, "teacher"), HOOK)


@pytest.fixture(scope="module")
def spans(run, hooked):
    return report_sentences(run.encoding, hooked.tokenizer)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two is 2.5 cm.", ["One.", "Two is 2.5 cm."]),
        ("  Lines\n\nwithout stops ", ["Lines", "without stops"]),
        ("Is it? Yes! (Stable.)", ["Is it?", "Yes!", "(Stable.)"]),
        ("", []),
        ("...", ["..."]),
    ],
)
def test_sentences_of_a_text(text, pieces):
    """Character spans cut a text into the expected sentences."""
    assert [text[a:b] for a, b in split_sentences(text)] == pieces


def test_every_report_token_belongs_to_one_sentence(run, spans):
    """Sentences' tokens partition the report without its closing token, and decode to the sentences."""
    report = (run.encoding.roles[0] == TokenRole.REPORT).nonzero()[:, 0].tolist()
    assert [p for s in spans for p in s.positions] == report[:-1]
    assert all(a.positions[-1] < b.positions[0] for a, b in pairwise(spans))


def test_the_run_from_the_hook_point_is_the_model(run, hooked, spans):
    """Log-probabilities from the stored stream equal those of the whole model; a batch of edits equals single ones."""
    positions = spans[0].positions
    logits = hooked(run.encoding)[0].log_softmax(-1)
    ids = run.encoding.input_ids[0]
    wanted = torch.stack([logits[p - 1, ids[p]] for p in positions])
    got = run.log_probabilities(run.hidden[None], positions)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    deltas = [torch.randn_like(run.hidden) * scale for scale in (0.0, 0.1, 0.3)]
    together = run.scores(deltas, positions)
    alone = torch.cat([run.scores([delta], positions) for delta in deltas])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert float(together[0]) == pytest.approx(wanted.sum().item(), abs=1e-4)


def test_an_edit_equals_a_hook(run, hooked, spans):
    """Adding a delta to the stored stream equals a TransformerLens hook that adds it in a whole forward pass."""
    delta = torch.randn_like(run.hidden) * 0.2
    logits = hooked.run_with_hooks(run.encoding, fwd_hooks=[(HOOK, lambda value, hook: value + delta)])
    positions = spans[-1].positions
    ids = run.encoding.input_ids[0]
    logp = logits[0].log_softmax(-1)
    wanted = sum(logp[p - 1, ids[p]].item() for p in positions)
    assert float(run.scores([delta], positions)[0]) == pytest.approx(wanted, abs=1e-3)


def test_gradients_are_derivatives(run, spans):
    """Each sentence's gradient equals a central difference along a random direction; one pass serves all of them."""
    _, gradients = run.gradients(run.hidden, [s.positions for s in spans])
    direction = torch.randn_like(run.hidden)
    direction /= direction.norm()
    step = 0.05
    for span, gradient in zip(spans, gradients, strict=True):
        ahead, behind = run.scores([step * direction, -step * direction], span.positions).tolist()
        assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / (2 * step), abs=2e-2)
    alone = run.gradients(run.hidden, [spans[0].positions])[1][0]
    torch.testing.assert_close(alone, gradients[0], rtol=1e-4, atol=1e-5)


def test_a_path_of_points_is_the_sum_of_its_gradients(run, spans, monkeypatch):
    """Gradients at several points, weighted and batched, equal those taken one by one, at any budget."""
    delta = torch.randn_like(run.hidden) * 0.1
    scales, weights, positions = [-1.0, -0.5, 0.2], [0.2, 0.5, 0.3], spans[0].positions
    wanted = sum(
        w * run.gradients(run.edited(t * delta), [positions])[1][0]
        for t, w in zip(scales, weights, strict=True)
    )
    for rows in (2, 8):
        monkeypatch.setattr(run, "_rows_with_gradient", rows)
        found = run.path_gradient(delta, scales, weights, positions)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_baseline_maps(study):
    """Rollout spreads a sum of 1 over earlier positions only, and needs eager attention."""
    hooked = HookedMaira2(load_phantom())
    run = ResidualRun(hooked, encode_with_report(hooked, study, "teacher"), HOOK)
    positions = report_sentences(run.encoding, hooked.tokenizer)[0].positions
    with pytest.raises(HookError, match="eager"):
        attention_rollout(hooked, run.encoding, positions)
    model: Any = hooked.model
    model.set_attn_implementation("eager")
    rollout = attention_rollout(hooked, run.encoding, positions)
    assert float(rollout.sum()) == pytest.approx(1, abs=1e-4)
    assert not rollout[positions[-1] :].any()
    assert bool((rollout[: positions[0]] > 0).all())
    maps = gradient_maps(run, positions)
    gradient = run.gradients(run.hidden, [positions])[1][0]
    torch.testing.assert_close(maps["gradient norm"] ** 2, (gradient**2).sum(1), rtol=1e-3, atol=1e-6)


def test_a_sentence_depends_on_nothing_behind_it(run, spans):
    """The gradient of a sentence is 0 from its last token on."""
    _, gradients = run.gradients(run.hidden, [spans[0].positions])
    assert not gradients[0][spans[0].positions[-1] :].any()


def test_entries_are_the_sparse_activations(run, sae):
    """Entries, bias and error add up to the stream, and the dot product with a gradient is a W_dec . g."""
    positions = torch.arange(len(run.hidden))
    entries, error = active_entries(sae, run.hidden, positions)
    dense = sae.encode(run.hidden)
    assert len(entries) == int((dense > 0).sum())
    everything = entries.delta(torch.arange(len(entries)), chunk=100)
    torch.testing.assert_close(everything + sae.b_dec + error, run.hidden, rtol=1e-4, atol=1e-4)
    gradient = torch.randn_like(run.hidden)
    wanted = dense * (gradient @ sae.W_dec.T)
    torch.testing.assert_close(
        entries.dot(gradient, chunk=77), wanted[entries.position, entries.latent], rtol=1e-4, atol=1e-4
    )


def test_integrated_attributions_add_up(hooked, study, sae):
    """The sum over candidates is the true difference within the stated tolerance, unlike first-order values."""
    found = attribute(hooked, study, sae, report="teacher", candidates=64)
    assert found.sentences
    for item in found.sentences:
        assert item.check is not None
        assert item.check.completeness_error <= 0.05
        assert float(item.value.sum()) == pytest.approx(item.check.sum_of_attributions, rel=1e-4, abs=1e-4)
        assert (np.diff(item.value) <= 1e-7).all()
        before = item.position < item.sentence.positions[-1]
        assert before[item.value > 0].all()


def test_the_checks_are_the_ablations_they_name(hooked, study, sae, run, spans):
    """The reported drop, recomputed from the answer's own entries; the curves begin and end where they must."""
    found = attribute(hooked, study, sae, 0, report="teacher", candidates=64, n_check=8)
    item = found.sentences[0]
    check = item.check
    assert check is not None
    delta = torch.zeros_like(run.hidden)
    for p, j, a in zip(item.position[:8], item.latent[:8], item.activation[:8], strict=True):
        delta[int(p)] -= float(a) * sae.W_dec[int(j)]
    base, after = run.scores([torch.zeros_like(delta), delta], spans[0].positions).tolist()
    assert check.drop == pytest.approx(base - after, abs=1e-3)
    assert check.norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert check.deletion[0] == (0, item.score)
    assert dict(check.deletion)[8] == pytest.approx(item.score - check.drop, abs=1e-3)
    assert check.insertion[0][1] == pytest.approx(item.score - check.true_difference, abs=1e-3)


def test_the_gradient_step_has_the_norm_asked_for():
    gradient = torch.randn(20, 5)
    step = _gradient_step(gradient, torch.arange(10), torch.tensor(3.0))
    assert float(step.norm()) == pytest.approx(3.0, rel=1e-5)
    assert int((step.norm(dim=1) > 0).sum()) == 8
    assert not step[10:].any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop": -0.1}, "less likely"),
        ({"drop": 0.3, "drop_random": 0.2}, "random entries of equal norm"),
        ({"sum_of_attributions": 3.0}, "true difference"),
        ({}, ""),
    ],
)
def test_a_failed_check_says_why(changes, words):
    good = Faithfulness(
        n=8, drop=2.0, predicted=2.0, drop_random=0.1, drop_random_low=0.0, drop_random_high=0.2, drop_largest=0.1,
        drop_gradient=2.5, norm=1.0, deletion=(), insertion=(), sum_of_attributions=2.1, true_difference=2.0,
    )  # fmt: skip
    made = dataclasses.replace(good, **changes)
    assert made.passed == (not changes)
    assert words in " ".join(made.problems)


def test_a_report_of_its_own(hooked, study, sae):
    """`report="generated"` explains what the model writes, token for token."""
    found = attribute(hooked, study, sae, 0, candidates=16, check=False)
    assert found.report.startswith(found.sentences[0].sentence.text)
    (written,) = hooked.generate(study, return_type="reports")
    assert found.report == written.text
    assert found.map(0).shape == (8, 8) or found.map(0).shape[0] == found.map(0).shape[1]
    frontal = found.encoding.view[0] == 0
    assert found.map(0).sum() == pytest.approx(
        float(found.sentences[0].by_position[frontal.numpy()].sum()), rel=1e-5
    )
    assert found.sentences[0].latents({}).iloc[0]["value"] > 0


def test_refusals(hooked, study, sae, run):
    """A wrong sentence, method, hook point or report is an error that names what is valid."""
    with pytest.raises(PromptError, match="numbered from 0"):
        attribute(hooked, study, sae, 99, report="teacher")
    with pytest.raises(ConfigError, match="method"):
        attribute(hooked, study, sae, method="magic")  # pyright: ignore[reportArgumentType]
    with pytest.raises(HookError, match="output of a decoder block"):
        ResidualRun(hooked, run.encoding, "blocks.3.hook_mlp_out")
    with pytest.raises(PromptError, match="no report"):
        report_sentences(hooked.processor.encode([study]), hooked.tokenizer)
    with pytest.raises(SAEError, match="numbers per token"):
        active_entries(sae, torch.zeros(3, 7), torch.arange(3))
    found = attribute(hooked, study, sae, 0, report="teacher", candidates=8, check=False)
    with pytest.raises(ConfigError, match="no lateral image"):
        found.map(0, "lateral")

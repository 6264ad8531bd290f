"""Attribution of a difference between two continuations, of words, over all entries, and at several hook points."""

import copy

import numpy as np
import pytest
import torch

from sae_lens_maira.attribution import attribute, attribute_at_points
from sae_lens_maira.attribution.difference import compared_with
from sae_lens_maira.attribution.entries import active_entries
from sae_lens_maira.attribution.inputs import encode_with_report
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.attribution.sentences import report_sentences, words_of
from sae_lens_maira.errors import ConfigError, PromptError

HOOK = "blocks.3.hook_resid_post"
REPORT = "A nasogastric tube is seen. The heart is enlarged."
OTHER = "An endotracheal tube is seen."
pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def run(hooked, study):
    return ResidualRun(hooked, encode_with_report(hooked, study, REPORT), HOOK)


def test_words_are_the_tokens_that_cover_them(run, hooked):
    """The narrowed span decodes to the words, and words that are not there are refused."""
    sentence = report_sentences(run.encoding, hooked.tokenizer)[0]
    part = words_of(sentence, "nasogastric TUBE", run.encoding, hooked.tokenizer)
    assert part.text == "nasogastric tube"
    assert set(part.positions) < set(sentence.positions)
    decoded = hooked.tokenizer.decode(run.encoding.input_ids[0, list(part.positions)])
    assert decoded.strip() == "nasogastric tube"
    with pytest.raises(PromptError, match="do not occur"):
        words_of(sentence, "pacemaker", run.encoding, hooked.tokenizer)


@pytest.mark.parametrize("words", [None, "nasogastric tube"])
def test_a_difference_is_that_of_two_scores(run, hooked, study, words):
    """Score and gradient equal those of two single runs, subtracted by hand where the tokens are shared."""
    span = report_sentences(run.encoding, hooked.tokenizer)[0]
    if words:
        span = words_of(span, words, run.encoding, hooked.tokenizer)
    instead = "endotracheal tube" if words else OTHER
    both = compared_with(hooked, study, run, span, instead, 1 << 30)
    text = f"A {instead}" if words else instead
    second = ResidualRun(hooked, encode_with_report(hooked, study, text), HOOK)
    other = report_sentences(second.encoding, hooked.tokenizer)[0]
    if words:
        other = words_of(other, instead, second.encoding, hooked.tokenizer)
    n = both.shared
    assert torch.equal(run.encoding.input_ids[0, :n], second.encoding.input_ids[0, :n])
    assert run.encoding.input_ids[0, n] != second.encoding.input_ids[0, n]
    one, g_one = run.gradients(run.hidden, [span.positions])
    two, g_two = second.gradients(second.hidden, [other.positions])
    score, gradient = both.gradients(both.hidden, [span.positions])
    assert float(score[0]) == pytest.approx(float(one[0] - two[0]), abs=1e-4)
    torch.testing.assert_close(gradient[0, :n], g_one[0, :n] - g_two[0, :n], rtol=1e-3, atol=1e-5)
    assert not gradient[0, n:].any()
    delta = torch.randn_like(run.hidden) * 0.1
    delta[n:] = 0
    moved = torch.zeros_like(second.hidden)
    moved[:n] = delta[:n]
    wanted = run.scores([delta], span.positions) - second.scores([moved], other.positions)
    torch.testing.assert_close(both.scores([delta], span.positions), wanted, rtol=1e-4, atol=1e-4)


def test_attributions_of_a_difference_add_up(hooked, study, sae):
    """The sum over all entries is the difference lost by removing them all; the score is the difference itself."""
    found = attribute(
        hooked,
        study,
        sae,
        0,
        REPORT,
        candidates=None,
        top=100_000,
        instead=OTHER,
        roles="image_only",
        n_check=8,
    )
    (item,) = found.sentences
    assert item.check is not None
    assert item.check.completeness_error <= 0.05
    assert item.check.sum_of_attributions == pytest.approx(float(item.value.sum()), abs=1e-3)
    first, second = (
        attribute(hooked, study, sae, 0, text, check=False, candidates=4).sentences[0].score
        for text in (REPORT, OTHER)
    )
    assert item.score == pytest.approx(first - second, abs=1e-3)
    assert item.instead == OTHER
    assert found.table()["instead"].tolist() == [OTHER]


def test_with_all_entries_the_path_removes_all_of_them(hooked, study, sae, run):
    """Every active entry is a candidate, of either sign, and the true difference is that of removing them all."""
    found = attribute(hooked, study, sae, 0, REPORT, candidates=None, top=100_000, roles="image_only")
    (item,) = found.sentences
    here = (run.encoding.view[0] >= 0).nonzero()[:, 0]
    entries, _ = active_entries(sae, run.hidden, here)
    assert item.n_candidates == len(entries) == len(item.value)
    assert (item.value < 0).any()
    assert (item.value > 0).any()
    everything = entries.delta(torch.arange(len(entries)))
    base, without = run.scores([torch.zeros_like(everything), -everything], item.sentence.positions).tolist()
    assert item.check is not None
    assert item.check.true_difference == pytest.approx(base - without, abs=1e-3)
    assert float(item.value.sum()) == pytest.approx(base - without, rel=0.06, abs=0.02)


def test_several_hook_points_in_one_call(hooked, study, sae):
    """Each hook point's answer equals its own call, and entries, bias and error add up to gradient times stream."""
    late = copy.deepcopy(sae)
    late.cfg.metadata.hook_name = "blocks.5.hook_resid_post"
    found = attribute_at_points(
        hooked,
        study,
        [sae, late],
        REPORT,
        sentence=0,
        method="gradient",
        candidates=None,
        top=100_000,
        check=False,
    )
    assert list(found) == [HOOK, "blocks.5.hook_resid_post"]
    for place, answer in found.items():
        (item,) = answer.sentences
        alone = attribute(
            hooked, study, sae, 0, REPORT, place, method="gradient", candidates=None, top=100_000, check=False
        ).sentences[0]  # fmt: skip
        np.testing.assert_allclose(item.value, alone.value, atol=1e-5)
        point = ResidualRun(hooked, encode_with_report(hooked, study, REPORT), place)
        gradient = point.gradients(point.hidden, [item.sentence.positions])[1][0]
        whole = float((gradient * point.hidden).sum())
        assert float(item.value.sum()) + item.bias + item.error == pytest.approx(whole, abs=2e-2)
    with pytest.raises(ConfigError, match="one SAE per hook point"):
        attribute_at_points(hooked, study, [sae, sae], REPORT)


def test_a_backward_pass_in_segments_is_the_same(run, hooked, monkeypatch):
    """Gradients do not depend on how many blocks one graph holds; the budget decides that number."""
    spans = [s.positions for s in report_sentences(run.encoding, hooked.tokenizer)]
    assert run._segment > 3  # the default budget holds the graph of all blocks of this model
    scores, gradients = run.gradients(run.hidden, spans)
    delta = torch.randn_like(run.hidden) * 0.1
    path = run.path_gradient(delta, [-1.0, -0.3], [0.4, 0.6], spans[0])
    for segment in (1, 2, 3):
        monkeypatch.setattr(run, "_segment", segment)
        again, found = run.gradients(run.hidden, spans)
        torch.testing.assert_close(again, scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            run.path_gradient(delta, [-1.0, -0.3], [0.4, 0.6], spans[0]), path, rtol=1e-3, atol=1e-5
        )
    assert ResidualRun(hooked, run.encoding, HOOK, budget_bytes=1)._segment == 1


def test_refusals(hooked, study, sae):
    """Several sentences, and texts that do not differ where they must, are errors."""
    with pytest.raises(ConfigError, match="Name one"):
        attribute(hooked, study, sae, report=REPORT, instead=OTHER)
    with pytest.raises(PromptError, match="then differ"):
        attribute(hooked, study, sae, 0, REPORT, instead="A nasogastric tube is seen.")
    with pytest.raises(PromptError, match="cannot be compared"):
        attribute(hooked, study, sae, 0, REPORT, instead="")

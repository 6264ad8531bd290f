"""Shared prompts: what they write is what `generate` writes under the same interventions, row for row."""

import math

import pytest
import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.maira2 import TokenRole, generate_reports
from sae_lens_maira.steering import Ablate, Add, Direction, steering
from sae_lens_maira.steering.positions import everywhere, patches, report
from sae_lens_maira.steering.prompts import Job, SharedPrompts

HOOK = "blocks.3.hook_resid_post"
BUDGET = 40


@pytest.fixture(scope="module")
def prompts(phantom, few):
    return SharedPrompts(phantom, HOOK, few)


@pytest.fixture(scope="module")
def jobs():
    generator = torch.Generator().manual_seed(0)
    strong = Direction(vector=torch.randn(128, generator=generator), strength=1.0, where=patches())
    return {
        "plain": Job([0, 1, 2, 3]),
        "direction": Job([3, 1, 0], [strong]),
        "latents": Job([0, 2], [Add(latents=(3, 40), strength=4.0, where=patches()), Ablate(latents=(5,))]),
        "everywhere": Job([0, 1, 2, 3], [Add(latents=(3, 40), strength=6.0, where=everywhere())]),
        "report": Job([1, 2], [Add(latents=(3,), strength=6.0, where=report(2, 20))]),
    }


@pytest.fixture(scope="module")
def written(prompts, jobs, steering_sae, p99):
    made = prompts.write_all(list(jobs.values()), steering_sae, p99, BUDGET, measure_kl=True)
    return dict(zip(jobs, made, strict=True))


@pytest.mark.parametrize("name", ["plain", "direction", "latents", "everywhere", "report"])
def test_texts_are_those_of_generate(phantom, few, steering_sae, p99, jobs, written, name):
    """Jobs that share batches, prompts of unequal length, rows that leave early: the same texts, in the jobs' order."""
    job = jobs[name]
    studies = [few[i] for i in job.which]
    if not job.interventions:
        expected = generate_reports(phantom.model, phantom.processor, studies, max_new_tokens=BUDGET)
    else:
        encoding = phantom.processor.encode(studies)
        with steering(phantom, steering_sae, HOOK, job.interventions, encoding, p99) as run:
            expected = run.reports(phantom.processor, BUDGET)
    assert written[name].texts == [r.text for r in expected]
    if name != "plain":
        plain = [written["plain"].texts[i] for i in job.which]
        assert written[name].texts != plain, "the intervention changes nothing, so the test would not fail"


def test_divergence_is_that_of_two_forward_passes(phantom, few, jobs, written):
    """KL by hand: log-softmax of a plain and of a steered pass over the unsteered report."""
    job, study = jobs["direction"], few[3]
    text = written["plain"].texts[3]
    encoding = phantom.processor.encode([study], report=[text], padding_side="right")
    with torch.no_grad():
        base = phantom.model(**encoding.model_inputs(), use_cache=False).logits[:, :-1].log_softmax(-1)
    with steering(phantom, None, HOOK, job.interventions, encoding) as run:
        moved = run.logits()[:, :-1].log_softmax(-1)
    here = encoding.roles[:, 1:] == TokenRole.REPORT
    by_hand = (base.exp() * (base - moved)).sum(-1)[here]
    # A report that was cut has no closing token.
    by_hand = by_hand[: len(written["plain"].ids[3])].mean()
    assert written["direction"].kl[0] == pytest.approx(float(by_hand), rel=0.02)
    assert all(abs(value) < 1e-3 for value in written["plain"].kl)


def test_perplexity_is_that_of_a_forward_pass(phantom, few, prompts):
    """exp of the mean loss of the report's tokens, on studies of unequal length."""
    texts = ["There is a small left pleural effusion.", "The heart is enlarged. The lungs are clear."]
    found = prompts.perplexity([2, 0], texts)
    for number, text, value in zip((2, 0), texts, found, strict=True):
        encoding = phantom.processor.encode([few[number]], report=[text], padding_side="right")
        with torch.no_grad():
            logp = phantom.model(**encoding.model_inputs(), use_cache=False).logits[0, :-1].log_softmax(-1)
        own = logp.gather(-1, encoding.input_ids[0, 1:, None])[:, 0][
            encoding.roles[0, 1:] == TokenRole.REPORT
        ]
        assert value == pytest.approx(math.exp(-float(own.mean())), rel=1e-3)


def test_model_is_as_before(phantom, few, prompts, jobs, steering_sae, p99):
    """All blocks are in place afterwards, also after an error in the middle."""
    blocks = list(phantom.model.model.language_model.layers)
    with pytest.raises(InterventionError, match="0 to 63"):
        prompts.write([0], [Add(latents=(64,))], sae=steering_sae, p99=p99)
    assert list(phantom.model.model.language_model.layers) == blocks


def test_bad_input(phantom, few, prompts):
    """Points inside a block are refused, and schedules that never fire."""
    with pytest.raises(InterventionError, match="hook_resid_post"):
        SharedPrompts(phantom, "blocks.3.hook_mlp_out", few)
    alone = [i for i, study in enumerate(few) if study.lateral is None][:1]
    direction = Direction(vector=torch.ones(128), where=patches("lateral"))
    with pytest.raises(InterventionError, match="never fired"):
        prompts.write(alone, [direction])


def test_a_small_budget_gives_the_same_reports(phantom, few, prompts, jobs, written, steering_sae, p99):
    """With no memory to spare one study runs at a time and prompts are run again; tokens and KL stay the same."""
    tight = SharedPrompts(phantom, HOOK, few, budget=1)
    made = tight.write_all(
        [jobs["direction"], jobs["everywhere"]], steering_sae, p99, BUDGET, measure_kl=True
    )
    for name, out in zip(("direction", "everywhere"), made, strict=True):
        assert out.texts == written[name].texts
        assert out.kl == pytest.approx(written[name].kl, rel=1e-3, abs=1e-5)
    assert tight.prompts.used == max(tight.prompts._size(p) for p in tight.prompts._values.values())


def test_stored_prompts_stay_within_the_budget(phantom, few):
    """Bytes held are those of the tensors, and the least recently used prompts are dropped above the limit."""
    everything = SharedPrompts(phantom, HOOK, few)
    everything.unsteered(range(len(few)), 5)
    held = list(everything.prompts._values.values())
    assert everything.prompts.used == sum(prompt.nbytes for prompt in held)
    assert len(held[0].keys) == 4, "keys and values of the blocks up to the hook point, not of all 8"
    some = SharedPrompts(phantom, HOOK, few, budget=3 * sum(sorted(p.nbytes for p in held)[-2:]))
    some.unsteered(range(len(few)), 5)
    assert some.prompts.used <= some.prompts.limit
    assert 0 < len(some.prompts._values) < len(few)

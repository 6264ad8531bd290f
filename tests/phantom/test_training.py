"""Training the phantom: batches depend on the step alone, a killed run resumes, the result loads as MAIRA-2 does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.maira2 import load_maira2
from sae_lens_maira.phantom import PhantomTraining, train_phantom, training
from sae_lens_maira.phantom.corpus import Corpus, box_cover
from sae_lens_maira.phantom.training import build_processor

SMALL = PhantomTraining(
    studies=24,
    vocab_size=700,
    sight_steps=3,
    sight_batch=4,
    steps=4,
    polish_steps=2,
    polish_studies=40,
    batch=4,
    warmup=2,
    autocast=False,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(build_processor(SMALL), SMALL.studies, SMALL.seed, grid=8)


def test_box_cover_sums_to_the_area():
    """The shares of all patches add up to the box's area, and a patch inside is covered whole."""
    cover = box_cover((0.1, 0.25, 0.55, 0.75), 8)
    assert cover.sum() / 64 == pytest.approx(0.45 * 0.5, abs=1e-6)
    assert cover.reshape(8, 8)[3, 2] == pytest.approx(1)
    assert cover.reshape(8, 8)[0, 0] == 0


def test_stream_can_be_entered_anywhere(corpus):
    """Batch 17 is the same whether the stream starts at 0 or, after a resume, at 17."""
    whole = list(corpus.batches(4, seed=1, start=0, stop=20))[17]
    resumed = next(corpus.batches(4, seed=1, start=17, stop=20))
    assert torch.equal(whole.ids, resumed.ids)
    assert torch.equal(whole.pixels, resumed.pixels)


def test_loss_is_taken_over_the_report_only(corpus):
    """Scored tokens end with </s> and hold no image placeholder and no padding."""
    batch = next(corpus.batches(6, seed=2, start=0, stop=1))
    for ids, scored, attention in zip(batch.ids, batch.scored, batch.attention, strict=True):
        assert ids[scored][-1] == 2
        assert attention[scored].all()
        where = scored.nonzero().flatten()
        assert torch.equal(where, torch.arange(where[0], where[-1] + 1))


def test_placeholders_match_images(corpus):
    """Every batch has 64 placeholders per image, in whatever mixture of one, two and three images."""
    image_id = int(np.bincount(corpus.examples["findings"][0].ids.numpy()).argmax())
    batches = list(corpus.batches(5, seed=3, start=0, stop=4))
    assert len(batches) == 4
    for batch in batches:
        assert int((batch.ids == image_id).sum()) == 64 * len(batch.pixels)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_resumed_run_gives_the_weights_of_an_unbroken_one(tmp_path, monkeypatch):
    """A run that dies one step behind a checkpoint of phase 2 and is resumed ends with bit-equal weights."""
    whole = train_phantom(SMALL, tmp_path / "whole")
    steps = 0

    def step_then_die(self, *args):
        nonlocal steps
        step(self, *args)
        steps += 1
        if steps == SMALL.sight_steps + SMALL.checkpoint_every + 1:
            raise Killed

    with monkeypatch.context() as patch:
        step = training._Loop.step
        patch.setattr(training._Loop, "step", step_then_die)
        with pytest.raises(Killed):
            train_phantom(SMALL, tmp_path / "broken")
    resumed = train_phantom(SMALL, tmp_path / "broken")
    a, b = (load_maira2(folder, dtype=torch.float32).model.state_dict() for folder in (whole, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_other_settings_do_not_resume(tmp_path):
    """A folder with checkpoints of other settings is refused, not silently continued."""
    train_phantom(SMALL, tmp_path)
    with pytest.raises(ConfigError, match="other settings"):
        train_phantom(replace(SMALL, lr=1e-4), tmp_path)

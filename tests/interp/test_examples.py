"""Examples: no patient on both sides whatever the record, even sampling, windows, places."""

import random
from dataclasses import replace

import pytest

from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.examples import (
    active_tokens,
    peak_word,
    sample,
    scaled,
    split_examples,
    text_of,
    train_patients,
    window,
    wrong_tokens,
)
from sae_lens_maira.interp.score import patch_words, place, wrong_place

KEYS = ("pleural_effusion_left", "pneumothorax_right", "pacemaker")


@pytest.mark.parametrize("seed", range(25))
def test_no_patient_is_in_both_halves_of_any_two_latents(hand_made, seed):
    """Property, over seeds, shares and latents: train patients of one latent are test patients of none."""
    records = hand_made(KEYS)
    share = 0.1 + 0.8 * random.Random(seed).random()
    train = train_patients(records.studies.values(), seed, share)
    halves = [split_examples(record, records.studies, train) for record in records.stream()]
    shown = {e.study.patient for half in halves for e in half.train}
    asked = {e.study.patient for half in halves for e in half.test}
    assert shown
    assert asked
    assert not shown & asked
    for half in halves:
        names = [e.context.study for e in (*half.train, *half.test)]
        assert len(names) == len(set(names))


def test_split_depends_on_the_seed_and_not_on_the_order_of_studies(hand_made):
    studies = list(hand_made(KEYS).studies.values())
    assert train_patients(studies, 1) == train_patients(reversed(studies), 1)
    assert train_patients(studies, 1) != train_patients(studies, 2)
    with pytest.raises(RecordError, match="two or more"):
        train_patients(studies[:1])


def test_sampling_is_even_over_the_intervals(hand_made):
    """With enough examples everywhere, no interval gives two more than another."""
    records = hand_made(KEYS)
    half = split_examples(records[0], records.studies, frozenset())
    chosen = sample(half.test, 20, 15, random.Random(0))
    counts = [sum(e.interval == i for e in chosen) for i in range(5)]
    assert sum(counts) == 20
    assert max(counts) - min(counts) <= 1
    assert sum(not e.active for e in chosen) == 15


def test_intervals_hold_their_values(hand_made):
    records = hand_made(KEYS)
    record = records[1]
    for e in split_examples(record, records.studies, frozenset()).test:
        if e.active:
            assert record.intervals[e.interval].low <= e.context.value
    broken = replace(record, zero=(*record.zero, replace(record.top[0], token_indices=(), token_values=())))
    with pytest.raises(RecordError, match="contradicts"):
        split_examples(broken, records.studies, frozenset())


def test_activations_are_whole_numbers_to_ten():
    assert [scaled(v, 8.0) for v in (None, 0.0, 0.01, 4.0, 8.0, 9.0)] == [0, 0, 1, 5, 10, 10]


def test_windows_mark_the_firing_words(hand_made):
    records = hand_made(KEYS)
    record = records[0]
    example = next(
        e
        for e in split_examples(record, records.studies, frozenset()).test
        if e.active and e.context.value > 5
    )
    marked = window(example, "text", random.Random(0), active_tokens(example))
    assert "<<effusion>>" in marked
    assert marked.count("<<") == 1
    assert peak_word(example.context) == "effusion"
    wrong = wrong_tokens(example, "text", random.Random(0))
    assert len(wrong) == 1
    assert not wrong & active_tokens(example)


def test_tokens_join_to_words_and_neighbours_share_a_mark():
    assert text_of(("▁ple", "ural", "▁eff", "usion", "."), {2, 3}) == "pleural <<effusion>>."
    assert text_of(("clear", "lungs", "."), {1}) == "clear <<lungs>>."


def test_image_left_is_the_patients_right(hand_made):
    assert patch_words("frontal", 36, 0, 37, 37) == "right lower zone of the frontal image"
    assert patch_words("frontal", 0, 36, 37, 37) == "left upper zone of the frontal image"
    assert patch_words("prior", 18, 18, 37, 37) == "central mid zone of the prior frontal image"
    records = hand_made(KEYS, kind="image")
    hit = records[0].top[0]
    assert place(hit) == "left lower zone of the frontal image"
    assert wrong_place(hit, random.Random(0)) not in (None, place(hit))

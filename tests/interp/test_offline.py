"""The offline explainer names the finding and side a latent follows; reading a sentence finds them again."""

import pytest

from sae_lens_maira.interp.examples import split_examples, train_patients
from sae_lens_maira.interp.offline import category_of, contrast, named_findings
from sae_lens_maira.interp.score import Verdict, score_of
from sae_lens_maira.stats import wilson

KEYS = ("pleural_effusion_left", "pleural_effusion_right", "pneumothorax_left", "pacemaker", "nodule")


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_sentence_names_the_finding_and_its_side(hand_made, kind):
    records = hand_made(KEYS, kind=kind)
    train = train_patients(records.studies.values())
    for key, record in zip(KEYS, records.stream(), strict=True):
        printed = contrast(split_examples(record, records.studies, train).train)
        assert printed.text
        assert named_findings(printed.text, records.meta.findings) == {key}
        assert printed.category == ("device" if key == "pacemaker" else "pathology")
        if kind == "image":
            assert "left lower zone of the frontal image" in printed.text


def test_only_train_examples_are_read(hand_made):
    """Emptying the test half changes nothing; without silent studies there is no contrast."""
    records = hand_made(KEYS)
    train = train_patients(records.studies.values())
    half = split_examples(records[0], records.studies, train)
    assert contrast(half.train) == contrast(half.train)
    assert contrast([e for e in half.train if e.active]).status == "too_rare"


def test_reading_sides_quotes_and_places():
    keys = ("pleural_effusion_left", "pleural_effusion_right", "nodule")
    assert named_findings("A left pleural effusion.", keys) == {"pleural_effusion_left"}
    assert named_findings("Pleural effusions", keys) == {"pleural_effusion_left", "pleural_effusion_right"}
    assert named_findings('Words "nodule"; heart', keys) == frozenset()
    assert named_findings("Nodule; patches in the left lower zone", keys) == {"nodule"}
    assert named_findings("Pleural effusion in the left lower zone", keys[:2]) == set(keys[:2])
    assert category_of(None, ["unchanged"]) == "longitudinal change"
    assert category_of(None, []) == "other"


def test_counts_and_interval():
    """8 of 10 hits, 9 of 10 rejections, 3 unusable: balanced accuracy 0.85, nothing imputed."""
    verdicts = [Verdict(True, i < 8, "high" if i < 5 else "low") for i in range(10)]
    verdicts += [Verdict(False, i == 0) for i in range(10)] + [Verdict(True, None, "low")] * 3
    score = score_of("detection", "truth", verdicts)
    assert (score.asked, score.answered, score.unusable) == (23, 20, 3)
    assert score.balanced_accuracy == pytest.approx(0.85)
    assert score.low is not None
    assert score.high is not None
    assert score.low < 0.85 < score.high
    assert score.recall_by_interval == (("high", 1.0, 5), ("low", 0.6, 5))
    assert score_of("detection", "truth", verdicts[:10]).balanced_accuracy is None
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)

"""Errors of reports: each kind is planted in a true report of the phantom once and is counted once."""

import sys
import types

import numpy as np
import pytest

from sae_lens_maira.errors import ConfigError, StudyError
from sae_lens_maira.phantom import generate_studies, phantom_reader
from sae_lens_maira.studies import Finding, Study
from sae_lens_maira.studies.outside_metrics import MetricScores, chexbert_f1, compare_metric, radgraph_f1
from sae_lens_maira.studies.report_metrics import ERRORS, count_errors, report_errors
from sae_lens_maira.studies.statements import Statement, rule_statements

READER = phantom_reader().statements
assert READER is not None


@pytest.fixture(scope="module")
def studies() -> list[Study]:
    return generate_studies(300, seed=11)


def errors_of(texts: list[str], studies: list[Study]) -> dict[str, int]:
    assert READER is not None
    counts, source = report_errors(texts, studies, READER)
    assert source == "truth"
    return {kind: number for kind, number in counts.totals.items() if number}


def test_true_reports_have_no_errors(studies):
    assert READER is not None
    texts = [study.report or "" for study in studies]
    assert errors_of(texts, studies) == {}
    counts, _ = report_errors(texts, studies, READER)
    assert counts.measures()[0].tolist() == [1.0, 1.0] + [0.0] * 7
    assert counts.stated.sum() == counts.present.sum() == sum(len(s.present_keys) for s in studies)


PLANTED = {
    "false_finding": (False, lambda text: text + " There is a pacemaker."),
    "omission": (False, lambda text: text.replace("There is a nodule in the left upper zone.", "")),
    "wrong_side": (False, lambda text: text.replace("left upper", "right upper")),
    "wrong_place": (False, lambda text: text.replace("left upper", "left lower")),
    "wrong_change": (True, lambda text: text.replace("has increased since", "has decreased since")),
    "false_comparison": (False, lambda text: text.replace("There is a nodule", "There is a new nodule")),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_error_is_counted_once_and_as_what_it_is(kind, studies):
    """300 reports, one error in one of them."""
    prior, plant = PLANTED[kind]
    change = "larger" if prior else None
    nodule = Finding(name="nodule", side="left", box=(0.6, 0.2, 0.7, 0.3), change=change)
    text = (
        "The nodule in the left upper zone has increased since the prior. No pneumothorax."
        if prior
        else "There is a nodule in the left upper zone. No pneumothorax."
    )
    radiograph = np.zeros((8, 8), dtype=np.uint8)
    before = radiograph if prior else None
    study = Study(
        study_id="x", patient_id="x", frontal=radiograph, prior_frontal=before, report=text, truth=(nodule,)
    )
    assert study.has_prior == prior
    everyone, texts = [*studies, study], [*(s.report or "" for s in studies), text]
    assert errors_of(texts, everyone) == {}
    assert plant(text) != text
    assert errors_of([*texts[:-1], plant(text)], everyone) == {kind: 1}


@pytest.mark.parametrize(
    ("stated", "true", "prior", "wanted"),
    [
        ([], [], False, {}),
        ([("effusion", "left")], [("effusion", None)], False, {}),
        ([("effusion", None)], [("effusion", "left"), ("effusion", "right")], False, {"omission": 1}),
        ([("effusion", "left"), ("effusion", "right")], [("effusion", "right")], False, {"false_finding": 1}),
        ([("effusion", "left", None, "removed")], [("effusion", "left", None, "larger")], True, {"wrong_change": 1}),
        ([("effusion", "left", None, "larger")], [("effusion", "left", None, "removed")], True, {"wrong_change": 1}),
        ([("effusion", "left", None, "removed")], [], True, {"wrong_change": 1}),
        ([("effusion", "left", None, "removed")], [("effusion", "left")], False,
         {"omission": 1, "false_comparison": 1}),
        ([], [("effusion", "left", None, "removed")], True, {}),
        ([("", None, None, "compared")], [("", None, None, "unchanged")], True, {}),
        ([("", None, None, "compared")], [], False, {"false_comparison": 1}),
        ([("effusion", "left", None, "new")], [("effusion", "right", None, "larger")], True,
         {"wrong_side": 1, "wrong_change": 1}),
        ([("nodule", "left", "upper")], [("nodule", "left", "lower"), ("nodule", "right", "upper")], False,
         {"wrong_place": 1, "omission": 1}),
    ],
)  # fmt: skip
def test_rules_of_counting(stated, true, prior, wanted):
    """Each pair of statements counts as exactly the expected errors."""
    report, reference = ([Statement(*one) for one in part] for part in (stated, true))
    counts = count_errors([report], [reference], [prior], ("effusion", "nodule"))
    assert {kind: n for kind, n in counts.totals.items() if n} == wanted


def test_f1_and_the_paired_difference():
    """Micro F1 counts a wrong side as stated and present; equal reports differ by exactly 0."""
    true = [[Statement("effusion", "left")], [Statement("nodule")], [Statement("effusion", "right")]] * 20
    good = true
    bad = [[Statement("effusion", "right")], [], [Statement("effusion", "right")]] * 20
    prior = [False] * 60
    before, after = (count_errors(part, true, prior, ("effusion", "nodule", "never")) for part in (bad, good))
    micro, macro, total, *rates = before.measures()[0]
    assert micro == pytest.approx(2 * 20 / (40 + 60))
    assert macro == pytest.approx((2 * 20 / 80 + 0) / 2)
    assert dict(zip(ERRORS, rates, strict=True))["wrong_side"] == pytest.approx(1 / 3)
    assert total == pytest.approx(2 / 3)
    assert before.without("effusion").totals == dict.fromkeys(ERRORS, 0) | {"omission": 20}
    table = after.change_from(before).set_index("measure")
    assert table.loc["micro_f1", "change"] == pytest.approx(0.6)
    assert table.loc["micro_f1", "low"] > 0.4
    assert table.loc["omission_per_report", "high"] < 0
    same = before.change_from(before)
    assert not same[["change", "low", "high"]].to_numpy().any()
    assert before.by_finding().set_index("finding").loc["effusion", "wrong_side"] == 20
    with pytest.raises(StudyError, match="other references"):
        after.change_from(count_errors(bad, bad, prior, ("effusion", "nodule", "never")))
    with pytest.raises(StudyError, match="names mass"):
        count_errors([[Statement("mass")]], [[]], [False], ("effusion",))


def test_free_text_is_read_with_sides_places_and_changes():
    read = rule_statements().read
    text = (
        "Compared to the prior radiograph, the small left pleural effusion has increased. Stable bibasilar "
        "atelectasis. The right pneumothorax has resolved. No focal consolidation."
    )
    assert set(read(text)) == {
        Statement("pleural_effusion", "left", None, "larger"),
        Statement("atelectasis", "left", "lower", "unchanged"),
        Statement("atelectasis", "right", "lower", "unchanged"),
        Statement("pneumothorax", "right", None, "removed"),
    }
    assert read("No change since the previous study.") == (Statement("", change="compared"),)
    assert read("Normal heart size. The lungs are clear.") == ()


class _F1RadGraph:
    """Stands in for radgraph.F1RadGraph: (means, three lists of one score per report, annotations, annotations)."""

    def __init__(self, *, reward_level: str, model_type: str = "radgraph") -> None:
        assert reward_level == "all"

    def __call__(self, hyps: list[str], refs: list[str]) -> tuple:
        scores = [float(h == r) for h, r in zip(hyps, refs, strict=True)]
        lists = (scores, [s / 2 for s in scores], [s / 4 for s in scores])
        return tuple(map(np.mean, lists)), lists, [{}] * len(hyps), [{}] * len(refs)


class _F1CheXbert:
    """Stands in for f1chexbert.F1CheXbert: (accuracy, agreement per report, reports of 14 and of 5 labels)."""

    def __init__(self, device: str | None = None) -> None:
        pass

    def __call__(self, hyps: list[str], refs: list[str]) -> tuple:
        same = np.array([h == r for h, r in zip(hyps, refs, strict=True)])
        table = {f"{kind} avg": {"f1-score": float(same.mean())} for kind in ("micro", "macro", "weighted")}
        return float(same.mean()), same, table, table


def test_outside_metrics_by_their_documented_interface(monkeypatch):
    monkeypatch.setitem(sys.modules, "radgraph", types.SimpleNamespace(F1RadGraph=_F1RadGraph))
    monkeypatch.setitem(sys.modules, "f1chexbert", types.SimpleNamespace(F1CheXbert=_F1CheXbert))
    references = ["a", "b", "c", "d"] * 10
    before, after = ["a", "x", "x", "x"] * 10, ["a", "b", "c", "x"] * 10
    table = compare_metric(radgraph_f1(model_type="radgraph-xl"), before, after, references).set_index(
        "measure"
    )
    assert table.loc["radgraph_simple", ["before", "after"]].tolist() == [0.25, 0.75]
    assert 0 < table.loc["radgraph_partial", "low"] < 0.25 < table.loc["radgraph_partial", "high"]
    table = compare_metric(chexbert_f1(device="cpu"), before, after, references).set_index("measure")
    assert table.loc["chexbert5_agreement", "change"] == 0.5
    assert table.loc["chexbert14_micro_f1", "after"] == 0.75
    assert np.isnan(table.loc["chexbert14_micro_f1", "low"])

    def words(reports, references):
        return MetricScores({"words": np.array([len(text.split()) for text in reports], dtype=float)})

    assert compare_metric(words, before, after, references)["change"].tolist() == [0.0]
    with pytest.raises(StudyError, match="expected as many"):
        compare_metric(words, before, after[1:], references)


def test_outside_metrics_are_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "radgraph", None)
    with pytest.raises(ConfigError, match="pip install radgraph"):
        radgraph_f1()

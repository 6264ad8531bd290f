"""Rule labels: scope of each cue, spans, aggregation; agreement with the samples of the radlabels package."""

import importlib.util
import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from sae_lens_maira.studies.labels import is_unknown, present_observations, rule_labels

REFERENCE = {
    "consolidation": "consolidation",
    "pleural_effusion": "pleural_effusion",
    "edema": "pulmonary_edema",
    "cardiomegaly": "cardiomegaly",
    "pneumonia": "pneumonia",
    "atelectasis": "atelectasis",
    "pneumothorax": "pneumothorax",
    "fracture": "fracture_generic",
}
FLOORS = {  # F1 of "present or uncertain"
    "consolidation": 0.95,
    "pleural_effusion": 0.93,
    "edema": 0.90,
    "cardiomegaly": 0.94,
    "pneumonia": 0.85,
    "atelectasis": 0.95,
    "pneumothorax": 0.87,
    "fracture": 0.94,
}


@pytest.mark.parametrize(
    ("text", "observation", "status"),
    [
        ("There is a small left pleural effusion.", "pleural_effusion", "present"),
        ("No pleural effusion or pneumothorax.", "pneumothorax", "absent"),
        ("No pneumothorax, small left effusion.", "pleural_effusion", "present"),
        ("No consolidation, large effusion, or pneumothorax.", "pleural_effusion", "absent"),
        ("No edema but there is consolidation.", "consolidation", "present"),
        ("No significant change in right pneumothorax.", "pneumothorax", "present"),
        ("Opacity may represent pneumonia.", "pneumonia", "uncertain"),
        ("Pneumonia cannot be excluded.", "pneumonia", "uncertain"),
        ("Opacity concerning for pneumonia.", "pneumonia", "present"),
        ("No opacity concerning for pneumonia.", "pneumonia", "absent"),
        ("Opacity suspicious for pneumonia, less likely edema.", "pneumonia", "present"),
        ("Opacity raises concern for pneumonia.", "pneumonia", "uncertain"),
        ("We cannot exclude pneumonia.", "pneumonia", "uncertain"),
        ("The pneumothorax has resolved.", "pneumothorax", "absent"),
        ("Effusion is not seen.", "pleural_effusion", "absent"),
        ("The heart size is normal.", "cardiomegaly", "absent"),
        ("The heart is mildly enlarged.", "cardiomegaly", "present"),
        ("The heart is not enlarged.", "cardiomegaly", "absent"),
        ("No evidence of acute\nfracture.", "fracture", "absent"),
        ("Possible effusion. Definite left pleural effusion.", "pleural_effusion", "present"),
    ],
)
def test_each_cue_governs_its_own_clause(text: str, observation: str, status: str) -> None:
    assert rule_labels(text)[observation].status == status


def test_what_is_not_mentioned_has_no_entry() -> None:
    labels = rule_labels("There is a rib fracture. Small pericardial effusion.")
    assert set(labels) == {"fracture"}
    assert rule_labels("") == {}


def test_the_span_points_at_the_mention_in_the_given_text() -> None:
    text = "FINDINGS:  Heart normal.\n  Mild  pulmonary\nedema."
    label = rule_labels(text)["edema"]
    assert text[slice(*label.span)] == "edema"
    assert label.evidence == "Mild pulmonary edema"


@pytest.mark.parametrize("run", [" " * 5000, "-" * 5000, "a" * 5000, "\n" * 5000, " \n - " * 1000])
def test_long_runs_take_little_time_and_leave_spans_right(run: str) -> None:
    """Patterns over unfolded runs took cubic time: 5,000 letters without a blank took more than a minute."""
    text = f"Heart normal. {run} Small left effusion."
    start = time.process_time()
    label = rule_labels(text)["pleural_effusion"]
    assert time.process_time() - start < 5
    assert (label.status, text[slice(*label.span)]) == ("present", "effusion")


def test_a_statement_outside_the_observations_is_readable_and_names_none() -> None:
    assert rule_labels("The cardiac and mediastinal silhouettes are stable.") == {}
    assert rule_labels("There is subcutaneous emphysema.") == {}
    assert is_unknown(rule_labels("INDICATION: Evaluate for pneumonia."))


def test_sections_that_ask_are_not_evidence() -> None:
    labels = rule_labels("INDICATION: Pneumonia.\n\nFINDINGS: Lungs are clear.")
    assert "pneumonia" not in labels
    assert labels["no_finding"].status == "present"


def test_no_finding_needs_everything_but_devices_to_be_denied() -> None:
    assert "no_finding" in rule_labels("Picc line in place. No effusion.")
    assert "no_finding" not in rule_labels("Possible effusion.")
    assert present_observations(["Left pneumothorax."]) == [frozenset({"pneumothorax"})]


@pytest.mark.slow
def test_agreement_with_radlabels_samples(capsys: pytest.CaptureFixture[str]) -> None:
    """Floors of F1; the samples mostly count hedged mentions ("may represent") as present, so both are printed."""
    spec = importlib.util.find_spec("radlabels")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("radlabels is not installed")
    root = Path(spec.submodule_search_locations[0]) / "samples"
    truth = json.loads((root / "synthetic_labels.json").read_text(encoding="utf-8"))
    counts: dict[tuple[str, str], Counter[tuple[bool, bool]]] = {}
    for name, expected in truth.items():
        labels = rule_labels((root / "synthetic_reports" / f"{name}.txt").read_text(encoding="utf-8"))
        for ours, theirs in REFERENCE.items():
            status = labels[ours].status.value if ours in labels else "absent"
            reference = expected.get(theirs, "definitely absent")
            strict = (reference == "definitely present", status == "present")
            loose = (reference != "definitely absent", status != "absent")
            counts.setdefault((ours, "present"), Counter())[strict] += 1
            counts.setdefault((ours, "present or uncertain"), Counter())[loose] += 1
    scores = {}
    rows = [f"{'observation':18} {'counted':22} {'n':>4} precision recall   F1"]
    for (ours, how), count in counts.items():
        hit, extra, missed = count[True, True], count[False, True], count[True, False]
        scores[ours, how] = 2 * hit / (2 * hit + extra + missed)
        rows.append(
            f"{ours:18} {how:22} {hit + missed:4} {hit / (hit + extra):9.3f} {hit / (hit + missed):6.3f} "
            f"{scores[ours, how]:.3f}"
        )
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(rows) + "\n")
    assert len(truth) == 1000
    below = {
        o: scores[o, "present or uncertain"]
        for o, f in FLOORS.items()
        if scores[o, "present or uncertain"] < f
    }
    assert not below

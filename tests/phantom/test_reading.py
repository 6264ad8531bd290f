"""The rule reader: exact on the phantom's own reports, sensible on other text."""

import pytest

from sae_lens_maira.phantom import FINDING_KEYS, read_report
from sae_lens_maira.studies import Study

pytestmark = pytest.mark.compat


def test_reads_two_thousand_reports_exactly(many_studies: list[Study]) -> None:
    """Presence, changes and sides all equal the truth; so does the presence that the prior report states."""
    for study in many_studies:
        read = read_report(study.report or "")
        truth = study.truth or ()
        assert read.present == study.present_keys
        assert read.changes == {f.key: f.change for f in truth if f.change is not None}
        assert {f.key: f.side for f in truth if f.side is not None}.items() <= read.sides.items()
        assert not read.denied & read.present
        if study.prior_report is not None:
            before = read_report(study.prior_report)
            assert before.present == {f.key for f in truth if f.change != "new"}
            assert before.changes == {}


@pytest.mark.parametrize(
    ("text", "present", "changes"),
    [
        ("", set(), {}),
        ("No pleural effusion or pneumothorax.", set(), {}),
        ("The lungs are clear without focal consolidation.", set(), {}),
        ("Left pleural effusion without pneumothorax.", {"pleural_effusion_left"}, {}),
        ("Moderate right pleural effusion, but no pneumothorax.", {"pleural_effusion_right"}, {}),
        (
            "There is no change in the left pneumothorax.",
            {"pneumothorax_left"},
            {"pneumothorax_left": "unchanged"},
        ),
        ("The heart is not enlarged.", set(), {}),
        ("The heart remains enlarged.", {"cardiomegaly"}, {"cardiomegaly": "unchanged"}),
        ("The previously seen nasogastric tube has been removed.", set(), {"nasogastric_tube": "removed"}),
        ("The nasogastric tube is no longer seen.", set(), {"nasogastric_tube": "removed"}),
        ("Bilateral pleural effusions.", {"pleural_effusion_left", "pleural_effusion_right"}, {}),
        ("A pleural effusion is present.", set(), {}),  # no side printed: neither key may be claimed
        ("Pulmonary oedema has improved", {"oedema"}, {"oedema": "smaller"}),
        ("LEFT LUNG NODULE; NEW RIGHT RIB FRACTURE", {"nodule", "rib_fracture"}, {"rib_fracture": "new"}),
        ("A right internal jugular central venous", {"central_venous_line"}, {}),  # cut off by max_new_tokens
    ],
)
def test_single_texts(text: str, present: set[str], changes: dict[str, str]) -> None:
    """Findings and change words of single texts are read as expected."""
    read = read_report(text)
    assert read.present == present
    assert read.changes == changes


def test_denials_name_both_sides() -> None:
    read = read_report("No pneumothorax. Right pleural effusion.")
    assert read.denied == {"pneumothorax_left", "pneumothorax_right"}
    assert read.sides == {"pleural_effusion_right": "right"}


def test_every_key_can_be_read(many_studies: list[Study]) -> None:
    seen = set().union(*(read_report(study.report or "").present for study in many_studies))
    assert seen == set(FINDING_KEYS)

"""Study records: keys, checks on construction, licence, priors."""

import numpy as np
import pytest

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies import Finding, GroundedStatement, Licence, Study

pytestmark = pytest.mark.compat


def study(**changes: object) -> Study:
    fields: dict[str, object] = {"study_id": "s1", "patient_id": "p1", "frontal": np.zeros((8, 8), np.uint8)}
    return Study(**{**fields, **changes})  # pyright: ignore[reportArgumentType]  # bad values are the point


@pytest.mark.parametrize(
    ("name", "side", "key"),
    [
        ("pleural effusion", "left", "pleural_effusion_left"),
        ("pneumothorax", "right", "pneumothorax_right"),
        ("cardiomegaly", None, "cardiomegaly"),
        ("nodule", "left", "nodule"),
        ("rib fracture", "right", "rib_fracture"),
    ],
)
def test_key_carries_the_side_only_where_sides_are_separate_labels(
    name: str, side: str | None, key: str
) -> None:
    assert Finding(name=name, side=side).key == key


@pytest.mark.parametrize(
    ("wrong", "printed"),
    [
        ({"side": "middle"}, "side 'middle'"),
        ({"size": "huge"}, "size 'huge'"),
        ({"change": "worse", "present": True}, "change 'worse'"),
        ({"name": "Nodule"}, "lower-case"),
        ({"name": ""}, "non-empty"),
        ({"change": "removed"}, "present=True"),
        ({"present": False}, "present=False"),
        ({"box": (0.5, 0.1, 0.4, 0.2)}, "min <= max"),
        ({"box": (0.0, 0.0, 1.0, 1.2)}, "min <= max"),
    ],
)
def test_a_finding_that_contradicts_itself_is_refused(wrong: dict[str, object], printed: str) -> None:
    fields: dict[str, object] = {"name": "nodule", **wrong}
    with pytest.raises(StudyError, match=printed):
        Finding(**fields)  # pyright: ignore[reportArgumentType]


def test_a_grounded_statement_checks_its_boxes() -> None:
    assert GroundedStatement("No pneumothorax.").boxes == ()
    with pytest.raises(StudyError, match="min <= max"):
        GroundedStatement("A nodule.", ((0.3, 0.2, 0.2, 0.4),))


def test_a_study_is_credentialed_unless_told_otherwise() -> None:
    assert study().licence is Licence.CREDENTIALED
    assert study(licence="public").licence is Licence.PUBLIC
    with pytest.raises(StudyError, match=r"s1 .* licence was 'secret'"):
        study(licence="secret")


def test_ids_must_not_be_empty() -> None:
    with pytest.raises(StudyError, match="empty patient_id"):
        study(patient_id="")


def test_prior_is_an_image_or_a_report_and_change_needs_one() -> None:
    assert not study().has_prior
    assert study(prior_report="Clear.").has_prior
    assert study(prior_frontal=np.zeros((8, 8))).has_prior
    changed = (Finding(name="nodule", change="new"),)
    assert study(truth=changed, prior_report="Clear.").truth == changed
    with pytest.raises(StudyError, match="neither a prior image nor a prior report"):
        study(truth=changed)


def test_present_keys_leave_out_what_was_removed_and_need_a_truth() -> None:
    gone = Finding(name="pleural effusion", side="left", change="removed", present=False)
    here = Finding(name="oedema", change="new")
    assert study(truth=(gone, here), prior_report="x").present_keys == {"oedema"}
    with pytest.raises(StudyError, match="has no truth"):
        _ = study().present_keys

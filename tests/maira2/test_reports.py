"""Reading the model's output: whole, cut off, looping and malformed; writing is the inverse of reading."""

import random

import pytest

from sae_lens_maira.errors import PromptError
from sae_lens_maira.maira2 import GroundedFinding, Maira2Processor, format_grounded, parse_report

pytestmark = pytest.mark.compat

NODULE = "<obj>Nodule.<box><x10><y20><x30><y40></box></obj>"


def test_plain_text_is_stripped_and_has_no_findings() -> None:
    report = parse_report(" The heart is normal. ")
    read = (report.text, report.findings, report.complete, report.leftover)
    assert read == ("The heart is normal.", (), True, "")
    assert not parse_report("The heart", closed=False).complete


def test_grounded_text_gives_findings_with_bin_centres() -> None:
    report = parse_report(
        NODULE + "<obj>Normal heart.</obj><obj>Rods "
        "<box><x0><y0><x99><y99></box><box><x1><y2><x3><y4></box></obj>"
    )
    assert report.findings == (
        GroundedFinding("Nodule.", ((0.105, 0.205, 0.305, 0.405),)),
        GroundedFinding("Normal heart."),
        GroundedFinding("Rods", ((0.005, 0.005, 0.995, 0.995), (0.015, 0.025, 0.035, 0.045))),
    )
    assert report.text == "Nodule. Normal heart. Rods"
    assert report.complete
    assert report.leftover == ""


def test_writing_is_the_inverse_of_reading() -> None:
    dice = random.Random(0)
    findings = []
    for number in range(50):
        boxes = []
        for _ in range(dice.randrange(4)):
            x, y = (sorted(dice.choices(range(100), k=2)) for _ in range(2))
            boxes.append(tuple((bin_ + 0.5) / 100 for bin_ in (x[0], y[0], x[1], y[1])))
        findings.append(GroundedFinding(f"Finding {number}.", tuple(boxes)))
    text = format_grounded(findings)
    assert parse_report(text).findings == tuple(findings)
    assert format_grounded(parse_report(text).findings) == text


def test_every_coordinate_falls_into_its_own_bin() -> None:
    """0.29 * 100 is 28.999...: a coordinate on a border belongs to the upper bin, and 1.0 to the last."""
    for bin_ in range(100):
        text = format_grounded([GroundedFinding("a", ((bin_ / 100, 0.0, 1.0, 1.0),))])
        assert text == f"<obj>a<box><x{bin_}><y0><x99><y99></box></obj>"


@pytest.mark.parametrize(
    ("tail", "left"),
    [
        ("<obj>Effu", "<obj>Effu"),
        ("<obj>Effusion.<box><x1><y2>", "<obj>Effusion.<box><x1><y2>"),
        ("<obj>Effusion.<box><x1><y2><x3><y4></box>", "<obj>Effusion.<box><x1><y2><x3><y4></box>"),
        ("trailing words", "trailing words"),
        ("</obj>", "</obj>"),
        ("<obj></obj><box>", "<box>"),
    ],
)
def test_whole_findings_survive_a_cut_and_the_rest_is_reported(tail: str, left: str) -> None:
    report = parse_report(NODULE + tail, closed=False)
    assert [finding.text for finding in report.findings] == ["Nodule."]
    assert report.leftover == left
    assert not report.complete


def test_a_cut_finding_does_not_swallow_the_next() -> None:
    report = parse_report("<obj>Lost <box><x1>" + NODULE)
    assert [finding.text for finding in report.findings] == ["Nodule."]
    assert report.leftover == "<obj>Lost <box><x1>"
    assert not report.complete


def test_malformed_boxes_are_left_over_and_the_finding_kept() -> None:
    report = parse_report(
        "<obj>A<box><x30><y1><x10><y2></box><box><x1><y1><x2><y2></box><box><y1><x1><x2><y2></box></obj>"
    )
    assert report.findings == (GroundedFinding("A", ((0.015, 0.015, 0.025, 0.025),)),)
    assert report.leftover == "<box><x30><y1><x10><y2></box> <box><y1><x1><x2><y2></box>"
    assert not report.complete


def test_a_looping_generation_keeps_every_whole_repeat() -> None:
    report = parse_report(NODULE * 40 + "<obj>Nodule.<box><x10>", closed=False)
    assert len(report.findings) == 40
    assert report.leftover == "<obj>Nodule.<box><x10>"


@pytest.mark.parametrize(
    "finding",
    [
        GroundedFinding(" "),
        GroundedFinding("a<obj>"),
        GroundedFinding("a", ((0.5, 0.1, 0.4, 0.2),)),
        GroundedFinding("a", ((0.1, 0.1, 1.2, 0.2),)),
        GroundedFinding("a", ((0.1, 0.1, float("nan"), 0.2),)),
    ],
)
def test_findings_that_cannot_be_written_are_refused(finding: GroundedFinding) -> None:
    with pytest.raises(PromptError):
        format_grounded([finding])


def test_ids_are_read_up_to_the_first_end_and_added_tokens_survive(any_processor: Maira2Processor) -> None:
    tokenizer = any_processor.tokenizer
    ids = tokenizer(NODULE + "<obj>Opacité.</obj>", add_special_tokens=False)["input_ids"]
    report = any_processor.decode_report([*ids, tokenizer.eos_token_id, ids[0], tokenizer.pad_token_id])
    assert report.findings == (
        GroundedFinding("Nodule.", ((0.105, 0.205, 0.305, 0.405),)),
        GroundedFinding("Opacité."),
    )
    assert report.complete
    cut = any_processor.decode_report(ids[:-1])
    assert len(cut.findings) == 1
    assert not cut.complete

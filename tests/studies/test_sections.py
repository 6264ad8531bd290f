"""Sections of reports: headers of every kind, wrapped lines, addenda, titles, and what ends nothing."""

import pytest

from sae_lens_maira.studies.sections import parse_sections

RULE = " " + "_" * 78 + "\n"


def test_wrapped_lines_are_joined_and_marks_stay() -> None:
    found = parse_sections(
        " FINDINGS:\n\n The heart is\n enlarged since ___.\n\n Clear  lungs.\n\n IMPRESSION: 1. Stable.\n"
    )
    assert found.findings == "The heart is enlarged since ___. Clear lungs."
    assert found.impression == "1. Stable."
    assert found.as_prior == "FINDINGS: The heart is enlarged since ___. Clear lungs. IMPRESSION: 1. Stable."


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ("HISTORY", "indication"),
        ("REASON FOR EXAM", "indication"),
        ("REASON FOR  THIS EXAMINATION", "indication"),
        ("CLINICAL HISTORY", "indication"),
        ("CLINICAL INFORMATION", "indication"),
        ("INDICATION", "indication"),
        ("Indication", "indication"),
        ("TECHNIQUE", "technique"),
        ("COMPARISONS", "comparison"),
        ("COMPARISON STUDY", "comparison"),
        ("FINDINGS AND IMPRESSION", "findings"),
        ("FINDINGS/IMPRESSION", "findings"),
        ("FINDINGS and IMPRESSION", "findings"),
        ("Findings", "findings"),
        ("CONCLUSION", "impression"),
        ("ADDENDUM", "addendum"),
    ],
)
def test_header_names_map_to_sections(header: str, field: str) -> None:
    found = parse_sections(f" EXAMINATION:  CHEST.\n\n {header}:  Words of it.\n\n NOTIFICATION:  Phoned.\n")
    assert getattr(found, field) == "Words of it."


def test_unknown_capitals_inside_the_findings_end_nothing() -> None:
    found = parse_sections(
        " FINDINGS:\n LUNGS: Clear.\n HEART: Big.\n PORTABLE CHEST (2 VIEWS): Tube.\n\n IMPRESSION: Ok.\n"
    )
    assert found.findings == "LUNGS: Clear. HEART: Big. PORTABLE CHEST (2 VIEWS): Tube."


def test_headers_on_one_line_are_found_behind_a_sentence_only() -> None:
    found = parse_sections(
        "INDICATION: Cough. TECHNIQUE: AP. FINDINGS: See the COMPARISON: image. IMPRESSION: Clear."
    )
    assert (found.indication, found.technique) == ("Cough.", "AP.")
    assert found.findings == "See the COMPARISON: image."
    assert found.impression == "Clear."


def test_addenda_and_wet_reads_above_the_report_are_apart() -> None:
    found = parse_sections(
        "  ADDENDUM\n The FINDINGS: are wrong.\n" + RULE + " FINAL REPORT\n FINDINGS: Right lung clear.\n"
    )
    assert found.findings == "Right lung clear."
    assert found.addendum == "ADDENDUM The FINDINGS: are wrong."
    wet = parse_sections(
        " WET READ: ___ 5:34 PM\n  Big effusion.\n" + RULE + " FINAL REPORT\n FINDINGS: None.\n"
    )
    assert (wet.findings, wet.body) == ("None.", "FINDINGS: None.")
    joined = parse_sections(" WET READ: ___\n Effusion.\n\n FINAL REPORT\n FINDINGS: Clear lungs.\n")
    assert (joined.findings, joined.addendum) == ("Clear lungs.", "WET READ: ___ Effusion.")
    below = parse_sections(" FINAL REPORT\n FINDINGS: Clear.\n" + RULE + " ADDENDUM: FINDINGS: Not clear.\n")
    assert (below.findings, below.body) == ("Clear.", "FINDINGS: Clear.")


def test_a_wet_read_alone_is_the_report() -> None:
    found = parse_sections(" WET READ: ___ 9:22 PM\n  No pneumothorax.\n")
    assert (found.findings, found.body) == (None, "WET READ: ___ 9:22 PM No pneumothorax.")


def test_a_line_of_underscores_inside_a_report_only_separates() -> None:
    found = parse_sections(" FINAL REPORT\n FINDINGS: Clear.\n" + RULE + " IMPRESSION: Normal.\n")
    assert (found.findings, found.impression) == ("Clear.", "Normal.")


def test_a_title_with_prose_stands_for_findings_where_there_are_none() -> None:
    title = " CHEST, TWO VIEWS:  The heart is normal and the lungs are clear.\n"
    assert parse_sections(title).findings == "The heart is normal and the lungs are clear."
    assert not parse_sections(title).has_findings_header
    assert parse_sections(title + " FINDINGS: Effusion.\n").findings == "Effusion."
    for other in (" CHEST, TWO VIEWS: ___\n", " CHEST RADIOGRAPH\n\n The heart is normal today.\n"):
        assert parse_sections(other).findings is None


def test_of_a_header_that_comes_twice_the_last_filled_one_counts() -> None:
    assert (
        parse_sections("FINDINGS: One lung.\nFINDINGS: Two lungs.\nFINDINGS: ___\n").findings == "Two lungs."
    )


@pytest.mark.parametrize("text", ["FINDINGS:\n", "FINDINGS: ___ .\n", "FINDINGS\n\nIMPRESSION: Clear."])
def test_an_empty_findings_section_is_told_from_none(text: str) -> None:
    found = parse_sections(text)
    assert (found.findings, found.has_findings_header) == (None, True)
    assert not parse_sections("IMPRESSION: Clear.").has_findings_header


def test_no_text_has_no_body() -> None:
    for text in ("", "\n ___ \n", "   FINAL REPORT\n"):
        assert (parse_sections(text).body, parse_sections(text).as_prior) == ("", None)
    assert parse_sections("The lungs are clear.").as_prior == "The lungs are clear."

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
        " WET READ: ___ 5:34 PM\n  Big effusion.\n" + RULE + " FINAL REPORT\n FINDINGS: Clear.\n"
    )
    assert (wet.findings, wet.body) == ("Clear.", "FINDINGS: Clear.")
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
    """Empty reports have no body and no text as a prior."""
    for text in ("", "\n ___ \n", "   FINAL REPORT\n"):
        assert (parse_sections(text).body, parse_sections(text).as_prior) == ("", None)
    assert parse_sections("The lungs are clear.").as_prior == "The lungs are clear."


FOUND = "Small left effusion. Heart is normal."


@pytest.mark.parametrize(
    "prose",
    [
        "There is a small effusion.",
        "A left chest tube is in place.",
        "ET tube in standard position.",
        "1. Small effusion.",
        "No effusion.",
        "The PA and lateral images show clear lungs.",
        "In the interim, an NG tube was placed.",
        "2) Stable.",
    ],
)
def test_prose_after_a_title_is_findings(prose: str) -> None:
    for title in ("CHEST, TWO VIEWS", "PORTABLE CHEST RADIOGRAPH", "AP CHEST, 5:34 PM"):
        assert parse_sections(f" {title}: {prose}\n\n IMPRESSION: Ok.\n").findings == prose


@pytest.mark.parametrize("words", ["___", "3/4/2010", "PA AND LATERAL", "AP", "12:30 PM", "2 images"])
def test_a_title_with_a_date_or_a_view_is_not_findings(words: str) -> None:
    assert parse_sections(f" CHEST, TWO VIEWS: {words}\n\n IMPRESSION: Ok.\n").findings is None


@pytest.mark.parametrize(
    "words",
    [
        "None.",
        "none",
        "See impression.",
        "See IMPRESSION below.",
        "Please see impression",
        "As above.",
        "N/A",
        "As per impression.",
        "Refer to the impression section.",
        "nan",
    ],
)
def test_findings_that_refer_to_the_impression_are_replaced_by_it(words: str) -> None:
    found = parse_sections(f"FINDINGS: {words}\nIMPRESSION: Small effusion.\n")
    assert (found.findings, found.findings_from_impression) == ("Small effusion.", True)
    alone = parse_sections(f"FINDINGS: {words}\n")
    assert (alone.findings, alone.has_findings_header, alone.findings_from_impression) == (None, True, False)
    both = parse_sections(f"FINDINGS: {words}\nIMPRESSION: See findings above.\n")
    assert not both.findings_from_impression or both.findings == "See findings above."


def test_findings_that_only_begin_like_a_reference_stay() -> None:
    for words in (
        "None of the lines has moved.",
        "See the left base: effusion.",
        "As above, the heart is big.",
    ):
        assert parse_sections(f"FINDINGS: {words}\nIMPRESSION: Ok.\n").findings == words


NAMES = ("Indication", "Technique", "Comparison", "Findings", "Impression")
TEXTS = ("Cough.", "AP.", "None.", FOUND, "Effusion.")


@pytest.mark.parametrize(
    "form",
    [
        "{NAME}: {text} ",
        "{Name}: {text} ",
        "{name}: {text}\n",
        "## {Name}\n{text}\n\n",
        "# {NAME}:\n{text}\n",
        "**{Name}:** {text}\n",
        "**{Name}**: {text}\n",
        "**{NAME}**\n{text}\n",
        "{NAME} - {text}\n",
        "{Name} \u2013 {text}\n",
        "{Name} \u2014 {text}\n",
        "{NAME}-- {text}\n",
        "- {Name}: {text}\n",
        "=== {NAME} ===\n{text}\n",
        "--- {Name} ---\n{text}\n",
        "{Name}\n{text}\n\n",
        "{NAME}\n\n  {text}\n",
    ],
)
def test_headers_of_every_form(form: str) -> None:
    report = "".join(
        form.format(name=name.lower(), Name=name, NAME=name.upper(), text=text)
        for name, text in zip(NAMES, TEXTS, strict=True)
    )
    found = parse_sections(report)
    assert (found.indication, found.technique, found.comparison, found.findings, found.impression) == TEXTS


def test_headers_on_one_line_without_full_stops() -> None:
    found = parse_sections(
        f"INDICATION: Cough TECHNIQUE: AP COMPARISON: None FINDINGS: {FOUND} IMPRESSION: Big"
    )
    assert (found.indication, found.technique, found.comparison) == ("Cough", "AP", "None")
    assert (found.findings, found.impression) == (FOUND, "Big")


@pytest.mark.parametrize(
    "words",
    [
        "SUMMARY: 2-ABNORMAL.",
        "ACCESSION NUMBER: 1234",
        "PROCEDURE COMMENTS: AP view.",
        "END OF IMPRESSION",
        "END OF IMPRESSION:",
        "Electronically signed by: Dr. A",
        "Electronically signed by Dr. A on 3/4/2010",
        "Signed by: A. Doctor",
        "DICTATED BY: A. Doctor",
        "I have personally reviewed the images for this examination.",
        "Transcribed by X at 5 pm",
    ],
)
def test_what_ends_a_section(words: str) -> None:
    """These words end a section, on a new line and after a sentence."""
    for before in ("\n", "\n\n", " "):
        found = parse_sections(f"FINDINGS: {FOUND}\nIMPRESSION: Effusion.{before}{words}\n")
        assert (found.findings, found.impression) == (FOUND, "Effusion.")
        assert parse_sections(f"IMPRESSION: Effusion.\nFINDINGS: {FOUND}{before}{words}\n").findings == FOUND


@pytest.mark.parametrize(
    "report",
    [
        "CHEST RADIOGRAPH\nFINDINGS: Lungs.\n\nABDOMEN\nFINDINGS: Bowel.\n",
        "ABDOMEN\nFINDINGS: Bowel.\n\nCHEST\nFINDINGS: Lungs.\n",
        "EXAMINATION: CHEST\nFINDINGS: Lungs.\nEXAMINATION: ABDOMEN (KUB)\nFINDINGS: Bowel.\n",
        "CHEST FINDINGS: Lungs.\nABDOMEN FINDINGS: Bowel.\n",
        "FINDINGS, ABDOMEN: Bowel.\nFINDINGS (CHEST): Lungs.\n",
        "FINDINGS (CHEST): Lungs.\nFINDINGS (ABDOMEN): Bowel.\nIMPRESSION: Ok.\n",
        "EXAM: AP chest and abdomen\nCHEST, ONE VIEW:\nFINDINGS: Lungs.\nABDOMEN, ONE VIEW:\nFINDINGS: Bowel.\n",
    ],
)
def test_of_two_findings_sections_the_one_of_the_chest_counts(report: str) -> None:
    assert parse_sections(report).findings == "Lungs."


@pytest.mark.parametrize(
    "findings",
    [
        "The abdomen is normal. In summary: stable. Comparison is made with the prior study.",
        "Compared with the prior study the findings are unchanged.",
        "No change in the\nfindings\nsince ___.",
        "Lines: none. The reported history - see below - is unknown.",
        "HEART: Big. UPPER ABDOMEN: Normal. BONES: No fracture.",
    ],
)
def test_words_inside_findings_end_nothing(findings: str) -> None:
    found = parse_sections(f"FINDINGS: {findings}\nIMPRESSION: Ok.")
    assert found.findings == " ".join(findings.split())

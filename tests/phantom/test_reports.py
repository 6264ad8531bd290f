"""Report texts: form, length, words, completeness, grounded statements and sections."""

import re

import pytest

from sae_lens_maira.phantom import read_report
from sae_lens_maira.phantom.phrases import HINTS, INDICATIONS
from sae_lens_maira.studies import Study

pytestmark = pytest.mark.compat


def all_texts(study: Study) -> list[str]:
    parts = (study.report, study.prior_report, study.indication, study.technique, study.comparison)
    return [part for part in parts if part is not None]


def test_plain_short_sentences(many_studies: list[Study]) -> None:
    """ASCII, single spaces, each sentence opens with a capital and ends with a period, at most 70 words."""
    for study in many_studies:
        for text in all_texts(study):
            assert text.isascii()
            assert re.fullmatch(r"([A-Z][A-Za-z, ]*\.)( [A-Z][A-Za-z, ]*\.)*", text), text
            assert "  " not in text
            assert len(text.split()) <= 70
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\b(\w+) \1\b", text), text


def test_the_vocabulary_is_small(many_studies: list[Study]) -> None:
    words = {word.lower() for s in many_studies for t in all_texts(s) for word in re.findall(r"[A-Za-z]+", t)}
    assert 100 < len(words) < 200


def test_phrasings_vary(many_studies: list[Study]) -> None:
    """Each finding that is there has at least six different sentences that state it alone."""
    sentences: dict[str, set[str]] = {}
    for study in many_studies:
        for statement in study.grounded_report or ():
            read = read_report(statement.text)
            if len(read.present) == 1:
                sentences.setdefault(next(iter(read.present)), set()).add(statement.text)
    assert len(sentences) == 15
    assert min(len(found) for found in sentences.values()) >= 6


def test_grounded_statements_are_the_report_with_every_box_once(many_studies: list[Study]) -> None:
    for study in many_studies:
        statements = study.grounded_report or ()
        assert " ".join(statement.text for statement in statements) == study.report
        stated = sorted(box for statement in statements for box in statement.boxes)
        assert stated == sorted(f.box for f in study.truth or () if f.box is not None)
        for statement in statements:
            read = read_report(statement.text)
            here = [f.box for f in study.truth or () if f.key in read.present and f.box is not None]
            assert sorted(statement.boxes) == sorted(here)


def test_one_sentence_about_both_sides_has_two_boxes(many_studies: list[Study]) -> None:
    pairs = [g for s in many_studies for g in s.grounded_report or () if g.text.lower().count("bilateral pl")]
    assert len(pairs) > 20
    assert {len(statement.boxes) for statement in pairs} == {2}


def test_with_a_prior_every_finding_has_its_own_sentence(many_studies: list[Study]) -> None:
    for study in many_studies:
        if study.prior_frontal is not None:
            printed = [read_report(g.text).changes for g in study.grounded_report or ()]
            assert max(len(changes) for changes in printed) <= 1
            assert sum(len(changes) for changes in printed) == len(study.truth or ())


def test_size_words_are_true(many_studies: list[Study]) -> None:
    """A size word in a sentence about one finding is its size now, also when it has grown or shrunk."""
    checked = 0
    for study in many_studies:
        for finding in study.truth or ():
            if not finding.present or finding.size is None:
                continue
            for statement in study.grounded_report or ():
                if read_report(statement.text).present == {finding.key}:
                    sizes = re.findall(r"\b(small|moderate|large)\b", statement.text.lower())
                    assert sizes == [finding.size]
                    checked += 1
    assert checked > 1000


def test_negations_and_doubt_occur(many_studies: list[Study]) -> None:
    reports = [study.report or "" for study in many_studies]
    assert sum("o pleural effusion" in report for report in reports) > 500
    doubtful = sum(bool(re.search(r"\b([Pp]ossible|may)\b", report)) for report in reports)
    assert 100 < doubtful < 600


def test_indications_lean_but_do_not_tell(many_studies: list[Study]) -> None:
    """Under its own hint a finding is still often absent, and it is most often present under another one."""
    for name, number in HINTS.items():
        has = [any(f.name == name and f.present for f in study.truth or ()) for study in many_studies]
        hinted = [study.indication == INDICATIONS[number] for study in many_studies]
        both = sum(a and b for a, b in zip(has, hinted, strict=True))
        assert both < 0.75 * sum(hinted)
        assert both < 0.50 * sum(has)


def test_sections_fit_the_study(many_studies: list[Study]) -> None:
    for study in many_studies:
        if study.comparison is not None:
            assert (study.comparison in ("None.", "No prior studies.")) == (study.prior_frontal is None)
        if study.technique is not None:
            assert study.technique.startswith(("Frontal and lateral", "Two")) == study.has_lateral
    assert any(study.indication is None for study in many_studies)

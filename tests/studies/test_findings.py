"""Findings by truth and by reader: one vocabulary, the right reader for the text, and refusals."""

from dataclasses import replace

import numpy as np
import pytest

from sae_lens_maira.errors import ConfigError, StudyError
from sae_lens_maira.interface import finding_reader
from sae_lens_maira.phantom import FINDING_KEYS, generate_studies, phantom_reader, truth_labels
from sae_lens_maira.studies import Licence, known_findings, readable_studies, rule_reader, truth_table

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def studies():
    return generate_studies(6, seed=77)


def test_truth_and_reading_agree_on_the_phantom(studies):
    """The phantom's reports state its truth, so both tables are equal; with a truth it is the truth that counts."""
    reader = phantom_reader()
    table, source = known_findings(studies, reader)
    assert source == "truth"
    assert np.array_equal(table, np.stack([truth_labels(study) for study in studies]))
    assert np.array_equal(table, reader.table([study.report for study in studies]))
    assert table.any()


def test_reports_are_read_where_there_is_no_truth(studies):
    """Rule labels of the reports; a study with neither report nor truth is named."""
    plain = [
        replace(study, truth=None, report="Large left pleural effusion. No pneumothorax.")
        for study in studies
    ]
    table, source = known_findings(plain, rule_reader())
    assert source == "rules"
    names = rule_reader().names
    assert {names[i] for i in np.flatnonzero(table[0])} == {"pleural_effusion"}
    with pytest.raises(StudyError, match=f"the first is {studies[2].study_id}"):
        known_findings([*plain[:2], replace(studies[2], truth=None, report=None)], rule_reader())


def test_the_reader_follows_the_studies(studies):
    """Synthetic studies with the phantom's truth get its reader; any other study makes it rule labels."""
    assert finding_reader(studies).names == FINDING_KEYS
    assert finding_reader([replace(s, truth=None) for s in studies]).source == "rules"
    assert finding_reader([*studies, replace(studies[0], licence=Licence.PUBLIC)]).source == "rules"
    assert finding_reader([]).source == "rules"
    assert finding_reader(studies, "rules").source == "rules"
    with pytest.raises(ConfigError, match="use auto, phantom or rules"):
        finding_reader(studies, "radgraph")  # pyright: ignore[reportArgumentType]


def test_another_vocabulary_is_refused(studies):
    with pytest.raises(StudyError, match="expected only"):
        truth_table([s for s in studies if s.present_keys], rule_reader().names)
    with pytest.raises(StudyError, match="no finding 'measles'"):
        phantom_reader().index("measles")


def test_studies_whose_report_cannot_be_read_are_left_out(studies):
    reader = rule_reader()
    bare = [replace(study, truth=None) for study in studies]
    foreign = replace(bare[0], study_id="es", report="Se observa derrame pleural izquierdo.")
    assert readable_studies([*bare, foreign], reader) == bare
    assert readable_studies([replace(foreign, truth=studies[0].truth)], reader)
    with pytest.raises(StudyError, match="1 of 7 studies cannot be read"):
        known_findings([*bare, foreign], reader)
    assert np.array_equal(
        known_findings(readable_studies([*bare, foreign], reader), reader)[0], known_findings(bare, reader)[0]
    )

"""A generated report that cannot be read is unknown: counted, and left out of scores."""

import numpy as np
import pandas as pd
import pytest

from sae_lens_maira.errors import InterventionError, StudyError
from sae_lens_maira.phantom.reading import phantom_reader
from sae_lens_maira.steering.correction import Correction, best_of, f1_change, micro_f1, report_counts
from sae_lens_maira.steering.evaluate import METRICS, summarise
from sae_lens_maira.steering.report_errors import error_changes
from sae_lens_maira.studies import Licence, Study, rule_reader

GOOD, EFFUSION, BROKEN = "The lungs are clear.", "Small left pleural effusion.", "lorem lorem lorem"


def test_readers_know_no_findings_of_a_text_that_they_cannot_read() -> None:
    for reader in (rule_reader(), phantom_reader()):
        assert reader.stated(GOOD) in (frozenset(), frozenset({"no_finding"}))
        assert reader.stated(EFFUSION)
        for text in ("", " \n", BROKEN, "Derrame pleural."):
            assert reader.stated(text) is None, (reader.source, text)


def test_a_summary_leaves_unreadable_reports_out_and_counts_them() -> None:
    table = pd.DataFrame({name: [1.0, 0.0, 1.0] for name in METRICS})
    table.loc[1, ["on_target", "off_target"]] = np.nan
    table = table.assign(method="m", half="report", study=range(3))
    row = summarise(table, ["m"], {"m": 1.0}, 0.0, 0).iloc[0]
    assert (row.n, row.unreadable, row.on_target, row.off_target) == (3, 1, 1.0, 1.0)
    assert row.length == pytest.approx(2 / 3)
    table[["on_target", "off_target"]] = np.nan
    assert np.isnan(summarise(table, ["m"], {"m": 1.0}, 0.0, 0).iloc[0].on_target)


def test_f1_leaves_unreadable_reports_out_of_both_sides() -> None:
    reader = phantom_reader()
    truth = np.zeros((3, len(reader.names)), dtype=bool)
    truth[:, reader.index("pleural_effusion_left")] = True
    before = report_counts([EFFUSION, GOOD, GOOD], truth, reader)
    after = report_counts([EFFUSION, EFFUSION, BROKEN], truth, reader)
    assert micro_f1(after) == 1.0
    assert np.isnan(after).all(1).tolist() == [False, False, True]
    assert f1_change(before, after)[0] == pytest.approx(1 - 2 / 3)
    mild, strong = Correction(), Correction(share=0.5)
    assert best_of([(mild, report_counts([EFFUSION] * 2 + [GOOD], truth, reader)), (strong, after)]) == mild
    with pytest.raises(InterventionError, match="None of the 3 pairs"):
        f1_change(before, np.full_like(before, np.nan))


def test_errors_are_compared_over_studies_with_two_readable_reports() -> None:
    studies = [
        Study(study_id=f"{i}", patient_id="p", licence=Licence.PUBLIC, frontal="a.png", report=EFFUSION)
        for i in range(3)
    ]
    table = error_changes({"m": [EFFUSION, BROKEN, GOOD]}, [EFFUSION] * 3, studies, rule_reader())
    row = table.set_index("measure").loc["omission_per_report"]
    assert (row.unreadable, row.before, row.after) == (1, 0.0, 0.5)
    with pytest.raises(StudyError, match="None of the 3 reports of 'm' can be read"):
        error_changes({"m": [BROKEN] * 3}, [EFFUSION] * 3, studies, rule_reader())

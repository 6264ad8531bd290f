"""The phantom: synthetic chest radiographs with known findings, their reports, and a reader that scores text.

A test bench on which every claim can be checked; it says nothing about medicine.
"""

from sae_lens_maira.phantom.generator import generate_studies, generate_study, iterate_studies, truth_labels
from sae_lens_maira.phantom.reading import ReportLabels, read_report
from sae_lens_maira.phantom.sampling import FINDING_KEYS

__all__ = [
    "FINDING_KEYS",
    "ReportLabels",
    "generate_studies",
    "generate_study",
    "iterate_studies",
    "read_report",
    "truth_labels",
]

"""The phantom: synthetic chest radiographs with known findings, their reports, and a reader that scores text.

A test bench on which every claim can be checked; it says nothing about medicine.
"""

from sae_lens_maira.phantom.generator import generate_studies, generate_study, iterate_studies, truth_labels
from sae_lens_maira.phantom.model import load_phantom, phantom_path
from sae_lens_maira.phantom.reading import ReportLabels, phantom_reader, read_report
from sae_lens_maira.phantom.sampling import FINDING_KEYS
from sae_lens_maira.phantom.training import PhantomTraining, train_phantom

__all__ = [
    "FINDING_KEYS",
    "PhantomTraining",
    "ReportLabels",
    "generate_studies",
    "generate_study",
    "iterate_studies",
    "load_phantom",
    "phantom_path",
    "phantom_reader",
    "read_report",
    "train_phantom",
    "truth_labels",
]

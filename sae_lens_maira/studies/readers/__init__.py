"""Readers: from a data set on disk to a table of studies and a list of what was left out, with reasons."""

from sae_lens_maira.studies.readers.csv_table import import_csv
from sae_lens_maira.studies.readers.folder import import_folder
from sae_lens_maira.studies.readers.imported import Imported, Skipped, SkipReason, UnusedFile
from sae_lens_maira.studies.readers.iuxray import import_iuxray
from sae_lens_maira.studies.readers.mimic import import_mimic

__all__ = [
    "Imported",
    "SkipReason",
    "Skipped",
    "UnusedFile",
    "import_csv",
    "import_folder",
    "import_iuxray",
    "import_mimic",
]

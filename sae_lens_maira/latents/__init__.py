"""Latent records: activations, agreement with findings, and their file format."""

from typing import TYPE_CHECKING

from sae_lens_maira.lazy import lazy_names

if TYPE_CHECKING:
    from sae_lens_maira.latents.agreement import (
        Agreement,
        Difference,
        Encoder,
        Halves,
        MeanDifference,
        best_dictionary,
        best_units,
        paired_difference,
        split_by_patient,
        study_firing,
    )
    from sae_lens_maira.latents.records import Context, LatentRecord, RecordsMeta, StudyInfo
    from sae_lens_maira.latents.recordset import RecordSet
    from sae_lens_maira.latents.writing import write_records

__getattr__ = lazy_names(
    __name__,
    {
        "agreement": (
            "Agreement",
            "Difference",
            "Encoder",
            "Halves",
            "MeanDifference",
            "best_dictionary",
            "best_units",
            "paired_difference",
            "split_by_patient",
            "study_firing",
        ),
        "records": ("Context", "LatentRecord", "RecordsMeta", "StudyInfo"),
        "recordset": ("RecordSet",),
        "writing": ("write_records",),
    },
)

__all__ = [
    "Agreement",
    "Context",
    "Difference",
    "Encoder",
    "Halves",
    "LatentRecord",
    "MeanDifference",
    "RecordSet",
    "RecordsMeta",
    "StudyInfo",
    "best_dictionary",
    "best_units",
    "paired_difference",
    "split_by_patient",
    "study_firing",
    "write_records",
]

"""What latents are: where they fire and what they agree with."""

from sae_lens_maira.latents.agreement import (
    Agreement,
    Difference,
    Halves,
    best_units,
    f1_of_firing,
    paired_difference,
    split_by_patient,
)
from sae_lens_maira.latents.firing import (
    Encoder,
    MeanDifference,
    RandomDirections,
    RawDimensions,
    study_firing,
)

__all__ = [
    "Agreement",
    "Difference",
    "Encoder",
    "Halves",
    "MeanDifference",
    "RandomDirections",
    "RawDimensions",
    "best_units",
    "f1_of_firing",
    "paired_difference",
    "split_by_patient",
    "study_firing",
]

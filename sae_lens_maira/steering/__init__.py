"""Interventions on the residual stream, and what they do to reports."""

from sae_lens_maira.steering.apply import Steering, steering
from sae_lens_maira.steering.engine import Effect
from sae_lens_maira.steering.interventions import (
    Ablate,
    Add,
    AtLeast,
    AtMost,
    Direction,
    Intervention,
    LatentIntervention,
    Scale,
    SetTo,
)
from sae_lens_maira.steering.patches import (
    PatchMap,
    latent_patch_map,
    mean_difference_map,
    mean_patch_maps,
    steer_reports,
    steered,
)
from sae_lens_maira.steering.schedule import Schedule

__all__ = [
    "Ablate",
    "Add",
    "AtLeast",
    "AtMost",
    "Direction",
    "Effect",
    "Intervention",
    "LatentIntervention",
    "PatchMap",
    "Scale",
    "Schedule",
    "SetTo",
    "Steering",
    "latent_patch_map",
    "mean_difference_map",
    "mean_patch_maps",
    "steer_reports",
    "steered",
    "steering",
]

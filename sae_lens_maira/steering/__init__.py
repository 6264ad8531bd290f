"""Interventions on the residual stream, and their effect on reports."""

from sae_lens_maira.steering.engine import Effect
from sae_lens_maira.steering.interventions import (
    Ablate,
    Add,
    AddVectors,
    AtLeast,
    AtMost,
    Direction,
    Intervention,
    LatentIntervention,
    SavedInterventions,
    Scale,
    SetTo,
    load_interventions,
    save_interventions,
)
from sae_lens_maira.steering.maps import LatentMap, difference_map, map_directions, mean_patch_maps
from sae_lens_maira.steering.positions import Schedule
from sae_lens_maira.steering.run import Steering, steered_reports, steering

__all__ = [
    "Ablate",
    "Add",
    "AddVectors",
    "AtLeast",
    "AtMost",
    "Direction",
    "Effect",
    "Intervention",
    "LatentIntervention",
    "LatentMap",
    "SavedInterventions",
    "Scale",
    "Schedule",
    "SetTo",
    "Steering",
    "difference_map",
    "load_interventions",
    "map_directions",
    "mean_patch_maps",
    "save_interventions",
    "steered_reports",
    "steering",
]

"""Interventions on the residual stream, and what they do to reports."""

from sae_lens_maira.steering.patches import (
    PatchMap,
    latent_patch_map,
    mean_difference_map,
    mean_patch_maps,
    steer_reports,
    steered,
)

__all__ = [
    "PatchMap",
    "latent_patch_map",
    "mean_difference_map",
    "mean_patch_maps",
    "steer_reports",
    "steered",
]

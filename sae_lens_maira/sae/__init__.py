"""Matryoshka SAEs inside SAELens, the published MAIRA-2 SAEs, and how to judge an SAE.

Importing this package registers the architecture "matryoshka" and the release "maira-2-sae" with SAELens.
"""

from sae_lens_maira.sae.config import MatryoshkaSAEConfig, MatryoshkaTrainingSAEConfig
from sae_lens_maira.sae.inference import MatryoshkaSAE, load_matryoshka
from sae_lens_maira.sae.levels import level_widths_of
from sae_lens_maira.sae.registry import register
from sae_lens_maira.sae.training import MatryoshkaTrainingSAE

__all__ = [
    "MatryoshkaSAE",
    "MatryoshkaSAEConfig",
    "MatryoshkaTrainingSAE",
    "MatryoshkaTrainingSAEConfig",
    "level_widths_of",
    "load_matryoshka",
    "register",
]

register()

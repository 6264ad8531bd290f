"""Matryoshka SAEs inside SAELens, the published MAIRA-2 SAEs, and the evaluation of an SAE.

Importing this package registers the architecture "matryoshka" and the release "maira-2-sae" with SAELens.
"""

from sae_lens_maira.sae.config import MatryoshkaSAEConfig, MatryoshkaTrainingSAEConfig
from sae_lens_maira.sae.controls import CONTROLS, control_kind, make_control
from sae_lens_maira.sae.evaluation import ReconstructionRecord, SAEEvaluation, evaluate_sae
from sae_lens_maira.sae.export import export_dictionary_learning
from sae_lens_maira.sae.inference import MatryoshkaSAE, fingerprint, load_matryoshka, open_sae
from sae_lens_maira.sae.levels import level_widths_of
from sae_lens_maira.sae.locate import Location, locate_sae
from sae_lens_maira.sae.match import LatentMatch, match_latents
from sae_lens_maira.sae.registry import (
    maira2_sae_disk_loader,
    maira2_sae_loader,
    register,
    register_release,
)
from sae_lens_maira.sae.release import ReleaseRequest, convert_release, load_release, resolve_sae
from sae_lens_maira.sae.splice import SpliceBatch, SpliceEvaluation, SpliceRecord, evaluate_splice
from sae_lens_maira.sae.training import MatryoshkaTrainingSAE

__all__ = [
    "CONTROLS",
    "LatentMatch",
    "Location",
    "MatryoshkaSAE",
    "MatryoshkaSAEConfig",
    "MatryoshkaTrainingSAE",
    "MatryoshkaTrainingSAEConfig",
    "ReconstructionRecord",
    "ReleaseRequest",
    "SAEEvaluation",
    "SpliceBatch",
    "SpliceEvaluation",
    "SpliceRecord",
    "control_kind",
    "convert_release",
    "evaluate_sae",
    "evaluate_splice",
    "export_dictionary_learning",
    "fingerprint",
    "level_widths_of",
    "load_matryoshka",
    "load_release",
    "locate_sae",
    "maira2_sae_disk_loader",
    "maira2_sae_loader",
    "make_control",
    "match_latents",
    "open_sae",
    "register",
    "register_release",
    "resolve_sae",
]

register()
register_release()

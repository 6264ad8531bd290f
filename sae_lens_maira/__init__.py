"""MAIRA-2 with SAELens: load models and SAEs, read latents, and steer reports, from one import.

    import sae_lens_maira as sm

    m = sm.load("phantom")
    sae = sm.load_sae("phantom-image")
    study = sm.phantom_studies(1)[0]
    m.top_latents(study, sae, k=5)

Every name in `__all__` is imported on first use, so that `import sae_lens_maira` loads neither torch nor other
libraries.
"""

from typing import TYPE_CHECKING

from sae_lens_maira.lazy import lazy_names

if TYPE_CHECKING:
    from sae_lens_maira.activations import RowSettings, read_rows
    from sae_lens_maira.hooks import HookedMaira2, Maira2NNsight
    from sae_lens_maira.interactive import InteractiveMaira2, SteeringResult
    from sae_lens_maira.interface import (
        finding_reader,
        load,
        load_sae,
        named_model,
        phantom_studies,
        read_studies,
    )
    from sae_lens_maira.latents import RecordSet, split_by_patient, study_firing
    from sae_lens_maira.maira2 import TokenRole
    from sae_lens_maira.maira2.images import centre_crop
    from sae_lens_maira.sae import make_control
    from sae_lens_maira.stats import f1_of_firing
    from sae_lens_maira.steering import Ablate, Add, AtLeast, AtMost, Direction, Scale, SetTo
    from sae_lens_maira.steering.maps import random_direction, recorded_map
    from sae_lens_maira.steering.positions import everywhere, patches, prompt, report, roles, window
    from sae_lens_maira.steering.statistics import encoder_of
    from sae_lens_maira.studies import Study, known_findings
    from sae_lens_maira.workbench import workbench

__version__ = "0.1.0"

_SOURCES = {
    "activations": ("RowSettings", "read_rows"),
    "hooks": ("HookedMaira2", "Maira2NNsight"),
    "interactive": ("InteractiveMaira2", "SteeringResult"),
    "interface": ("finding_reader", "load", "load_sae", "named_model", "phantom_studies", "read_studies"),
    "latents": ("RecordSet", "split_by_patient", "study_firing"),
    "maira2.images": ("centre_crop",),
    "maira2": ("TokenRole",),
    "sae": ("make_control",),
    "stats": ("f1_of_firing",),
    "steering": ("Ablate", "Add", "AtLeast", "AtMost", "Direction", "Scale", "SetTo"),
    "steering.maps": ("random_direction", "recorded_map"),
    "steering.positions": ("everywhere", "patches", "prompt", "report", "roles", "window"),
    "steering.statistics": ("encoder_of",),
    "studies": ("Study", "known_findings"),
    "workbench": ("workbench",),
}
__getattr__ = lazy_names(__name__, _SOURCES)

__all__ = [
    "Ablate",
    "Add",
    "AtLeast",
    "AtMost",
    "Direction",
    "HookedMaira2",
    "InteractiveMaira2",
    "Maira2NNsight",
    "RecordSet",
    "RowSettings",
    "Scale",
    "SetTo",
    "SteeringResult",
    "Study",
    "TokenRole",
    "centre_crop",
    "encoder_of",
    "everywhere",
    "f1_of_firing",
    "finding_reader",
    "known_findings",
    "load",
    "load_sae",
    "make_control",
    "named_model",
    "patches",
    "phantom_studies",
    "prompt",
    "random_direction",
    "read_rows",
    "read_studies",
    "recorded_map",
    "report",
    "roles",
    "split_by_patient",
    "study_firing",
    "window",
    "workbench",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

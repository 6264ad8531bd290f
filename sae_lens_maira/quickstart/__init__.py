"""The main job on the phantom: studies, activations, SAE, findings, steering, a report folder."""

from sae_lens_maira.quickstart.results import QuickstartConfig, QuickstartResult
from sae_lens_maira.quickstart.run import run_quickstart

__all__ = ["QuickstartConfig", "QuickstartResult", "run_quickstart"]

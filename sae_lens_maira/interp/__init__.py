"""What latents mean: explanations and their scores, each beside its control."""

from sae_lens_maira.interp.records import Interpretation, Score

__all__ = ["Interpretation", "Score"]

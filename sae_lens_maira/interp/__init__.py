"""Interpretations of latents: explanations and scores, each with its control."""

from sae_lens_maira.interp.records import Interpretation, Score

__all__ = ["Interpretation", "Score"]

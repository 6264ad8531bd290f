"""MAIRA-2 under SAELens: hooks, Matryoshka SAEs, interpretation and steering."""

__version__ = "0.1.0"

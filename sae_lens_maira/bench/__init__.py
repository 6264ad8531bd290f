"""Benchmarks of the training step: SAELens' trainer and this package's in one run, with and without the data path.

`sae-lens-maira bench step` runs them on a CPU or a GPU; `benchmarks/gpu.py` is the same within ten minutes of a GPU.
"""

from sae_lens_maira.bench.arms import ARMS, Arm, Shape

__all__ = ["ARMS", "Arm", "Shape"]

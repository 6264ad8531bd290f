"""Hook points of MAIRA-2, one door per host library.

`HookedMaira2` (TransformerLens), `Maira2NNsight` (nnsight), `to_bridge` (TransformerBridge, TransformerLens
3.9 and newer) and `maira2_runner` (SAELens) share one table of names, `points.py`. The bridge is imported
when it is asked for, since TransformerLens 2.17 has none.
"""

from sae_lens_maira.hooks.names import Point, PointTable
from sae_lens_maira.hooks.points import SPECS, PointSpec
from sae_lens_maira.hooks.transformer_lens import HookedMaira2

__all__ = ["SPECS", "HookedMaira2", "Point", "PointSpec", "PointTable"]

"""Hook points of MAIRA-2, one door per host library.

`HookedMaira2` (TransformerLens), `Maira2NNsight` (nnsight), `to_bridge` (TransformerBridge, TransformerLens
3.9 and newer) and `maira2_runner` (SAELens) share one table of names, `points.py`. The bridge is imported
when it is asked for, since TransformerLens 2.17 has none.
"""

from typing import TYPE_CHECKING, Any

from sae_lens_maira.hooks._evaluation import Maira2Evaluator
from sae_lens_maira.hooks._names import Point, PointTable
from sae_lens_maira.hooks.hooked import HookedMaira2
from sae_lens_maira.hooks.nnsight import Maira2NNsight
from sae_lens_maira.hooks.points import SPECS, PointSpec
from sae_lens_maira.hooks.sae_lens import Maira2ActivationsStore, Maira2TrainingRunner, maira2_runner

if TYPE_CHECKING:
    from sae_lens_maira.hooks.bridge import to_bridge

__all__ = [
    "SPECS",
    "HookedMaira2",
    "Maira2ActivationsStore",
    "Maira2Evaluator",
    "Maira2NNsight",
    "Maira2TrainingRunner",
    "Point",
    "PointSpec",
    "PointTable",
    "maira2_runner",
    "to_bridge",
]


def __getattr__(name: str) -> Any:
    if name == "to_bridge":
        from sae_lens_maira.hooks.bridge import to_bridge

        return to_bridge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

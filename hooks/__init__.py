"""Hook points of MAIRA-2 in TransformerLens, nnsight and SAELens, from one table of names (`points.py`).

`HookedMaira2` (TransformerLens), `to_bridge` (TransformerBridge, TransformerLens 3.9 and newer), `Maira2NNsight`
(nnsight) and `maira2_runner` (SAELens). Each is imported when it is first needed: nnsight changes the process that
imports it (docs/host_libraries.md), and TransformerLens 2.17 has no bridge.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens_maira.hooks._evaluation import Maira2Evaluator
    from sae_lens_maira.hooks._names import Point, PointTable
    from sae_lens_maira.hooks.bridge import to_bridge
    from sae_lens_maira.hooks.hooked import HookedMaira2
    from sae_lens_maira.hooks.nnsight import Maira2NNsight
    from sae_lens_maira.hooks.points import SPECS, PointSpec
    from sae_lens_maira.hooks.sae_lens import Maira2ActivationsStore, Maira2TrainingRunner, maira2_runner

_MODULE_OF = {
    "SPECS": "points",
    "HookedMaira2": "hooked",
    "Maira2ActivationsStore": "sae_lens",
    "Maira2Evaluator": "_evaluation",
    "Maira2NNsight": "nnsight",
    "Maira2TrainingRunner": "sae_lens",
    "Point": "_names",
    "PointSpec": "points",
    "PointTable": "_names",
    "maira2_runner": "sae_lens",
    "to_bridge": "bridge",
}

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
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"sae_lens_maira.hooks.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Clocks for alternating runs, since other work on a machine changes wall clock times by more than two variants differ.

    ratio of two variants = the median over rounds of t(one) / t(other) within the round

Every variant runs once before it is timed, and the order changes in every round, so that no variant always follows the
same one.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

WALL, CPU = 0, 1
"""Columns of a variant's times."""


def clocks(run: Callable[[], Any], device: str = "cpu") -> tuple[float, float]:
    """Wall and processor seconds of one run, with a GPU idle before and after."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    _wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def interleaved(
    sides: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Measure seconds of every variant, (rounds, 2) with the columns `WALL` and `CPU`."""
    for run in sides.values():
        run()
    names = list(sides)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clocks(sides[name], device))
    return {name: np.array(pairs) for name, pairs in times.items()}


def spread(name: str, ratios: np.ndarray) -> dict[str, float]:
    """Median of ratios and the quantiles that leave a fifth on either side, as `{name}_p20` ..."""
    return {f"{name}_p{at}": float(np.percentile(ratios, at)) for at in (20, 50, 80)}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()

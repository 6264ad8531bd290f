"""Statistics as a file, and two of them added: what a killed and a divided collection need.

    count(A + B) = add(count(A), count(B))      studies apart, in any order

Sums add, maxima compare, and draws keep the lowest priorities of both, which do not depend on who drew. Files are
read with `weights_only=True`. It knows nothing about ranks or folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import atomic_file
from sae_lens_maira.latents.sampling import LowestPriorities
from sae_lens_maira.latents.statistics import LatentStatistics

_SUMS = (
    "rows",
    "studies",
    "fired",
    "studies_fired",
    "sum",
    "histogram",
    "any_fired",
    "positives",
    "labelled",
)
_SUMS += ("true_positive", "labelled_fired")


def state_of(statistics: LatentStatistics) -> dict[str, Any]:
    """Everything counted, as tensors and numbers."""
    own = {name: getattr(statistics, name) for name in (*_SUMS, "max", "top_value", "top_study")}
    state: dict[str, Any] = {name: _tensor(value) for name, value in own.items()}
    state |= {"n_studies": statistics.n_studies, "last": statistics.last_study}
    state |= {name: dict(getattr(statistics, name)) for name in ("maps", "map_rows", "map_studies")}
    for name in ("octaves", "zero"):
        kept: LowestPriorities = getattr(statistics, name)
        state[name] = {k: _tensor(getattr(kept, k)) for k in ("priority", "item", "value")}
    state["samples"] = [
        {k: _tensor(v) for k, v in sample.state().items()} | {"limit": int(sample.limit)}
        for sample in statistics.samples
    ]
    return state


def restore(statistics: LatentStatistics, state: dict[str, Any]) -> None:
    """Put a state of `state_of` into new statistics of the same sizes.

    Raises:
        RecordError: the state is of other sizes.
    """
    if (
        state["fired"].shape != statistics.fired.shape
        or state["top_value"].shape != statistics.top_value.shape
    ):
        raise RecordError(
            f"Saved statistics are of {tuple(state['fired'].shape)} latents and {tuple(state['top_value'].shape)} top "
            "studies, other than those asked for. Remove the unfinished collection and start again."
        )
    for name in (*_SUMS, "max", "top_value", "top_study"):
        value = state[name]
        setattr(
            statistics,
            name,
            value.numpy() if isinstance(getattr(statistics, name), np.ndarray) else value,
        )
    statistics.n_studies, statistics.last_study = state["n_studies"], state["last"]
    for name in ("maps", "map_rows", "map_studies"):
        setattr(statistics, name, dict(state[name]))
    for name in ("octaves", "zero"):
        getattr(statistics, name).restore(**{k: v.numpy() for k, v in state[name].items()})
    for sample, own in zip(statistics.samples, state["samples"], strict=True):
        rows = {name: own[name].numpy() for name in ("priority", "lengths", "latents")}
        sample.restore(**rows, limit=own["limit"])


def add(statistics: LatentStatistics, other: LatentStatistics) -> None:
    """Add what `other` counted over other studies to `statistics`."""
    for name in _SUMS:
        setattr(statistics, name, getattr(statistics, name) + getattr(other, name))
    statistics.max = torch.maximum(statistics.max, other.max)
    statistics.n_studies += other.n_studies
    statistics.last_study = max(statistics.last_study, other.last_study)
    for name in ("maps", "map_rows"):
        mine = getattr(statistics, name)
        for view, total in getattr(other, name).items():
            mine[view] = mine[view] + total if view in mine else total.clone()
    for view, n in other.map_studies.items():
        statistics.map_studies[view] += n
    values = torch.cat([statistics.top_value, other.top_value], 1)
    studies = torch.cat([statistics.top_study, other.top_study], 1)
    # By study, then stably by value: of equal peaks the earlier study stays in front, as in one pass.
    order = studies.argsort(dim=1, stable=True)
    values, studies = values.gather(1, order), studies.gather(1, order)
    order = values.argsort(dim=1, descending=True, stable=True)[:, : statistics.top_value.shape[1]]
    statistics.top_value, statistics.top_study = values.gather(1, order), studies.gather(1, order)
    statistics.octaves.add(other.octaves)
    statistics.zero.add(other.zero)
    for sample, more in zip(statistics.samples, other.samples, strict=True):
        sample.merge(more)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state in one piece or not at all."""
    with atomic_file(path) as draft:
        torch.save(state, draft)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        RecordError: the file is damaged.
    """
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise RecordError(
            f"{path} cannot be read ({error}); remove its folder and collect the records again."
        ) from None


def _tensor(value: np.ndarray | torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

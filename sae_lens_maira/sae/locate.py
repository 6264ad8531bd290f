"""Find the hook point at which an SAE was trained, from how well it reconstructs the rows of every candidate.

    explained variance = 1 - sum |x - x_hat|^2 / sum |x - mean|^2        per hook point and kind of row
    margin             = explained variance of the best hook point - that of the second best

The interval of the margin is a paired bootstrap over studies. Image and text rows are scored apart, since most SAEs
are trained on one of them, and the kind that is explained best decides. The output of block i is `hidden_states[i + 1]`
of transformers, so a layer number of unknown counting means one of two neighbouring blocks; the margin tells which.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_maira.errors import SAEError
from sae_lens_maira.stats import bootstrap, explained_by_sums

LocateBatch = tuple[Mapping[str, Tensor], np.ndarray, np.ndarray]
"""Rows by hook point (n, d_in), number of each row's study (n,), and its kind (n,) as text such as "image"."""


@dataclass(frozen=True)
class Location:
    """Where an SAE was trained, as far as its reconstructions tell.

    Attributes:
        table: One row per kind of row and hook point: kind, hook_name, hidden_states, rows, explained_variance, l0.
        kind: Kind of row that decides.
        hook_name: The hook point explained best.
        second: The next best one.
        margin, low, high: Difference of their explained variances and its 95 % interval over studies.
    """

    table: pd.DataFrame
    kind: str
    hook_name: str
    second: str
    margin: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the best hook point explains more than nothing and is ahead of the second by its interval."""
        best = (self.table["kind"] == self.kind) & (self.table["hook_name"] == self.hook_name)
        return self.low > 0 and float(self.table.loc[best, "explained_variance"].max()) > 0

    def __str__(self) -> str:
        best = (self.table["hook_name"] == self.hook_name) & (self.table["kind"] == self.kind)
        shown = self.table.assign(best=np.where(best, "<", ""))
        table = shown.to_string(index=False, float_format=lambda x: f"{x:.3f}")
        counted = hidden_state_of(self.hook_name)
        also = "" if counted is None else f", which transformers calls hidden_states[{counted}]"
        verdict = "trained at" if self.decided else "not decided; nearest is"
        return (
            f"{table}\n{verdict} {self.hook_name}{also}: {self.margin:+.3f} ({self.low:+.3f} to {self.high:+.3f}) "
            f"explained variance of {self.kind} rows ahead of {self.second}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        facts = {name: value for name, value in asdict(self).items() if name != "table"}
        counted = hidden_state_of(self.hook_name)
        return (
            facts
            | {"decided": self.decided, "hidden_states": counted}
            | {"table": self.table.astype(object).where(self.table.notna(), None).to_dict("records")}
        )


def hidden_state_of(hook_name: str) -> int | None:
    """Index into transformers' `hidden_states` of a hook point; None where it has none.

    `hidden_states[0]` is the input of the first block. transformers applies the final norm to the last entry, so
    the output of the last block is not in the list, although it gets a number here.
    """
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name)
    return None if found is None else int(found[1]) + (found[2] == "post")


@torch.no_grad()
def locate_sae(sae: SAE[Any], batches: Iterable[LocateBatch], *, seed: int = 0) -> Location:
    """Find the hook point whose rows an SAE reconstructs best.

    Args:
        sae: The SAE; its metadata are not read.
        batches: Rows of the same positions at every candidate hook point, two or more.
        seed: Random seed of the bootstrap.

    Raises:
        SAEError: There are fewer than two hook points or studies, or a width is not the SAE's.
    """
    sums: dict[tuple[str, str], _StudySums] = {}
    for values, study, kind in batches:
        for hook_name, rows in values.items():
            if rows.ndim != 2 or rows.shape[1] != sae.cfg.d_in:
                raise SAEError(
                    f"Rows at {hook_name} have shape {tuple(rows.shape)} and the SAE reads {sae.cfg.d_in} numbers per "
                    "row. Leave that hook point out, or give the SAE's own model."
                )
            for name in np.unique(kind):
                here = np.flatnonzero(kind == name)
                own = sums.setdefault((str(name), hook_name), _StudySums())
                own.add(sae, rows[torch.from_numpy(here)], study[here])
    kinds = sorted({name for name, _ in sums})
    hook_names = list(dict.fromkeys(hook for _, hook in sums))
    if len(hook_names) < 2:
        raise SAEError(
            f"An SAE is located by comparing hook points, and {len(hook_names)} was given. Give two or more."
        )
    table = pd.DataFrame(
        [
            {
                "kind": name,
                "hook_name": hook,
                "hidden_states": hidden_state_of(hook),
                "rows": sums[name, hook].rows,
                "explained_variance": sums[name, hook].explained_variance(),
                "l0": sums[name, hook].active / sums[name, hook].rows,
            }
            for name in kinds
            for hook in hook_names
        ]
    ).astype({"hidden_states": "Int64"})
    kind = str(table.loc[table["explained_variance"].idxmax(), "kind"])
    ranked = table[table["kind"] == kind].sort_values("explained_variance", ascending=False)["hook_name"]
    best, second = sums[kind, ranked.iloc[0]], sums[kind, ranked.iloc[1]]
    n = len(best.residual)
    if n < 2:
        raise SAEError(f"Rows of {n} study were given; the interval of the margin needs two or more studies.")
    interval = bootstrap(lambda w: best.resampled(w) - second.resampled(w), n, seed=seed)
    margin = best.explained_variance() - second.explained_variance()
    return Location(
        table,
        kind,
        str(ranked.iloc[0]),
        str(ranked.iloc[1]),
        margin,
        float(interval.low),
        float(interval.high),
    )


class _StudySums:
    """Sums per study from which the explained variance of any weighting of studies follows.

    The variance is taken around the mean of all rows counted, for every resample.
    """

    def __init__(self) -> None:
        self.rows = self.active = 0
        self.residual: dict[int, float] = {}
        self._square: dict[int, float] = {}
        self._total: dict[int, Tensor] = {}
        self._rows: dict[int, int] = {}
        self._origin: Tensor | None = None

    def add(self, sae: SAE[Any], rows: Tensor, study: np.ndarray) -> None:
        """Count rows (n, d_in) of studies (n,)."""
        x = rows.to(sae.W_dec.device, torch.float32)
        acts = sae.encode(x.to(sae.W_dec.dtype))
        residual = (x - sae.decode(acts).float()).pow(2).sum(1).double().cpu()
        x = x.double().cpu()
        if self._origin is None:
            self._origin = x.mean(0)
        centred = x - self._origin
        square = centred.pow(2).sum(1)
        self.rows += len(x)
        self.active += int((acts != 0).sum())
        for number in np.unique(study):
            mine = torch.from_numpy(np.flatnonzero(study == number))
            key = int(number)
            self.residual[key] = self.residual.get(key, 0.0) + float(residual[mine].sum())
            self._square[key] = self._square.get(key, 0.0) + float(square[mine].sum())
            self._total[key] = self._total.get(key, 0) + centred[mine].sum(0)
            self._rows[key] = self._rows.get(key, 0) + len(mine)

    def _variances(self) -> np.ndarray:
        """(n_studies,) squared distances to the mean of all rows, in the order of `residual`."""
        mean = torch.stack(list(self._total.values())).sum(0) / self.rows
        values = [
            self._square[k] - 2 * float(mean @ self._total[k]) + self._rows[k] * float(mean @ mean)
            for k in self.residual
        ]
        return np.asarray(values)

    def explained_variance(self) -> float:
        return float(self.resampled(np.ones((1, len(self.residual))))[0])

    def resampled(self, weights: np.ndarray) -> np.ndarray:
        """(draws,) explained variance under weights (draws, n_studies)."""
        residual = np.asarray(list(self.residual.values()))
        return explained_by_sums(weights @ residual, weights @ self._variances())

"""Where rows come from: units of whole studies, read when asked for and the same whenever they are.

    unit u -> blocks of rows in study order       studies ascend from unit to unit; rank r takes units r, r + W, ...

A unit is what a killed collection goes back to: some studies through the model anew, or a shard of a store. It knows
nothing about statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sae_lens import SAE

from sae_lens_maira.activations import ActivationRows, ActivationStore, RowSettings, read_rows
from sae_lens_maira.errors import RecordError
from sae_lens_maira.maira2 import DEFAULT_ROLES, Maira2, resolve_roles
from sae_lens_maira.maira2.roles import RoleFilter
from sae_lens_maira.studies import Study


class ActivationSource(Protocol):
    """Units of rows by number; `ActivationRows.study` counts in the one sequence of studies behind them."""

    def __len__(self) -> int: ...

    def __getitem__(self, unit: int, /) -> Iterable[ActivationRows]: ...


class ModelSource:
    """Units that run the model anew whenever they are read: time twice, no disk."""

    def __init__(
        self,
        maira: Maira2,
        studies: Sequence[Study],
        hook_name: str,
        roles: Any = DEFAULT_ROLES,
        studies_per_block: int = 32,
    ) -> None:
        """Remember what to run.

        Args:
            maira: model and processor.
            studies: with reports.
            hook_name: hook point.
            roles: a preset of `role_mask` or the roles to keep.
            studies_per_block: studies a unit; a study of MAIRA-2 has up to 4,107 patches of 16 kB each.
        """
        self._maira, self._studies, self._hook, self._roles = maira, studies, hook_name, roles
        self._size = studies_per_block
        kept = sorted(int(role) for role in resolve_roles(roles))
        self.about = {"hook point": hook_name, "roles": kept, "studies a unit": studies_per_block}

    def __len__(self) -> int:
        return math.ceil(len(self._studies) / self._size)

    def __getitem__(self, unit: int, /) -> list[ActivationRows]:
        start = unit * self._size
        part = self._studies[start : start + self._size]
        settings = RowSettings(roles=self._roles, batch_size=min(16, self._size))
        rows = read_rows(self._maira, part, self._hook, settings, progress=False)
        rows.study[:] += start
        return [rows]


class StoreSource:
    """The shards of an activation store; only rows of the studies' own reports, since contexts show those."""

    def __init__(
        self, store: Path | str, hook_name: str, roles: RoleFilter | None = None, max_rows: int = 16384
    ) -> None:
        """Open a store.

        Args:
            store: its folder.
            hook_name: one of its hook points.
            roles: a preset or roles to keep of what it holds; all if None.
            max_rows: rows in memory at once.

        Raises:
            StoreError: there is no store.
            RecordError: shards are missing, or it has no such hook point.
        """
        self._store = _OneShard(store)
        spec = self._store.spec
        if hook_name not in spec.hooks:
            raise RecordError(f"{store} holds {', '.join(spec.hooks)}, not {hook_name!r}; name one of these.")
        self._shards = ActivationStore(store).committed()
        if len(self._shards) < spec.n_shards:
            raise RecordError(
                f"{store} has {len(self._shards)} of {spec.n_shards} shards; finish the harvest with the command that "
                "began it."
            )
        self._hook, self._max = hook_name, max_rows
        self._roles = None if roles is None else sorted(int(role) for role in resolve_roles(roles))
        self.about = {"hook point": hook_name, "roles": self._roles, "store": spec.model}

    @property
    def study_ids(self) -> list[str]:
        """Ids of the studies that rows are numbered by."""
        return self._store.study_ids

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, unit: int, /) -> Iterator[ActivationRows]:
        self._store.only = self._shards[unit]
        for rows in self._store.blocks(self._hook, max_rows=self._max, source="teacher"):
            kept = rows if self._roles is None else rows.where(np.isin(rows.role, self._roles))
            if len(kept):
                yield kept


class _OneShard(ActivationStore):
    """A store that shows one of its shards."""

    only = 0

    def committed(self) -> list[int]:
        return [self.only]


@torch.no_grad()
def encode_sparse(sae: SAE[Any], values: torch.Tensor, chunk: int) -> torch.Tensor:
    """Activations (n, d_sae) of rows (n, d_in), sparse, encoded `chunk` rows at a time on the SAE's device."""
    dtype = sae.W_dec.dtype
    parts = [sae.encode(part.to(sae.device, dtype)).to_sparse().cpu() for part in values.split(chunk)]
    return torch.cat(parts) if parts else torch.zeros(0, int(sae.cfg.d_sae)).to_sparse()

"""Sources of activation rows: units of whole studies, with the same rows in every pass.

    unit u -> blocks of rows in study order       studies ascend from unit to unit; rank r reads units r, r + W, ...

A unit is the amount that a killed collection reads again: some studies run through the model, or a shard of a store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from sae_lens import SAE

from sae_lens_maira.activations import ActivationRows, ActivationStore, RowSettings, read_rows
from sae_lens_maira.activations.reader import study_length
from sae_lens_maira.errors import RecordError
from sae_lens_maira.maira2 import DEFAULT_ROLES, Maira2, TokenRole, resolve_roles
from sae_lens_maira.studies import Study
from sae_lens_maira.token_roles import LAST_IMAGE_PRESET, RoleFilter


class ActivationSource(Protocol):
    """Protocol: units of rows by number. `ActivationRows.study` is the index into the studies of the source."""

    def __len__(self) -> int: ...

    def __getitem__(self, unit: int, /) -> Iterable[ActivationRows]: ...


@runtime_checkable
class StudySource(Protocol):
    """Protocol: a source that can read some studies of a unit without reading all."""

    def of_studies(self, unit: int, studies: np.ndarray, /) -> Iterable[ActivationRows]: ...


def rows_of_studies(source: ActivationSource, unit: int, studies: np.ndarray) -> Iterator[ActivationRows]:
    """Read the rows of a unit that belong to `studies` (n,); the source skips other studies if it can.

    Args:
        source: Source of the rows.
        unit: Number of the unit.
        studies: Indices of studies, of any unit.
    """
    blocks = source.of_studies(unit, studies) if isinstance(source, StudySource) else source[unit]
    for rows in blocks:
        kept = rows.where(np.isin(rows.study, studies))
        if len(kept):
            yield kept


class ModelSource:
    """Source that runs the model in every pass: twice the compute, no disk."""

    def __init__(
        self,
        maira: Maira2,
        studies: Sequence[Study],
        hook_name: str,
        roles: Any = DEFAULT_ROLES,
        studies_per_block: int = 32,
        batch_size: int = 16,
        workers: int = 1,
    ) -> None:
        """Store the settings of the runs.

        Args:
            maira: Model and processor.
            studies: Studies with reports.
            hook_name: Hook point.
            roles: A preset of `role_mask` or the roles to keep.
            studies_per_block: Number of studies per unit, all in memory; a study of MAIRA-2 has up to 4,107 patches of
                16 kB each.
            batch_size: Number of studies per forward.
            workers: Number of threads that decode and preprocess images in advance.
        """
        self._maira, self._studies, self._hook, self._roles = maira, studies, hook_name, roles
        self._size, self._workers = studies_per_block, workers
        self._batch = min(batch_size, studies_per_block)
        kept = sorted(int(role) for role in resolve_roles(roles))
        self.about = {
            "hook point": hook_name,
            "roles": roles if roles == LAST_IMAGE_PRESET else kept,
            "studies per unit": studies_per_block,
            "studies per forward": self._batch,
        }

    def __len__(self) -> int:
        return math.ceil(len(self._studies) / self._size)

    def __getitem__(self, unit: int, /) -> list[ActivationRows]:
        return self._read(self._numbers(unit))

    def of_studies(self, unit: int, studies: np.ndarray, /) -> list[ActivationRows]:
        """Run the batches that contain one of `studies`, in full: other batches would be padded and rounded
        differently.
        """
        order = sorted(self._numbers(unit), key=lambda i: (study_length(self._studies[i]), i))
        batches = [order[at : at + self._batch] for at in range(0, len(order), self._batch)]
        kept = [batch for batch in batches if np.isin(batch, studies).any()]
        return self._read(sorted(number for batch in kept for number in batch))

    def _numbers(self, unit: int) -> list[int]:
        return list(range(unit * self._size, min((unit + 1) * self._size, len(self._studies))))

    def _read(self, numbers: list[int]) -> list[ActivationRows]:
        if not numbers:
            return []
        rows = read_rows(
            self._maira,
            [self._studies[number] for number in numbers],
            self._hook,
            RowSettings(roles=self._roles, batch_size=self._batch),
            progress=False,
            workers=self._workers,
        )
        rows.study[:] = np.asarray(numbers)[rows.study]
        return [rows]


class StoreSource:
    """Source that reads the shards of an activation store; only rows of the studies' own reports, as contexts need."""

    def __init__(
        self, store: Path | str, hook_name: str, roles: RoleFilter | None = None, max_rows: int = 16384
    ) -> None:
        """Open a store.

        Args:
            store: Folder of the store.
            hook_name: One of its hook points.
            roles: A preset or roles to keep; None for all that the store contains.
            max_rows: Largest number of rows in memory.

        Raises:
            StoreError: There is no store.
            RecordError: Shards are missing, or the store has no such hook point.
        """
        self._store = ActivationStore(store)
        spec = self._store.spec
        if hook_name not in spec.hooks:
            raise RecordError(
                f"{store} contains {', '.join(spec.hooks)}, not {hook_name!r}; choose one of these."
            )
        self._shards = self._store.committed()
        if len(self._shards) < spec.n_shards:
            raise RecordError(
                f"{store} has {len(self._shards)} of {spec.n_shards} shards; finish the harvest with the command that "
                "began it."
            )
        self._hook, self._max = hook_name, max_rows
        self._roles = None if roles is None else sorted(int(role) for role in resolve_roles(roles))
        if roles == LAST_IMAGE_PRESET and self._roles is not None:
            if not spec.settings.get("last_image"):
                raise RecordError(
                    f"{store} was not harvested with the roles {LAST_IMAGE_PRESET}, so which of its image tokens are "
                    "the last ones is not recorded. Name other roles, or harvest with these."
                )
            self._roles.append(int(TokenRole.IMAGE))
        self.about = {"hook point": hook_name, "roles": self._roles, "store": self._store.fingerprint}

    @property
    def store(self) -> ActivationStore:
        """Store that is read."""
        return self._store

    @property
    def study_ids(self) -> list[str]:
        """Ids of the studies, in the order that rows refer to."""
        return self._store.study_ids

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, unit: int, /) -> Iterator[ActivationRows]:
        return self._blocks(unit, None)

    def of_studies(self, unit: int, studies: np.ndarray, /) -> Iterator[ActivationRows]:
        """Read the rows of some studies; values of other studies are not read from disk."""
        return self._blocks(unit, studies)

    def _blocks(self, unit: int, studies: np.ndarray | None) -> Iterator[ActivationRows]:
        shards = [self._shards[unit]]
        for rows in self._store.blocks(self._hook, self._max, "teacher", shards, studies):
            kept = rows if self._roles is None else rows.where(np.isin(rows.role, self._roles))
            if len(kept):
                yield kept


@torch.no_grad()
def encode_sparse(sae: SAE[Any], values: torch.Tensor, chunk: int) -> torch.Tensor:
    """Encode rows (n, d_in) to sparse activations (n, d_sae), `chunk` rows at a time on the SAE's device."""
    dtype = sae.W_dec.dtype
    parts = [sae.encode(part.to(sae.device, dtype)).to_sparse().cpu() for part in values.split(chunk)]
    return torch.cat(parts) if parts else torch.zeros(0, int(sae.cfg.d_sae)).to_sparse()


def active_entries(acts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(row, latent, value)` of all activations (n, d_sae) above zero, ascending by row, on the CPU."""
    if acts.layout == torch.strided:
        row, latent = (acts > 0).nonzero(as_tuple=True)
        return row.cpu(), latent.cpu(), acts[row, latent].float().cpu()
    sparse = (acts if acts.layout == torch.sparse_coo else acts.to_sparse_coo()).coalesce()
    row, latent = sparse.indices().cpu()
    value = sparse.values().float().cpu()
    kept = value > 0
    return row[kept], latent[kept], value[kept]

"""Activation rows in memory: one row per kept token, with everything that later rooms ask of it.

A row is `h[position]` at one hook point, and beside it the study, the token's role and id, and for a patch its
image, row and column. Studies pass through the model once, teacher-forced on their report, and the forward
stops behind the hooked layer. For collections that do not fit in memory, a store on disk takes this one's place.
It knows nothing about SAEs.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from sae_lens_maira.errors import StoreError
from sae_lens_maira.hooks._names import PointTable
from sae_lens_maira.hooks.hooked import HookedMaira2
from sae_lens_maira.maira2 import Maira2, Maira2Encoding, TokenRole, role_mask
from sae_lens_maira.studies import Study


@dataclass(frozen=True)
class ActivationRows:
    """Kept activations of N tokens.

    Attributes:
        values: (N, d_in) float32.
        study: (N,) int64, number of the study in the sequence that was harvested.
        position: (N,) int32, position in that study's own unpadded sequence.
        role: (N,) int8, a `TokenRole`.
        token: (N,) int32 token id.
        kind: (N,) int8, 0 frontal, 1 lateral, 2 prior frontal, -1 for text.
        patch_row, patch_col: (N,) int16, -1 for text.
        hook_name: where the values were taken.
    """

    values: torch.Tensor
    study: np.ndarray
    position: np.ndarray
    role: np.ndarray
    token: np.ndarray
    kind: np.ndarray
    patch_row: np.ndarray
    patch_col: np.ndarray
    hook_name: str

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_image(self) -> np.ndarray:
        """(N,) True for image patches."""
        return self.role == TokenRole.IMAGE

    def where(self, mask: np.ndarray) -> "ActivationRows":
        """The rows where `mask` (N,) is True."""
        if mask.shape != (len(self),):
            raise StoreError(f"mask has shape {mask.shape}; expected ({len(self)},), one entry per row.")
        kept = {
            f.name: getattr(self, f.name)[mask] for f in fields(self) if f.name not in ("values", "hook_name")
        }
        return replace(self, values=self.values[torch.from_numpy(mask)], **kept)


def joined(parts: Sequence[ActivationRows]) -> ActivationRows:
    """Rows of several collections at one hook point, one after another.

    Raises:
        StoreError: there are none, or they come from several hook points.
    """
    names = {part.hook_name for part in parts}
    if len(names) != 1:
        raise StoreError(
            f"Rows at {', '.join(sorted(names)) or 'no hook point'} were to be joined; expected one hook point."
        )
    columns = {
        f.name: np.concatenate([getattr(part, f.name) for part in parts])
        for f in fields(ActivationRows)
        if f.name not in ("values", "hook_name")
    }
    return ActivationRows(values=torch.cat([part.values for part in parts]), hook_name=names.pop(), **columns)


def harvest_rows(
    maira: Maira2,
    studies: Sequence[Study],
    hook_name: str,
    roles: str | Collection[TokenRole] = "paper",
    batch_size: int = 16,
    image_rate: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> ActivationRows:
    """Run studies with their reports through the model and keep the wanted tokens' activations.

    Args:
        maira: model and processor.
        studies: with reports.
        hook_name: hook point, for example `blocks.4.hook_resid_post`.
        roles: a preset of `role_mask` or the roles to keep.
        batch_size: studies a forward.
        image_rate: share of image patches to keep; MAIRA-2 has 1,369 of them an image and some 60 report tokens.
        seed: of the patch sample.
        progress: show a bar.

    Returns:
        The rows, in study order.

    Raises:
        StoreError: nothing was kept.
    """
    hooked = HookedMaira2(maira.model, maira.processor)
    # Nothing behind the hook point is needed; a forward to a middle layer costs half of a whole one.
    stop = hooked.points.resolve(hook_name).stop
    rng = np.random.default_rng(seed)
    parts: list[dict[str, np.ndarray | torch.Tensor]] = []
    order = np.argsort([len(study.report or "") + 400 * _n_images(study) for study in studies], kind="stable")
    starts = range(0, len(studies), batch_size)
    for start in tqdm(starts, desc=f"activations at {hook_name}", unit="batch", disable=not progress):
        chosen = order[start : start + batch_size]
        encoding = maira.processor.encode(
            [studies[i] for i in chosen], report="teacher", padding_side="right"
        )
        keep = role_mask(encoding, roles)
        if image_rate < 1:
            patches = encoding.roles == TokenRole.IMAGE
            keep = keep & (~patches | torch.from_numpy(rng.random(tuple(keep.shape)) < image_rate))
        with torch.no_grad():
            _, cache = hooked.run_with_cache(
                encoding.forward_inputs(), names_filter=[hook_name], stop_at_layer=stop
            )
        parts.append(_kept(encoding, keep, cache[hook_name], chosen))
    if not parts or not sum(len(p["study"]) for p in parts):
        raise StoreError(
            f"No token of {len(studies)} studies has a role in {roles!r}, so nothing was kept; "
            "choose other roles or give studies with reports."
        )
    columns = {
        name: np.concatenate([np.asarray(p[name]) for p in parts]) for name in parts[0] if name != "values"
    }
    in_order = np.argsort(columns["study"], kind="stable")
    values = torch.cat([torch.as_tensor(p["values"]) for p in parts])[torch.from_numpy(in_order)]
    return ActivationRows(values=values, hook_name=hook_name, **{n: c[in_order] for n, c in columns.items()})


def layer_of(maira: Maira2, hook_name: str) -> int:
    """Decoder layer of a hook point; -1 for points behind the last layer."""
    stop = PointTable(maira.model.config).resolve(hook_name).stop
    return -1 if stop is None else int(stop) - 1


def _n_images(study: Study) -> int:
    return sum(image is not None for image in (study.frontal, study.lateral, study.prior_frontal))


def _kept(
    encoding: Maira2Encoding, keep: torch.Tensor, values: torch.Tensor, studies: np.ndarray
) -> dict[str, np.ndarray | torch.Tensor]:
    """Columns of one batch's kept tokens, (n,) each."""
    row, position = (index.numpy() for index in keep.nonzero(as_tuple=True))
    return {
        "values": values[keep.to(values.device)].float().cpu(),
        "study": studies[row],
        "position": position.astype(np.int32),
        "role": encoding.roles[keep].numpy(),
        "token": encoding.input_ids[keep].numpy().astype(np.int32),
        "kind": encoding.view[keep].numpy(),
        "patch_row": encoding.patch_row[keep].numpy(),
        "patch_col": encoding.patch_col[keep].numpy(),
    }


class RowProvider:
    """Endless shuffled batches of rows: a data provider in SAELens' sense (`Iterator[Tensor (B, d_in)]`).

    Each pass over the rows is a new permutation, seeded by (seed, pass); the last short batch of a pass is
    completed from the next one, so every row is used equally often.
    """

    def __init__(self, values: torch.Tensor, batch_size: int, seed: int = 0) -> None:
        if len(values) == 0:
            raise StoreError("There are no rows to train on; harvest some first.")
        self._values, self._batch, self._seed = values, batch_size, seed
        self._passes, self._queue = 0, torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        while len(self._queue) < self._batch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._passes)
            self._queue = torch.cat([self._queue, torch.randperm(len(self._values), generator=generator)])
            self._passes += 1
        chosen, self._queue = self._queue[: self._batch], self._queue[self._batch :]
        return self._values[chosen]

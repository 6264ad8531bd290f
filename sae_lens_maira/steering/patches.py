"""Steering from the image positions: add a map of vectors to the frontal film's patches, in the prefill only.

    h[p] <- h[p] + s * delta[p]        for the patches p of the frontal image,    delta (patches, d_model)

A latent map is `delta[p] = sum_j m_j[p] W_dec[j]` over the latents whose mean activation map m_j differs most
between positive and negative studies; the difference of means of h itself is the supervised reference, and a
random direction of equal norm at every patch is the control. It knows nothing about how a report is read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.latents import Encoder
from sae_lens_maira.maira2 import Maira2, ParsedReport, generate_reports
from sae_lens_maira.stats import mean_map
from sae_lens_maira.studies import Study

FRONTAL = 0


@dataclass(frozen=True)
class PatchMap:
    """A vector per patch of the frontal image.

    Attributes:
        delta: (rows * cols, d_model) float32, row-major.
        hook_name: where it is added.
        label: what it is, for tables.
        latents: the latents it is made of; empty for directions.
    """

    delta: torch.Tensor
    hook_name: str
    label: str
    latents: tuple[int, ...] = ()

    def random_like(self, seed: int = 0) -> "PatchMap":
        """One random direction, at every patch with this map's own norm there."""
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(self.delta.shape[1], generator=generator)
        direction = direction / direction.norm()
        delta = self.delta.norm(dim=1, keepdim=True) * direction
        return PatchMap(delta, self.hook_name, f"random direction {seed}")


def mean_patch_maps(
    rows: ActivationRows, encode: Encoder, positive: np.ndarray, negative: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean activation of every unit at every frontal patch, over positive and over negative studies.

    Args:
        rows: image rows with all patches of the frontal films.
        encode: the dictionary, or the identity for the residual stream itself.
        positive: (n_studies,) mask.
        negative: (n_studies,) mask.

    Returns:
        Two (patches, units) tensors.
    """
    frontal = rows.where(rows.kind == FRONTAL)
    if len(frontal) == 0:
        raise InterventionError(
            "The rows hold no patch of a frontal image; harvest image positions for steering."
        )
    cols = int(frontal.patch_col.max()) + 1
    patch = torch.from_numpy(frontal.patch_row.astype(np.int64) * cols + frontal.patch_col)
    n_patches = int(patch.max()) + 1
    means = []
    for mask in (positive, negative):
        chosen = torch.from_numpy(mask[frontal.study])
        if not chosen.any():
            raise InterventionError(
                "There is no study on one side of the comparison, so no map can be formed."
            )
        where, values = patch[chosen], frontal.values[chosen]
        total: torch.Tensor | None = None
        for start in range(0, len(values), 8192):
            with torch.no_grad():
                acts = encode(values[start : start + 8192])
            if total is None:
                total = torch.zeros(n_patches, acts.shape[1])
            total.index_add_(0, where[start : start + 8192], acts)
        assert total is not None
        means.append(mean_map(total.T, torch.bincount(where, minlength=n_patches)).T)
    return means[0], means[1]


def latent_patch_map(
    rows: ActivationRows,
    encode: Encoder,
    decoder: torch.Tensor,
    positive: np.ndarray,
    negative: np.ndarray,
    n_latents: int = 8,
) -> PatchMap:
    """The map of the `n_latents` latents whose mean activation maps differ most between the two groups.

    Args:
        rows: image rows with all patches of the frontal films.
        encode: the SAE's encoder.
        decoder: (d_sae, d_model) its decoder rows.
        positive: (n_studies,) mask of studies with the finding to learn from.
        negative: (n_studies,) mask of studies without it.
        n_latents: how many.
    """
    present, absent = mean_patch_maps(rows, encode, positive, negative)
    difference = present - absent
    # The norm of what a latent would add, not of its activation: decoder rows differ in length.
    effect = difference.norm(dim=0) * decoder.norm(dim=1)
    chosen = effect.topk(min(n_latents, len(effect))).indices
    delta = difference[:, chosen] @ decoder[chosen]
    return PatchMap(delta.detach(), rows.hook_name, f"{len(chosen)} latents", tuple(chosen.tolist()))


def mean_difference_map(rows: ActivationRows, positive: np.ndarray, negative: np.ndarray) -> PatchMap:
    """The supervised reference: difference of the mean residual stream at every patch."""
    present, absent = mean_patch_maps(rows, lambda values: values, positive, negative)
    return PatchMap(present - absent, rows.hook_name, "difference of means")


@contextmanager
def steered(maira: Maira2, patch_map: PatchMap, strength: float, frontal: torch.Tensor) -> Iterator[None]:
    """Add `strength * delta` at the frontal patches while the context is open.

    Args:
        maira: the model; restored on exit, also after an exception.
        patch_map: the map.
        strength: multiple of the map; 0 changes nothing, bit for bit.
        frontal: (B, L) bool, the frontal image's patches of the encoding that will be run, each row with as many
            as the map has patches.

    Raises:
        InterventionError: the map does not fit, the strength is not finite, or the layer never saw the prefill.
    """
    counts = frontal.sum(1)
    if not np.isfinite(strength):
        raise InterventionError(f"The strength is {strength}; it must be a finite number.")
    if not bool((counts == len(patch_map.delta)).all()):
        raise InterventionError(
            f"The map has {len(patch_map.delta)} patches, the studies have {counts.tolist()} frontal patches; "
            "make the map from images of the same size."
        )
    layer = _layer(maira, patch_map.hook_name)
    fired = 0

    def add(
        _module: torch.nn.Module, _inputs: object, output: torch.Tensor | tuple
    ) -> torch.Tensor | tuple | None:
        nonlocal fired
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] < frontal.shape[1]:
            return None  # a decode step with a cache: the patches lie behind it
        fired += 1
        if strength == 0:
            return None
        # Without a cache every step sees the prompt again, with what was written so far to its right.
        where = torch.nn.functional.pad(frontal, (0, hidden.shape[1] - frontal.shape[1])).to(hidden.device)
        where = where.repeat_interleave(hidden.shape[0] // len(frontal), 0)
        delta = (strength * patch_map.delta).to(hidden)
        hidden = hidden.clone()
        hidden[where] += delta.repeat(len(where), 1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise InterventionError(
            f"The intervention at {patch_map.hook_name} never saw a prompt of {frontal.shape[1]} tokens, so it did "
            "nothing; run the encoding that the patch positions were taken from."
        )


def steer_reports(
    maira: Maira2, studies: Sequence[Study], patch_map: PatchMap, strength: float, batch_size: int = 32
) -> list[ParsedReport]:
    """Generate findings reports greedily under the intervention, in the studies' order."""
    reports: list[ParsedReport] = []
    for start in range(0, len(studies), batch_size):
        part = studies[start : start + batch_size]
        encoding = maira.processor.encode(part, task="findings")
        with steered(maira, patch_map, strength, encoding.view == FRONTAL):
            reports += generate_reports(maira.model, maira.processor, part, task="findings")
    return reports


def _layer(maira: Maira2, hook_name: str) -> torch.nn.Module:
    parts = hook_name.split(".")
    layers = maira.model.model.language_model.layers
    if (
        len(parts) != 3
        or parts[0] != "blocks"
        or parts[2] != "hook_resid_post"
        or int(parts[1]) >= len(layers)
    ):
        raise InterventionError(
            f"{hook_name!r} is not a residual stream of this model; expected blocks.0.hook_resid_post to "
            f"blocks.{len(layers) - 1}.hook_resid_post."
        )
    return layers[int(parts[1])]

"""Rank latents for steering: by agreement, by map difference, or by their effect on what the model writes.

    effect_j = u_j mean_studies sum_p w_p g_p . W_dec[j],     g = d/dh [log P(target) - log P(against)]

One gradient per study gives the first-order effect of every latent at once; a latent that agrees with a finding may
have none. Effects are signed: boost the largest, suppress the smallest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from sae_lens_maira.activations import ActivationRows
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.hooks import PointTable
from sae_lens_maira.hooks._upper import frozen_weights
from sae_lens_maira.latents import Encoder
from sae_lens_maira.maira2 import Maira2, Maira2Encoding, TokenRole
from sae_lens_maira.stats import f1_of_firing
from sae_lens_maira.steering.engine import check_sae
from sae_lens_maira.steering.maps import mean_patch_maps
from sae_lens_maira.steering.positions import VIEWS, Layout, Schedule, patches

PATCHES_AT_ONCE = 1024
"""Patches per image times studies of one pass with gradients."""


@dataclass(frozen=True)
class Ranking:
    """Latents ranked for one purpose.

    Attributes:
        how: "agreement", "output effect" or "map difference".
        scores: (d_sae,) float32; signed where a sign has a meaning.
    """

    how: str
    scores: torch.Tensor

    def boost(self, n: int) -> tuple[int, ...]:
        """The `n` latents of largest score, best first, only those above 0."""
        found = self.scores.topk(min(n, len(self.scores))).indices
        return tuple(int(j) for j in found if self.scores[j] > 0)

    def suppress(self, n: int) -> tuple[int, ...]:
        """The `n` latents of smallest score, lowest first, only those below 0."""
        found = (-self.scores).topk(min(n, len(self.scores))).indices
        return tuple(int(j) for j in found if self.scores[j] < 0)


def by_agreement(fires: np.ndarray, truth: np.ndarray) -> Ranking:
    """Rank by the F1 of firing against a finding.

    Args:
        fires: (n_studies, d_sae) bool, on the studies that are used to choose.
        truth: (n_studies,) bool.
    """
    return Ranking("agreement", torch.from_numpy(f1_of_firing(fires, truth[:, None])[:, 0].copy()))


def by_map_difference(
    rows: ActivationRows, encode: Encoder, decoder: torch.Tensor, positive: np.ndarray, negative: np.ndarray
) -> tuple[Ranking, torch.Tensor]:
    """Rank by the norm of what the difference of a latent's mean maps would add at the frontal patches.

    Args:
        rows: Image rows with all patches of the frontal images.
        encode: The SAE's encoder.
        decoder: (d_sae, d_model).
        positive: (n_studies,) mask of studies with the finding.
        negative: (n_studies,) mask of studies without it.

    Returns:
        The ranking, signed by the sum of the difference, and the difference (P, d_sae) itself; each column, reshaped
        to rows and columns of patches, is a grid for `patches`.
    """
    present, absent = mean_patch_maps(rows, encode, positive, negative)
    difference = present - absent
    size = difference.norm(dim=0) * decoder.norm(dim=1)
    return Ranking("map difference", size * difference.sum(0).sign()), difference


def by_output_effect(
    maira: Maira2,
    sae: SAE[Any],
    hook_name: str,
    studies: Sequence[Any],
    targets: Sequence[str],
    against: Sequence[str] | None = None,
    where: Schedule | None = None,
    p99: torch.Tensor | None = None,
    batch_size: int = 16,
) -> Ranking:
    """Rank by the first-order change of the log-probability of target reports, one gradient per study.

    Args:
        maira: The model.
        sae: SAE whose latents are ranked.
        hook_name: `blocks.{i}.hook_resid_post` of the SAE.
        studies: The studies to steer.
        targets: A report, or its beginning, to make more likely in each study.
        against: Reports to make less likely; None counts the targets only.
        where: Positions that will be steered; the frontal patches if not given.
        p99: (d_sae,) units; 1 if not given.
        batch_size: Studies per pass.

    Returns:
        Effects in nats per unit of strength, mean over studies.

    Raises:
        InterventionError: Numbers of studies and texts differ, the SAE does not fit, or no position is steered.
    """
    if not studies or len(targets) != len(studies) or (against is not None and len(against) != len(studies)):
        raise InterventionError(
            f"{len(studies)} studies, {len(targets)} targets and {None if against is None else len(against)} "
            "contrasts were given; give one text per study."
        )
    check_sae(sae, maira.model.config.get_text_config().hidden_size)
    schedule = patches() if where is None else where
    module = maira.model.get_submodule(PointTable(maira.model.config).resolve(hook_name).module)
    total = torch.zeros(sae.cfg.d_in)
    steered = 0
    for texts, sign in ((targets, 1.0), (against, -1.0)):
        if texts is None:
            continue
        for start in range(0, len(studies), batch_size):
            stop = start + batch_size
            encoding = maira.processor.encode(
                list(studies[start:stop]), report=list(texts[start:stop]), padding_side="right"
            ).to(maira.model.device, maira.model.dtype)
            weights = schedule.weights(Layout.of(encoding))
            steered += int((weights != 0).sum())
            gradient = _gradient(maira, module, encoding)
            total += sign * (gradient.float().cpu() * weights[..., None]).sum((0, 1))
    if not steered:
        raise InterventionError(
            "The schedule has no position in these studies, so no latent has an effect there."
        )
    scores = sae.W_dec.detach().float().cpu() @ total / len(studies)
    return Ranking("output effect", scores if p99 is None else scores * p99.float().cpu())


def report_gradient(
    maira: Maira2,
    hook_name: str,
    studies: Sequence[Any],
    targets: Sequence[str],
    against: Sequence[str],
    batch_size: int | None = None,
) -> torch.Tensor:
    """Gradient of log P(target) - log P(against) at every frontal patch, mean over studies: (P, d_model).

    Args:
        maira: The model.
        hook_name: Hook point of the gradient.
        studies: The studies to steer, each with a frontal image.
        targets: A report, or its beginning, to make more likely in each study.
        against: A report to make less likely in each study.
        batch_size: Studies per pass; 16, or fewer where images have many patches (one at MAIRA-2's 1,369), because the
            activations of every block above the hook point are kept.
    """
    if batch_size is None:
        batch_size = max(1, min(16, PATCHES_AT_ONCE // maira.processor.patches_per_side**2))
    module = maira.model.get_submodule(PointTable(maira.model.config).resolve(hook_name).module)
    total: torch.Tensor | None = None
    for texts, sign in ((targets, 1.0), (against, -1.0)):
        for start in range(0, len(studies), batch_size):
            part = slice(start, start + batch_size)
            encoding = maira.processor.encode(
                list(studies[part]), report=list(texts[part]), padding_side="right"
            ).to(maira.model.device, maira.model.dtype)
            here = encoding.view == VIEWS["frontal"]
            found = _gradient(maira, module, encoding)[here].reshape(
                len(encoding), -1, maira.model.lm_head.in_features
            )
            found = sign * found.float().cpu().sum(0)
            total = found if total is None else total + found
    if total is None:
        raise InterventionError("No study was given to compute a gradient for; give at least one.")
    return total / len(studies)


def by_map_effect(difference: torch.Tensor, gradient: torch.Tensor, decoder: torch.Tensor) -> Ranking:
    """Rank latents by the first-order effect of adding their own map: sum_p m_j[p] g[p] . W_dec[j].

    Args:
        difference: (P, d_sae) maps.
        gradient: (P, d_model), from `report_gradient`.
        decoder: (d_sae, d_model).

    Returns:
        Effects in nats at strength 1.
    """
    return Ranking("output effect of the map", (difference * (gradient @ decoder.T)).sum(0))


def _gradient(maira: Maira2, module: torch.nn.Module, encoding: Maira2Encoding) -> torch.Tensor:
    """(B, L, d_model) gradient of the summed log-probability of the reports with respect to the stream.

    Nothing below the stream has a graph, and logits are computed at the reports' tokens only.
    """
    stream: list[torch.Tensor] = []

    def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        leaf = value.detach().requires_grad_(True)
        stream.append(leaf)
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    model = maira.model
    targets = encoding.roles[:, 1:] == TokenRole.REPORT
    ids = encoding.input_ids[:, 1:][targets]
    handle = module.register_forward_hook(hook, prepend=True)
    try:
        with torch.enable_grad(), frozen_weights(model):
            last = model.model(**encoding.model_inputs(), use_cache=False).last_hidden_state
            logits = model.lm_head(last[:, :-1][targets]).float()
            score = logits.log_softmax(-1).gather(-1, ids[:, None]).sum()
            return torch.autograd.grad(score, stream[0])[0]
    finally:
        handle.remove()

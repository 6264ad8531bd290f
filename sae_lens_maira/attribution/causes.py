"""Gather the causes of a model's errors: attributions of false, right and missing statements over studies.

Per kind of statement, the mean effect of every latent at the frontal patches, and the mean direction u of the gradient
at the causal patches. `steering.correction.along` makes corrections of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_maira.attribution.entries import active_entries
from sae_lens_maira.attribution.inputs import encode_with_report
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.attribution.sentences import Sentence, report_sentences
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.hooks import HookedMaira2


class Causes:
    """Attributions of one kind of statement, gathered over studies.

    Attributes:
        n: Sentences gathered.
    """

    def __init__(self, d_sae: int, d_model: int) -> None:
        self.n = 0
        self._latents = torch.zeros(d_sae)
        self._direction = torch.zeros(d_model)

    @property
    def latents(self) -> torch.Tensor:
        """(d_sae,) mean first-order effect of every latent, nats per sentence."""
        return self._latents / max(1, self.n)

    @property
    def direction(self) -> torch.Tensor:
        """(d_model,) unit vector: mean direction of the gradient, weighted by positive attribution of the position.

        Raises:
            InterventionError: Nothing was gathered.
        """
        if not self.n or not bool(self._direction.norm() > 0):
            raise InterventionError(
                "No sentence of this kind was attributed, so it has no direction. Read more studies."
            )
        return self._direction / self._direction.norm()

    def add(self, latents: torch.Tensor, direction: torch.Tensor) -> None:
        """Count one sentence."""
        self.n += 1
        self._latents += latents.cpu()
        self._direction += direction.cpu()


def gather(
    hooked: HookedMaira2,
    sae: SAE[Any],
    hook_name: str,
    study: Any,
    report: str,
    kinds: Sequence[tuple[Causes, Sentence | str]],
) -> None:
    """Attribute some sentences of one report to latents at the frontal patches, and count them.

    Args:
        hooked: The model.
        sae: An SAE at the hook point.
        hook_name: Output of a decoder block.
        study: The study.
        report: The report in which the sentences occur.
        kinds: Positions to count, and the sentence; a text that does not occur is skipped.
    """
    run = ResidualRun(hooked, encode_with_report(hooked, study, report), hook_name)
    known = {one.text: one for one in report_sentences(run.encoding, hooked.tokenizer)}
    wanted = [
        (into, known[str(getattr(s, "text", s))]) for into, s in kinds if str(getattr(s, "text", s)) in known
    ]
    if not wanted:
        return
    entries, _ = active_entries(sae, run.hidden, (run.encoding.view[0] == 0).nonzero()[:, 0])
    _, gradients = run.gradients(run.hidden, [one.positions for _, one in wanted])
    for (into, _), gradient in zip(wanted, gradients, strict=True):
        effect = entries.dot(gradient)
        latents = torch.zeros(sae.cfg.d_sae, device=effect.device).index_add_(0, entries.latent, effect)
        weight = torch.zeros(len(gradient), device=effect.device)
        weight.index_add_(0, entries.position, effect.clamp(min=0))
        unit = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
        into.add(latents, (weight[:, None] * unit).sum(0) / weight.sum().clamp(min=1e-12))


__all__ = ["Causes", "gather"]

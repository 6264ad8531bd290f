"""Correct a model by the causes of its errors: change, per latent, only what causes a false or a missing statement.

    h'(p) = h(p) + sum over chosen latents j of a_j(p) c_j          at the frontal patches
    c_j = -share (W_j . u) u      removes the part of j that causes a false statement
    c_j = (factor - 1) (W_j . u) u      strengthens the part of j that a missing statement needs

u is the mean direction of the statement's gradient at its causal patches, made orthogonal to those of the statements
that are to be spared. Latents are ranked by attribution. A latent that is silent changes nothing, so the correction is
conditional on what else the image shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_maira.attribution.entries import active_entries
from sae_lens_maira.attribution.inputs import encode_with_report
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.attribution.sentences import Sentence, report_sentences
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding


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


@dataclass(frozen=True)
class CauseCorrection:
    """A change per unit of activation of some latents.

    Attributes:
        latents: The latents.
        change: (n, d_model) what a unit of activation of each adds to the stream.
    """

    latents: tuple[int, ...]
    change: torch.Tensor

    @staticmethod
    def along(
        sae: SAE[Any], latents: Sequence[int], direction: torch.Tensor, amount: float
    ) -> "CauseCorrection":
        """Change the part of some decoder rows along a unit direction by a multiple of itself (-1 removes it)."""
        rows = sae.W_dec.detach().float()[list(latents)]
        return CauseCorrection(tuple(latents), amount * (rows @ direction)[:, None] * direction)

    def __add__(self, other: "CauseCorrection") -> "CauseCorrection":
        if not self.latents or not other.latents:
            return self if self.latents else other
        return CauseCorrection(self.latents + other.latents, torch.cat([self.change, other.change]))

    @torch.no_grad()
    def reports(
        self,
        hooked: HookedMaira2,
        sae: SAE[Any],
        hook_name: str,
        studies: Sequence[Any],
        max_new_tokens: int | None = None,
        batch: int = 32,
    ) -> list[str]:
        """Greedy reports of some studies with the correction; without any edit if it has no latents."""
        processor: Any = hooked.processor
        texts: list[str] = []
        for start in range(0, len(studies), batch):
            encoding = processor.encode(list(studies[start : start + batch]))
            edits = [(hook_name, self._edit(sae, encoding))] if self.latents else []
            with hooked.hooks(fwd_hooks=edits):
                found = hooked.generate(encoding, return_type="reports", max_new_tokens=max_new_tokens)
            texts += [report.text for report in found]
        return texts

    def norm(self, acts: torch.Tensor) -> float:
        """Mean norm of the change over rows of activations (n, d_sae)."""
        return float((acts[:, list(self.latents)] @ self.change).norm(dim=1).mean()) if self.latents else 0.0

    def _edit(self, sae: SAE[Any], encoding: Maira2Encoding) -> Any:
        frontal = encoding.view == 0
        length = frontal.shape[1]

        def edit(value: torch.Tensor, hook: Any) -> torch.Tensor | None:
            if value.shape[1] < length:
                return None  # a decoding step with a cache
            here = frontal.to(value.device)
            acts = sae.encode(value[here].to(sae.W_dec))[:, list(self.latents)].float()
            edited = value.clone()
            edited[here] = (value[here].float() + acts @ self.change).to(value.dtype)
            return edited

        return edit


def spared(direction: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """(d_model,) unit part of a direction that is orthogonal to other directions.

    Raises:
        InterventionError: Nothing is left of it.
    """
    left = direction
    if others:
        basis = torch.linalg.qr(torch.stack(list(others), 1)).Q
        left = direction - basis @ (basis.T @ direction)
    if not bool(left.norm() > 1e-6):
        raise InterventionError(
            "The direction is in the span of those that are to be spared. Spare fewer statements."
        )
    return left / left.norm()


NOTHING = CauseCorrection((), torch.zeros(0, 1))
"""No correction."""

__all__ = ["NOTHING", "CauseCorrection", "Causes", "gather", "spared"]

"""Effect of an SAE's reconstruction on MAIRA-2's loss, on the tokens that matter and with the images.

    score = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)      KL(clean || sae)

Both over targets of the wanted roles, with the SAE (or zeros) put in at the positions of the roles it was trained on.
An SAE of one attention head replaces that head. SAELens' own evaluation runs text alone and counts every position,
image placeholders included.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks.hooked import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding, role_mask
from sae_lens_maira.stats import ExplainedVariance, loss_recovered


@dataclass
class Maira2Evaluator:
    """Evaluates an SAE on encoded studies; callable as SAELens' trainer calls its evaluator."""

    model: HookedMaira2
    encodings: Sequence[Maira2Encoding]
    """Batches with teacher-forced reports."""
    roles: Any = "all"
    """Roles whose positions the SAE replaces; None at vision and projector points."""
    target_roles: Any = "generated_only"
    """Roles whose tokens are predicted."""

    def __post_init__(self) -> None:
        if not self.encodings:
            raise HookError(
                "The evaluator was given no encodings; expected at least one batch. Encode studies with"
                " report='teacher'."
            )

    @torch.no_grad()
    def __call__(
        self, sae: Any, data_provider: Any = None, activation_scaler: Any = None
    ) -> dict[str, float]:
        """Evaluate.

        Args:
            sae: The SAE; `cfg.metadata.hook_name` says where it belongs.
            data_provider: Paused meanwhile if it prefetches; SAELens passes its own.
            activation_scaler: SAELens' scaler of the training run, if activations were scaled.

        Returns:
            `maira2/` metrics in nats and fractions: ce_loss, ce_loss_with_sae, ce_loss_with_ablation,
            ce_loss_score, kl_div_with_sae, l0, explained_variance.

        Raises:
            HookError: No position or no target has a wanted role.
        """
        # A prefetching provider runs the same model, and its hooks, in another thread.
        with data_provider.paused() if hasattr(data_provider, "paused") else nullcontext():
            return self._evaluate(sae, activation_scaler)

    def _evaluate(self, sae: Any, activation_scaler: Any) -> dict[str, float]:
        name = self.model.resolve(sae.cfg.metadata.hook_name)
        sums: dict[str, float] = {}
        moments = _Moments()
        targets = 0
        for encoding in self.encodings:
            batch = encoding.to(self.model.W_E.device)
            wanted = role_mask(batch, self.target_roles)[:, 1:]
            positions = None if self.roles is None else role_mask(batch, self.roles)
            clean = self._logits(batch, name, None, wanted)
            labels = batch.input_ids[:, 1:][wanted]
            replace = self._replacement(sae, activation_scaler, positions, moments)
            with_sae = self._logits(batch, name, replace, wanted)
            zeros = _zeros(positions, sae.cfg.metadata.hook_head_index)
            ablated = self._logits(batch, name, zeros, wanted)
            found = {
                "ce_loss": -clean.gather(-1, labels[:, None]).sum(),
                "ce_loss_with_sae": -with_sae.gather(-1, labels[:, None]).sum(),
                "ce_loss_with_ablation": -ablated.gather(-1, labels[:, None]).sum(),
                "kl_div_with_sae": (clean.exp() * (clean - with_sae)).sum(),
            }
            for key, value in found.items():
                sums[key] = sums.get(key, 0.0) + float(value)
            targets += int(wanted.sum())
        if targets == 0:
            raise HookError(
                f"No token of the evaluation has one of the roles {self.target_roles!r}. Encode with"
                " report='teacher', or ask for other target_roles."
            )
        result = {f"maira2/{key}": value / targets for key, value in sums.items()}
        score = loss_recovered(
            result["maira2/ce_loss"],
            result["maira2/ce_loss_with_ablation"],
            result["maira2/ce_loss_with_sae"],
        )
        return result | {"maira2/ce_loss_score": score, **moments.metrics()}

    def _logits(self, batch: Maira2Encoding, name: str, hook: Any, wanted: torch.Tensor) -> torch.Tensor:
        """(targets, d_vocab) log-probabilities; logits of positions that predict no target are not computed."""
        kept = wanted.any(0).nonzero()[:, 0]
        if not len(kept):
            kept = kept.new_zeros(1)
        hooks = [] if hook is None else [(name, hook)]
        logits = self.model.run_with_hooks(batch, fwd_hooks=hooks, logits_to_keep=kept)
        return logits[wanted[:, kept]].float().log_softmax(-1)

    def _replacement(
        self, sae: Any, scaler: Any, positions: torch.Tensor | None, moments: "_Moments"
    ) -> Callable[..., torch.Tensor]:
        scale: Any = (lambda x: x) if scaler is None else scaler.scale
        unscale: Any = (lambda x: x) if scaler is None else scaler.unscale

        head = sae.cfg.metadata.hook_head_index

        def replace(value: torch.Tensor, hook: Any) -> torch.Tensor:
            new = value.clone()
            part = _head_of(new, head)
            rows = part.reshape(-1, part.shape[-1]) if positions is None else part[positions]
            flat = rows.reshape(len(rows), -1).to(sae.W_dec)
            acts = sae.encode(scale(flat))
            acts = acts.to_dense() if acts.is_sparse else acts
            out = unscale(sae.decode(acts))
            moments.add(flat, out, acts)
            if positions is None:
                part.copy_(out.to(value).view(part.shape))
            else:
                part[positions] = out.to(value).view(rows.shape)
            return new

        return replace


def _zeros(positions: torch.Tensor | None, head: int | None) -> Callable[..., torch.Tensor]:
    def ablate(value: torch.Tensor, hook: Any) -> torch.Tensor:
        new = value.clone()
        _head_of(new, head)[... if positions is None else positions] = 0
        return new

    return ablate


def _head_of(value: torch.Tensor, head: int | None) -> torch.Tensor:
    """The values of one head of (B, L, heads, d_head), as a view; everything if no head is given."""
    return value if head is None else value[..., head, :]


class _Moments:
    """Explained variance and L0, streamed over rows."""

    def __init__(self) -> None:
        self.active = 0.0
        self.variance = ExplainedVariance()

    def add(self, x: torch.Tensor, out: torch.Tensor, acts: torch.Tensor) -> None:
        self.active += float((acts > 0).sum())
        self.variance.add(x, out)

    def metrics(self) -> dict[str, float]:
        if self.variance.rows == 0:
            raise HookError(
                "No position of the evaluation has a role that the SAE replaces. Ask for other roles, or use"
                " studies that have such positions."
            )
        return {
            "maira2/l0": self.active / self.variance.rows,
            "maira2/explained_variance": self.variance.value,
        }

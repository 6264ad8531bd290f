"""SAE classes that the fused step can train, and the reason why it cannot train others.

    SAELens batchtopk               one level
    SAELens matryoshka_batchtopk    levels, weights 1, SAELens' auxiliary losses
    our matryoshka                  levels, weights and auxiliary loss by convention; unit decoder rows

A `StepPlan` contains the settings (`StepSpec`) and what a class does before the step, to the gradient of W_dec, and
after the step. It reproduces the `training_forward_pass` of each class.
"""

import warnings
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, mse_loss

from sae_lens_maira.errors import SAEError
from sae_lens_maira.kernels import AuxSpec, StepResult, StepSpec, Weights
from sae_lens_maira.kernels.problem import Candidates, DeadMask
from sae_lens_maira.sae import MatryoshkaTrainingSAE

SUPPORTED = (BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE, MatryoshkaTrainingSAE)
PER_ROW_NORMALISATION = ("layer_norm", "constant_norm_rescale")


class StepPlan:
    """Plan of one step of an SAE object. It is made for every step, since users may change the SAE between steps."""

    def __init__(self, sae: TrainingSAE[Any], autocast: bool = False, candidates: Candidates = "off") -> None:
        cfg = sae.cfg
        # These classes have attributes that TrainingSAE does not declare.
        self.sae: Any = sae
        self.ours = isinstance(sae, MatryoshkaTrainingSAE)
        self.unit_decoder = isinstance(sae, MatryoshkaTrainingSAE) and sae.has_unit_decoder
        if isinstance(sae, MatryoshkaTrainingSAE):
            self.widths, weights = sae.cfg.level_widths(), sae.cfg.effective_level_weights()
        else:
            self.widths = tuple(getattr(cfg, "matryoshka_widths", None) or [cfg.d_sae])
            weights = None
        if self.unit_decoder:
            kind = "dictionary_learning"
        else:
            kind = "matryoshka" if getattr(cfg, "use_matryoshka_aux_loss", False) else "topk"
        self.spec = StepSpec(
            k=cfg.k,
            widths=self.widths,
            level_weights=weights,
            rescale=cfg.rescale_acts_by_decoder_norm,
            centre=bool(cfg.apply_b_dec_to_input),
            aux=AuxSpec(kind=kind, coefficient=cfg.aux_loss_coefficient),
            autocast=autocast,
            candidates=candidates,
            frozen=frozenset(name for name in ("W_enc", "W_dec") if not getattr(sae, name).requires_grad),
        )

    def before(self, x: torch.Tensor, step_input: TrainStepInput) -> None:
        """Change the weights as the class does before a step; x contains the rows of all ranks in the first step."""
        if isinstance(self.sae, MatryoshkaTrainingSAE):
            step_input.sae_in = x
            self.sae.prepare_step(step_input)

    def weights(self) -> Weights:
        """Detached parameters."""
        sae = self.sae
        return Weights(sae.W_enc.detach(), sae.b_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach())

    def dead(self, mask: torch.Tensor | None, tokens: int) -> DeadMask:
        """Dead latents by the class's rule: the trainer's mask, or tokens since a latent fired (with this batch)."""
        if not self.unit_decoder:
            return mask
        silent: torch.Tensor = self.sae.tokens_since_fired
        limit: int = self.sae.cfg.dead_after_tokens
        return lambda fired: torch.where(fired > 0, 0, silent + tokens) >= limit

    def adjust_(self, W_dec_gradient: torch.Tensor, latents: slice) -> None:
        """Remove the part of the gradient along each of these rows, if the class keeps rows at norm 1."""
        if self.unit_decoder and W_dec_gradient.numel():
            gradient, rows = W_dec_gradient[latents], self.sae.W_dec.detach()[latents]
            direction = rows / (rows.norm(dim=-1, keepdim=True) + 1e-6)
            gradient.sub_((gradient * direction).sum(dim=-1, keepdim=True) * direction)

    def constrain_(self) -> None:
        """Move a softly frozen decoder back towards its initial directions after an update."""
        if isinstance(self.sae, MatryoshkaTrainingSAE):
            self.sae.constrain_decoder_()

    def losses(self, result: StepResult) -> dict[str, torch.Tensor]:
        """Losses by their names in the class."""
        named = {"mse_loss": result.level_losses[-1], "auxiliary_reconstruction_loss": result.aux_loss}
        for width, loss in zip(self.widths[:-1], result.level_losses[:-1], strict=True):
            named[f"inner_mse_loss_{width}"] = loss
        return named

    @torch.no_grad()
    def after(self, result: StepResult, n_training_steps: int) -> None:
        """Update the threshold's moving average and, with unit decoder rows, the tokens since a latent fired."""
        sae, rate = self.sae, self.sae.cfg.topk_threshold_lr
        threshold = sae.topk_threshold
        lowest = result.min_positive.to(threshold.dtype)
        fired_at_all = lowest < torch.inf
        if self.unit_decoder:
            sae.tokens_since_fired += result.tokens
            sae.tokens_since_fired.masked_fill_(result.fired > 0, 0)
            if n_training_steps <= sae.cfg.threshold_start_step:
                return
            lowest = torch.where(fired_at_all, lowest, torch.zeros_like(lowest))
            rate = torch.where(threshold < 0, 1.0, rate)
            sae.topk_threshold = (1 - rate) * threshold + rate * lowest
        else:
            sae.topk_threshold = torch.where(fired_at_all, (1 - rate) * threshold + rate * lowest, threshold)


@torch.no_grad()
def set_missing_threshold(
    sae: TrainingSAE[Any], minima: list[float], scale: float | None, steps: int, warn: bool
) -> None:
    """Set a threshold that the run was too short to set, from its last batches.

    Args:
        sae: The SAE after its last step; changed if it is a `MatryoshkaTrainingSAE` without a threshold.
        minima: Smallest kept activations of the last batches.
        scale: Factor of the inputs of these batches; None means 1.
        steps: Steps of the run.
        warn: Whether to say so.
    """
    if not isinstance(sae, MatryoshkaTrainingSAE) or float(sae.topk_threshold) >= 0:
        return
    # stacklevel 5 is SAELens' `fit`: two frames between are wrappers of `no_grad`.
    if not minima:
        if warn:
            warnings.warn(
                f"The run ended after {steps} steps, and the threshold was never set: no smallest kept activation of "
                "its last batches is known. Every positive activation passes. Train longer, or lower "
                "threshold_start_step.",
                stacklevel=5,
            )
        return
    threshold = sum(minima) / len(minima) / (scale or 1.0)
    sae.topk_threshold.fill_(threshold)
    if warn:
        warnings.warn(
            f"The run ended after {steps} steps, before the threshold is first set (step "
            f"{sae.cfg.threshold_start_step + 1}). It is set to {threshold:.4g}, the mean of the smallest kept "
            f"activations of the last {len(minima)} batches. Train longer, or lower threshold_start_step.",
            stacklevel=5,
        )


def check_architecture(sae: TrainingSAE[Any]) -> None:
    """Refuse an SAE that neither the fused nor the dense step can train.

    Raises:
        SAEError: Nested levels with a normalisation per row, whose state SAELens loses after the first level.
    """
    kind = sae.cfg.normalize_activations
    if isinstance(sae, MatryoshkaBatchTopKTrainingSAE) and kind in PER_ROW_NORMALISATION:
        raise SAEError(
            f"normalize_activations={kind!r} does not work with nested reconstructions: SAELens drops its "
            "per-row state after the first of them and fails at the second. Use 'none', "
            "'expected_average_only_in' or 'covariance_whitening'."
        )


def reason_for_dense(sae: TrainingSAE[Any], x: torch.Tensor) -> str | None:
    """Reason why this step must run densely, as a message for the user; None if the fused step can run."""
    if type(sae) not in SUPPORTED:
        names = ", ".join(cls.__name__ for cls in SUPPORTED)
        return f"the SAE is a {type(sae).__name__}; the fused step supports {names}"
    if sae.cfg.normalize_activations in PER_ROW_NORMALISATION:
        return f"normalize_activations={sae.cfg.normalize_activations!r} rescales every row inside the SAE"
    hooked = [name for name, point in sae.hook_dict.items() if _has_hooks(point)]
    if hooked:
        return f"hooks are attached to {', '.join(hooked)}, and the fused step does not make those tensors"
    if sae.dtype not in (torch.float32, torch.float64):
        return f"the SAE's dtype is {sae.dtype}; the fused step supports float32 and float64"
    if x.ndim != 2:
        return f"the batch has {x.ndim} dimensions; the fused step takes (rows, d_in)"
    replaced = sae.__dict__.get("training_forward_pass")
    if replaced is not None and not hasattr(replaced, "_torchdynamo_orig_callable"):
        return "training_forward_pass was replaced on this object"
    if sae.mse_loss_fn is not mse_loss or type(sae.activation_fn) is not BatchTopK:
        return "the loss or the activation function was replaced on this object"
    return None


def _has_hooks(point: torch.nn.Module) -> bool:
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks)

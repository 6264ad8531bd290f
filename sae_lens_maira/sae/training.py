"""A Matryoshka BatchTopK SAE under training: trained by SAELens' trainer, with one of three loss conventions.

    f = BatchTopK(h n),  h = (x - b_dec) W_enc + b_enc,  n = |W_dec[j]| or 1
    L = sum_i weight_i L_i + aux

The losses are those of `losses.py`, weighed as `cfg.effective_level_weights()` says. What
dictionary_learning's trainer does around a step (first b_dec, unit decoder rows, tokens since a latent
fired) happens inside the step here, so that any trainer of SAELens' kind gives that library's result. It is
the dense reference for the fused kernels.
"""

from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_maira.checksums import files_with_sums
from sae_lens_maira.sae.config import MatryoshkaTrainingSAEConfig
from sae_lens_maira.sae.losses import (
    geometric_median,
    nested_reconstructions,
    per_level_aux_loss,
    squared_error,
    unit_rows,
    variance_normalised_aux_loss,
    with_tangent_gradient,
)

SOFT_COSINE = 0.8
"""Least cosine of a softly frozen decoder's rows with their first directions, as in arXiv 2602.14111."""


class MatryoshkaTrainingSAE(BatchTopKTrainingSAE):
    """BatchTopK SAE whose every level reconstructs on its own.

    With `loss_convention="saelens"` losses and gradients are those of SAELens' `matryoshka_batchtopk`, and
    so is the state dict. With "dictionary_learning" the state dict also holds `tokens_since_fired` (d_sae,)
    int64. In `TrainStepOutput.losses` every `mse_loss` and `inner_mse_loss_{width}` is unweighted,
    comparable between conventions; `loss` is their weighted sum plus the auxiliary term.
    """

    cfg: MatryoshkaTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride] - narrowed, as SAELens does
    tokens_since_fired: Tensor
    first_directions: Tensor
    """(d_sae, d_in) unit rows that a softly frozen decoder stays close to; only there with that control."""

    def __init__(self, cfg: MatryoshkaTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        if self.has_unit_decoder:
            # -1 marks "never set": the first minimum is then used unchanged, and a gate at -1 passes every
            # ReLU output.
            self.topk_threshold.fill_(-1.0)
            silent = torch.zeros(cfg.d_sae, dtype=torch.long, device=self.W_dec.device)
            self.register_buffer("tokens_since_fired", silent)
        if cfg.control == "soft_frozen_decoder":
            self.register_buffer("first_directions", unit_rows(self.W_dec.detach()).clone())
        elif cfg.control == "frozen_decoder":
            self.W_dec.requires_grad_(False)
        elif cfg.control == "frozen_encoder":
            self.W_enc.requires_grad_(False)
            self.b_enc.requires_grad_(False)

    @property
    def has_unit_decoder(self) -> bool:
        """Whether decoder rows are held at norm 1, as dictionary_learning does."""
        return self.cfg.loss_convention == "dictionary_learning"

    @override
    def initialize_weights(self) -> None:
        """Draw on the CPU, so that the weights of a seed are the same on every device."""
        device = self.device
        self.device = device if device.type == "meta" else torch.device("cpu")
        super().initialize_weights()
        self.device = device
        if self.has_unit_decoder:
            self.W_dec.data = unit_rows(self.W_dec.data)
            self.W_enc.data = self.W_dec.data.T.clone().contiguous()
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, torch.nn.Parameter(parameter.detach().to(device)))

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> "MatryoshkaTrainingSAE":
        # .to(dtype) would round the threshold, which is a float64 running mean: resuming would not be exact.
        threshold = self.topk_threshold
        super()._apply(fn, recurse)
        if not threshold.is_meta:
            self.topk_threshold = threshold.to(self.topk_threshold.device)
        return self

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One forward pass; sae_in is (batch, d_in)."""
        self.prepare_step(step_input)
        feature_acts, hidden_pre = self.encode_with_hidden_pre(step_input.sae_in)
        self.record_step(feature_acts, step_input.n_training_steps)
        reconstructions = self.level_reconstructions(feature_acts)
        aux_loss = self._aux_loss(step_input, hidden_pre, reconstructions)

        *inner, outer = (squared_error(level, step_input.sae_in) for level in reconstructions)
        *inner_weights, outer_weight = self.cfg.effective_level_weights()
        losses = {"mse_loss": outer, "auxiliary_reconstruction_loss": aux_loss}
        loss = outer_weight * outer + aux_loss
        for width, weight, inner_loss in zip(self.cfg.level_widths(), inner_weights, inner, strict=False):
            losses[f"inner_mse_loss_{width}"] = inner_loss
            loss = loss + weight * inner_loss
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=reconstructions[-1],
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=loss,
            losses=losses,
            metrics={"topk_threshold": self.topk_threshold},
        )

    @torch.no_grad()
    def prepare_step(self, step_input: TrainStepInput) -> None:
        """What dictionary_learning does between steps: b_dec before the first, unit rows after each."""
        self.constrain_decoder_()
        if not self.has_unit_decoder:
            return
        if step_input.n_training_steps == 0 and not bool(self.b_dec.any()):  # a loaded SAE keeps its own
            self.b_dec.data = geometric_median(step_input.sae_in.to(self.b_dec.dtype))
        else:
            self.W_dec.data = unit_rows(self.W_dec.data)

    @torch.no_grad()
    def constrain_decoder_(self) -> None:
        """Turn rows of a softly frozen decoder back to the nearest direction within the cosine allowed."""
        if self.cfg.control != "soft_frozen_decoder":
            return
        norms = self.W_dec.norm(dim=-1, keepdim=True)
        along = (self.W_dec * self.first_directions).sum(-1, keepdim=True)
        away = self.W_dec - along * self.first_directions
        turned = SOFT_COSINE * self.first_directions + (1 - SOFT_COSINE**2) ** 0.5 * unit_rows(away)
        self.W_dec.data = torch.where(along < SOFT_COSINE * norms, norms * turned, self.W_dec)

    @torch.no_grad()
    def record_step(self, feature_acts: Tensor, n_training_steps: int) -> None:
        """Update the threshold and, with dictionary_learning, the count of rows since each latent fired.

        Args:
            feature_acts: (batch, d_sae) selected activations.
            n_training_steps: Steps completed before this one.
        """
        if not self.has_unit_decoder:
            self.update_topk_threshold(feature_acts)
            return
        self.tokens_since_fired += feature_acts.shape[0]
        self.tokens_since_fired[feature_acts.sum(0) > 0] = 0
        if n_training_steps <= self.cfg.threshold_start_step:
            return
        active = feature_acts[feature_acts > 0]
        lowest = (
            active.min().to(self.topk_threshold.dtype)
            if active.numel()
            else torch.zeros_like(self.topk_threshold)
        )
        rate = 1.0 if self.topk_threshold < 0 else self.cfg.topk_threshold_lr
        self.topk_threshold = (1 - rate) * self.topk_threshold + rate * lowest

    def dead_latents(self, step_input: TrainStepInput) -> Tensor | None:
        """(d_sae,) bool mask of dead latents by the convention's own rule, None where they are not counted."""
        if self.has_unit_decoder:
            return self.tokens_since_fired >= self.cfg.dead_after_tokens
        return step_input.dead_neuron_mask

    def level_reconstructions(self, feature_acts: Tensor) -> list[Tensor]:
        """Nested reconstructions (batch, d_in), one per level; `hook_sae_recons` fires on the full one."""
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts * (1 / self.W_dec.norm(dim=-1))
        reconstructions = nested_reconstructions(
            feature_acts, self._decoder_in_graph(), self.b_dec, self.cfg.level_widths()
        )
        reconstructions[-1] = self.hook_sae_recons(reconstructions[-1])
        return reconstructions

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        reconstructions = [sae_out]
        if self.cfg.use_matryoshka_aux_loss:
            reconstructions = self.level_reconstructions(feature_acts)
        return {"auxiliary_reconstruction_loss": self._aux_loss(step_input, hidden_pre, reconstructions)}

    def _aux_loss(
        self, step_input: TrainStepInput, hidden_pre: Tensor, reconstructions: list[Tensor]
    ) -> Tensor:
        dead, sae_in, sae_out = self.dead_latents(step_input), step_input.sae_in, reconstructions[-1]
        if dead is None or not bool(dead.any()):
            return sae_out.new_tensor(0.0)
        coefficient = self.cfg.aux_loss_coefficient
        if self.has_unit_decoder:
            decoder = self._decoder_in_graph()
            return coefficient * variance_normalised_aux_loss(sae_in, sae_out, hidden_pre, dead, decoder)
        if self.cfg.use_matryoshka_aux_loss:
            decoder = self.W_dec
            if self.cfg.rescale_acts_by_decoder_norm:
                decoder = decoder / decoder.norm(dim=-1, keepdim=True)
            widths = self.cfg.level_widths()
            return coefficient * per_level_aux_loss(
                sae_in, reconstructions, hidden_pre, dead, decoder, widths
            )
        return self.calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead)

    def _decoder_in_graph(self) -> Tensor:
        return with_tangent_gradient(self.W_dec) if self.has_unit_decoder else self.W_dec

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Fold the factor that scaled the training activations, so that the SAE takes raw ones.

        With dictionary_learning the biases and the threshold take it, and the decoder rows keep norm 1 (that
        library's `scale_biases`); otherwise the weights do, as in SAELens.
        """
        if not self.has_unit_decoder:
            super().fold_activation_norm_scaling_factor(scaling_factor)
            return
        self.W_dec.data = unit_rows(self.W_dec.data)
        self.b_enc.data /= scaling_factor
        self.b_dec.data /= scaling_factor
        if self.topk_threshold >= 0:
            self.topk_threshold = self.topk_threshold / scaling_factor
        self.cfg.normalize_activations = "none"

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        # SAE.load_from_disk has cast every tensor to the SAE's dtype by now; resume with
        # load_weights_from_checkpoint, which casts nothing, where the running mean and the counts must be
        # exact.
        super().process_state_dict_for_loading(state_dict)
        state_dict["topk_threshold"] = state_dict["topk_threshold"].to(torch.float64)
        if "tokens_since_fired" in state_dict:
            state_dict["tokens_since_fired"] = state_dict["tokens_since_fired"].to(torch.long)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save the SAE for inference as SAELens does, with checksums.

        Returns:
            Paths of the weights and of the configuration.
        """
        with files_with_sums(path) as draft:
            weights, config = super().save_inference_model(draft)
        return Path(path) / weights.name, Path(path) / config.name

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict.pop("first_directions", None)
        if self.has_unit_decoder:
            state_dict.pop("tokens_since_fired")
            state_dict["W_dec"] = unit_rows(state_dict["W_dec"])

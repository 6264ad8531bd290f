"""Start a training from the weights of an existing SAE instead of random ones.

    saved form      f = JumpReLU((x - b_dec) W_enc + b_enc, threshold),  x^ = f W_dec + b_dec,  |W_dec[j]| = 1
    training form   the same weights; inputs are s x where activations are normalised, so biases and threshold take s

At the first step the decoder and encoder are those of the given SAE, but the selection differs: BatchTopK selects k
entries per row over a whole batch, where the given SAE compares with its threshold.
"""

from typing import TYPE_CHECKING, Any

import torch

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import MatryoshkaSAE, load_matryoshka
from sae_lens_maira.sae.config import MatryoshkaTrainingSAEConfig
from sae_lens_maira.sae.release import resolve_sae
from sae_lens_maira.training.inputs import agree_on_scaling

if TYPE_CHECKING:
    from sae_lens_maira.training.trainer import FusedSAETrainer

SCALED = ("none", "expected_average_only_in")
"""Values of `normalize_activations` for which weights of another SAE can be converted."""


@torch.no_grad()
def start_from(trainer: "FusedSAETrainer[Any, Any]", source: str | MatryoshkaSAE) -> None:
    """Replace the weights of a trainer's SAE by those of another SAE; call this before the first step.

    With `normalize_activations="expected_average_only_in"` the scale is estimated here, from the first batches.

    Args:
        trainer: Trainer that has not made a step yet.
        source: A folder, what `load_release` takes, or an SAE in memory.

    Raises:
        SAEError: As `initial_sae`.
    """
    sae = trainer.sae
    given = initial_sae(source, sae.cfg)
    weights = {name: value.detach().to("cpu", sae.dtype) for name, value in given.state_dict().items()}
    norms = weights["W_dec"].norm(dim=1)
    threshold = weights["threshold"] * norms
    if trainer.shares is not None:
        weights = {name: trainer.shares.own(name, value) for name, value in weights.items()}
        norms = trainer.shares.own("b_enc", norms)
    # With decoder rows of norm 1, activations are comparable in both conventions.
    weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norms, weights["b_enc"] * norms
    weights["W_dec"] = weights["W_dec"] / norms[:, None]
    if given.cfg.apply_b_dec_to_input != sae.cfg.apply_b_dec_to_input:
        sign = 1 if sae.cfg.apply_b_dec_to_input else -1
        weights["b_enc"] = weights["b_enc"] + sign * weights["b_dec"] @ weights["W_enc"]
    scale = _scale(trainer)
    for name in ("W_enc", "W_dec"):
        getattr(sae, name).copy_(weights[name])
    for name in ("b_enc", "b_dec"):
        getattr(sae, name).copy_(weights[name] * scale)
    known = threshold[threshold > 0]
    if len(known):
        sae.topk_threshold.fill_(float(known.mean()) * scale)


def initial_sae(source: str | MatryoshkaSAE, cfg: MatryoshkaTrainingSAEConfig) -> MatryoshkaSAE:
    """Read an SAE to start from, and check that its weights fit a training SAE of this configuration.

    Args:
        source: A folder, what `load_release` takes, or an SAE in memory.
        cfg: Configuration of the SAE to train.

    Raises:
        SAEError: The SAE cannot be read, its width, number of latents, levels or k differ, or a decoder row is 0.
    """
    given = source if isinstance(source, MatryoshkaSAE) else load_matryoshka(resolve_sae(source))
    _check(given, cfg)
    if cfg.normalize_activations not in SCALED:
        raise SAEError(
            f"A training with normalize_activations={cfg.normalize_activations!r} cannot start from another SAE's "
            f"weights. Use {' or '.join(map(repr, SCALED))}."
        )
    zeros = int((given.W_dec.detach().norm(dim=1) == 0).sum())
    if zeros:
        raise SAEError(
            f"{zeros} decoder rows of the SAE to start from are zero, so their directions are unknown. Start from "
            "another SAE, or from random weights."
        )
    return given


def _scale(trainer: "FusedSAETrainer[Any, Any]") -> float:
    """Factor by which the trainer multiplies its inputs."""
    if trainer.sae.cfg.normalize_activations == "none":
        return 1.0
    agree_on_scaling(trainer, trainer.comm)
    factor = trainer.activation_scaler.scaling_factor
    assert factor is not None
    return factor


def _check(given: MatryoshkaSAE, cfg: MatryoshkaTrainingSAEConfig) -> None:
    wanted = {
        "d_in": (given.cfg.d_in, cfg.d_in),
        "d_sae": (given.cfg.d_sae, cfg.d_sae),
        "levels": (list(given.cfg.level_widths()), list(cfg.level_widths())),
        "k": (given.cfg.k, cfg.k),
    }
    differ = [
        f"{name} is {has!r} there and {asked!r} here"
        for name, (has, asked) in wanted.items()
        if has != asked and has is not None
    ]
    if differ:
        raise SAEError(
            f"The SAE to start from does not fit the SAE to train: {'; '.join(differ)}. Use its values in the part "
            "sae, or start from another SAE."
        )
    if cfg.control is not None:
        raise SAEError(
            f"control={cfg.control!r} keeps random weights, and a start from another SAE would replace them. Leave "
            "one of the two out."
        )

"""Export an SAE as a dictionary_learning folder (ae.pt and config.json).

That library has one threshold for all latents and always subtracts b_dec before encoding. An SAE that
differs there is rewritten into an equal one where that is possible, and refused where it is not.
"""

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_maira.errors import SAEError
from sae_lens_maira.io import atomic_file, atomic_write
from sae_lens_maira.sae.inference import load_matryoshka
from sae_lens_maira.sae.levels import sizes_from_widths


@torch.no_grad()
def export_dictionary_learning(
    sae: str | Path | SAE[Any],
    folder: str | Path,
    *,
    k: int | None = None,
    layer: int | None = None,
    lm_name: str | None = None,
    rescale_latents: bool = False,
) -> Path:
    """Write an SAE so that dictionary_learning's `load_dictionary` opens it as `MatryoshkaBatchTopKSAE`.

    Args:
        sae: What `load_matryoshka` takes: a folder, a JumpReLU SAE with levels, or a training SAE.
        folder: Output folder of ae.pt and config.json.
        k: Mean number of active latents; None for the SAE's. That library needs a whole number there,
            and uses it in training only.
        layer: Layer number for the configuration; None for the one in the hook's name.
        lm_name: Model name for the configuration; None for the one in the metadata.
        rescale_latents: Allow latents with different thresholds to be scaled to a common one. Reconstructions
            stay the same, activations change by a factor per latent.

    Returns:
        The folder.

    Raises:
        SAEError: The SAE cannot be expressed in that library.
    """
    source = load_matryoshka(sae)
    if source.cfg.normalize_activations != "none" or source.cfg.reshape_activations != "none":
        raise SAEError(
            f"normalize_activations={source.cfg.normalize_activations!r} and reshape_activations="
            f"{source.cfg.reshape_activations!r}: dictionary_learning has neither. Fold the normalisation "
            "first."
        )
    if k is None and source.cfg.k is not None:
        k = round(source.cfg.k)
    if not k or k < 1:
        raise SAEError(f"k={source.cfg.k}: dictionary_learning needs a whole number of at least 1. Pass k=.")
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    weights = {name: getattr(source, name).detach().float().cpu() for name in names}
    threshold = source.threshold.detach().float().cpu()
    if not bool((threshold == threshold[0]).all()):
        if not rescale_latents or not bool((threshold > 0).all()):
            raise SAEError(
                f"The thresholds of this SAE run from {threshold.min():.4g} to {threshold.max():.4g}, and "
                "dictionary_learning has one for all latents. Positive thresholds can be made equal with "
                "rescale_latents=True, which changes activations but not reconstructions."
            )
        factor = threshold.mean() / threshold
        weights["W_enc"] = weights["W_enc"] * factor
        weights["b_enc"] = weights["b_enc"] * factor
        weights["W_dec"] = weights["W_dec"] / factor[:, None]
        threshold = threshold.mean().expand_as(threshold)
    if not source.cfg.apply_b_dec_to_input:
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
    metadata = source.cfg.metadata
    sizes = list(sizes_from_widths(source.level_widths))
    state = {name: value.contiguous() for name, value in weights.items()} | {
        "k": torch.tensor(k, dtype=torch.int),
        "threshold": threshold[0].clone(),
        "group_sizes": torch.tensor(sizes),
    }
    trainer = {
        "trainer_class": "MatryoshkaBatchTopKTrainer",
        "dict_class": "MatryoshkaBatchTopKSAE",
        "activation_dim": source.cfg.d_in,
        "dict_size": source.cfg.d_sae,
        "k": k,
        "group_sizes": sizes,
        "group_fractions": [size / source.cfg.d_sae for size in sizes],
        "layer": layer if layer is not None else _layer_of(metadata.hook_name),
        "lm_name": lm_name or metadata.model_name,
        "submodule_name": metadata.hook_name,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # An open file, since torch writes the name of a path into the archive.
    with atomic_file(folder / "ae.pt") as draft, draft.open("wb") as file:
        torch.save(state, file)
    # SAELens' own reader of such folders wants a buffer with a context length.
    buffer = {"d_submodule": source.cfg.d_in, "ctx_len": metadata.context_size}
    config = {"trainer": trainer, "buffer": buffer}
    atomic_write(folder / "config.json", json.dumps(config, indent=2))
    return folder


def _layer_of(hook_name: str | None) -> int | None:
    return next((int(part) for part in (hook_name or "").split(".") if part.isdigit()), None)

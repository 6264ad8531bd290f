"""Activations of a few latents without those of all the others.

    a[:, c] = relu(z) [z > threshold_c],   z = (x - b_dec) W_enc[:, c] + b_enc[c]         JumpReLU
    a[:, c] = encode(x)[:, c]                                                             any other SAE

A JumpReLU latent asks nothing of its neighbours, so an intervention on 8 of 16,384 reads 8 columns; in a TopK SAE
latents compete, and all must be formed. It knows nothing about interventions or positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

LARGEST_SHARE = 4
"""Columns are copied out of the encoder if they are at most one in so many."""


class Columns:
    """Some latents of an SAE, ready to be read from the stream and written back.

    Args:
        sae: the SAE.
        latents: their numbers, each once.
    """

    def __init__(self, sae: SAE[Any], latents: Sequence[int]) -> None:
        self._sae = sae
        self._chosen = torch.tensor(latents, device=sae.W_dec.device)
        self._slot = {j: i for i, j in enumerate(latents)}
        # Only where `encode` is JumpReLU's own: a subclass may couple its latents.
        self._apart = (
            isinstance(sae, JumpReLUSAE)
            and type(sae).encode is JumpReLUSAE.encode
            and LARGEST_SHARE * len(latents) <= sae.cfg.d_sae
        )
        self._encoder = sae.W_enc.detach()[:, self._chosen] if self._apart else None
        self._decoder: torch.Tensor | None = None

    def slots(self, latents: torch.Tensor) -> torch.Tensor:
        """Columns of these latents, in their order."""
        return torch.tensor([self._slot[int(j)] for j in latents])

    @torch.no_grad()
    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, c) float32 activations of the stream (n, d_model)."""
        sae: Any = self._sae
        hidden = hidden.to(sae.W_dec)
        if self._encoder is None:
            return sae.encode(hidden)[:, self._chosen].float()
        before = sae.process_sae_in(hidden) @ self._encoder + sae.b_enc[self._chosen]
        return (sae.activation_fn(before) * (before > sae.threshold[self._chosen])).float()

    @torch.no_grad()
    def decode(self, change: torch.Tensor) -> torch.Tensor:
        """(n, d_model) float32 step of the stream for changes (n, c) of the activations."""
        if self._decoder is None:
            self._decoder = self._sae.W_dec.detach()[self._chosen].float()
        return change @ self._decoder.to(change.device)

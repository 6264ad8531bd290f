"""Write a report again with some latents removed from the prompt.

    h'(p) = h(p) - sum of the chosen entries' a W_dec at p,       p in the prompt

The entries are those of the unedited prompt, so what is removed is what the attribution named and nothing else.
"""

from typing import Any

import torch
from sae_lens import SAE

from sae_lens_maira.attribution.attribute import Attribution
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding, ParsedReport


def prompt_delta(sae: SAE[Any], found: Attribution, n: int, prompt_length: int) -> torch.Tensor:
    """What removing the strongest entries of an attribution adds to the prompt's stream.

    Args:
        sae: The SAE of the attribution.
        found: The attribution of one sentence.
        n: Entries to remove, strongest first; those behind the prompt are skipped and do not count.
        prompt_length: Positions of the prompt.

    Returns:
        (prompt_length, d_model) float32, to be added.

    Raises:
        InterventionError: No entry lies in the prompt.
    """
    inside = [
        i for i in range(len(found.position)) if found.position[i] < prompt_length and found.value[i] > 0
    ][:n]
    if not inside:
        raise InterventionError(
            f"No entry of the attribution of {found.sentence.text!r} lies in the prompt, so nothing can be removed "
            "there. Attribute with roles of the prompt, such as image_only."
        )
    decoder = sae.W_dec.detach()
    latents = torch.as_tensor(found.latent[inside], device=decoder.device)
    rows = (
        decoder[latents].float() * torch.as_tensor(found.activation[inside], device=decoder.device)[:, None]
    )
    delta = torch.zeros(prompt_length, decoder.shape[1], device=decoder.device)
    place = torch.as_tensor(found.position[inside], device=decoder.device)
    return delta.index_add_(0, place, -rows)


@torch.no_grad()
def generate_with_delta(
    hooked: HookedMaira2,
    prompt: Maira2Encoding,
    hook_name: str,
    delta: torch.Tensor,
    max_new_tokens: int | None = None,
) -> ParsedReport:
    """Generate greedily with a fixed edit of the prompt's stream.

    Args:
        hooked: The model.
        prompt: One encoded study without a report.
        hook_name: Where the edit acts.
        delta: (L, d_model), added at the prompt's L positions.
        max_new_tokens: Budget of the report.
    """
    length = prompt.input_ids.shape[1]

    def edit(value: torch.Tensor, hook: Any) -> torch.Tensor | None:
        if value.shape[1] < length:
            return None  # a decoding step with a cache
        edited = value.clone()
        edited[:, :length] = (value[:, :length].float() + delta).to(value.dtype)
        return edited

    with hooked.hooks(fwd_hooks=[(hook_name, edit)]):
        (report,) = hooked.generate(prompt, return_type="reports", max_new_tokens=max_new_tokens)
    return report


__all__ = ["generate_with_delta", "prompt_delta"]

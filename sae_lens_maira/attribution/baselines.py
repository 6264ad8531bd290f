"""Maps over positions that need no SAE: what an attribution's map is compared with.

gradient norm      |g(p)|
gradient x input   g(p) . h(p)
attention rollout  mean over the span of row t-1 of the product over blocks of (A + I) / 2,   A averaged over heads
"""

from collections.abc import Sequence
from typing import Any

import torch

from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding


def gradient_maps(run: ResidualRun, positions: Sequence[int]) -> dict[str, torch.Tensor]:
    """Gradient norm and gradient times input of a span's score.

    Args:
        run: The study at the hook point.
        positions: Positions of the span's tokens.

    Returns:
        Two tensors (L,) float32, by name.
    """
    gradient = run.gradients(run.hidden, [positions])[1][0]
    return {
        "gradient norm": gradient.norm(dim=1).cpu(),
        "gradient x input": (gradient * run.hidden.float()).sum(1).cpu(),
    }


@torch.no_grad()
def attention_rollout(
    hooked: HookedMaira2, encoding: Maira2Encoding, positions: Sequence[int]
) -> torch.Tensor:
    """Attention rollout (Abnar and Zuidema, 2020) from a span's predictions to all positions.

    Args:
        hooked: The model, with eager attention.
        encoding: One study with its report.
        positions: Positions of the span's tokens, each at least 1.

    Returns:
        (L,) float32, sums to 1.

    Raises:
        HookError: The model's attention is fused, so the patterns do not exist.
    """
    if not hooked.forms_pattern:
        raise HookError(
            "Attention rollout needs attention patterns, which fused attention does not form. Call "
            "model.set_attn_implementation('eager') first."
        )
    rows = torch.zeros(len(positions), encoding.input_ids.shape[1], device=hooked.W_E.device)
    rows[torch.arange(len(positions)), torch.as_tensor(positions) - 1] = 1
    _, cache = hooked.run_with_cache(encoding, names_filter=lambda name: name.endswith("attn.hook_pattern"))
    model: Any = hooked.model
    blocks = model.config.get_text_config().num_hidden_layers
    for block in reversed(range(blocks)):
        pattern = cache[f"blocks.{block}.attn.hook_pattern"][0].float().mean(0)
        rows = (rows + rows @ pattern) / 2
    return rows.mean(0).cpu()


__all__ = ["attention_rollout", "gradient_maps"]

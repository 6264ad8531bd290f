"""Levels of a Matryoshka SAE, and the metadata of an SAE that store them.

Level i is the prefix of the first w_i latents, 0 < w_0 < w_1 < ... < w_{L-1} = d_sae. SAELens writes cumulative widths,
dictionary_learning increments as fractions of d_sae; both are accepted.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

from sae_lens_maira.errors import SAEError

METADATA_KEY = "matryoshka"
"""Key of an SAE's metadata under which `level_widths`, `k` and the training facts are stored."""
CONTROL_KEY = "control"
"""Key of an SAE's metadata that names the kind of control it is."""
TEXT_CONTEXT = {"prepend_bos": True, "context_size": 128}
"""Metadata that SAELens' `ActivationsStore.from_sae` requires: text contexts of this many tokens with BOS in front, as
SAELens' own evaluations and SAEBench read text. Studies have lengths of their own and do not use these values."""


def remember_text_context(metadata: SAEMetadata) -> None:
    """Fill in what SAELens' evaluations on text require, where an SAE's metadata do not name it."""
    for key, value in TEXT_CONTEXT.items():
        if metadata.get(key) is None:
            metadata[key] = value


def check_widths(widths: Sequence[int], d_sae: int, where: str = "matryoshka_widths") -> tuple[int, ...]:
    """Cumulative widths as a tuple, with d_sae appended where the last level is missing.

    Args:
        widths: Increasing positive whole numbers, none above d_sae.
        d_sae: Number of latents.
        where: What to call the widths in an error.

    Raises:
        SAEError: The widths are empty, not increasing, not positive or above d_sae.
    """
    result = [int(width) for width in widths]
    if any(width != original for width, original in zip(result, widths, strict=True)):
        raise SAEError(
            f"{where}={list(widths)} holds numbers that are not whole. Give widths as whole numbers."
        )
    if not result:
        raise SAEError(f"{where} is empty. Name at least one level, for example [{d_sae}].")
    if result[-1] < d_sae:
        result.append(d_sae)
    if result[0] <= 0 or sorted(set(result)) != result or result[-1] != d_sae:
        raise SAEError(
            f"{where}={list(widths)} with d_sae={d_sae}: cumulative widths must be positive, strictly "
            "increasing and at most d_sae. Increments (group sizes) have to be summed up first."
        )
    return tuple(result)


def widths_from_fractions(fractions: Sequence[float], d_sae: int) -> tuple[int, ...]:
    """Cumulative widths of groups whose sizes are fractions of d_sae; the last group takes the remainder.

    The rounding is dictionary_learning's: each size but the last is int(fraction * d_sae).

    Raises:
        SAEError: The fractions do not sum to 1, or one of them is too small for a single latent.
    """
    if not fractions or not math.isclose(sum(fractions), 1.0, rel_tol=1e-6):
        raise SAEError(
            f"group_fractions={list(fractions)} sum to {sum(fractions)}. They are the sizes of the "
            "groups as shares of d_sae and must sum to 1, for example [0.0625, 0.0625, 0.125, 0.25, 0.5]."
        )
    sizes = [int(fraction * d_sae) for fraction in fractions[:-1]]
    sizes.append(d_sae - sum(sizes))
    if min(sizes) <= 0:
        raise SAEError(
            f"group_fractions={list(fractions)} with d_sae={d_sae} give the group sizes {sizes}: every "
            "group needs at least one latent. Use a larger d_sae or fewer groups."
        )
    return widths_from_sizes(sizes)


def widths_from_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Running sum of group sizes: (4, 4, 8) becomes (4, 8, 16)."""
    widths, total = [], 0
    for size in sizes:
        total += int(size)
        widths.append(total)
    return tuple(widths)


def sizes_from_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Latents that each level adds: (4, 8, 16) becomes (4, 4, 8)."""
    return tuple(b - a for a, b in zip((0, *widths), widths, strict=False))


def widths_from_metadata(metadata: SAEMetadata | Mapping[str, Any], d_sae: int) -> tuple[int, ...] | None:
    """Cumulative widths that an SAE's metadata remembers, None where it remembers none.

    Reads this package's own entry, and the training details that SAELens' `matryoshka_batchtopk` leaves
    behind.
    """
    own = metadata.get(METADATA_KEY) or {}
    if own.get("level_widths"):
        return check_widths(own["level_widths"], d_sae, f"metadata.{METADATA_KEY}.level_widths")
    details = metadata.get("training_architecture_details") or {}
    if details.get("matryoshka_widths"):
        return check_widths(
            details["matryoshka_widths"], d_sae, "training_architecture_details.matryoshka_widths"
        )
    return None


def level_widths_of(sae: SAE[Any]) -> tuple[int, ...]:
    """Cumulative level widths of any SAELens SAE; one level of full width where it has no levels."""
    cfg = sae.cfg
    if hasattr(cfg, "level_widths"):
        return cfg.level_widths()
    widths = getattr(cfg, "matryoshka_widths", None)
    if widths:
        return check_widths(widths, cfg.d_sae)
    return widths_from_metadata(cfg.metadata, cfg.d_sae) or (cfg.d_sae,)

"""Make SAELens know this package's classes and releases; calling it again changes nothing.

Classes go through SAELens' public registry. Releases have no public one: they are entries of two
dictionaries and of a cached directory, all of which SAELens' own lookups read. A test guards that these
three still exist. This module knows nothing about what the classes do.
"""

from typing import Any

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.config import ARCHITECTURE, MatryoshkaSAEConfig, MatryoshkaTrainingSAEConfig
from sae_lens_maira.sae.inference import MatryoshkaSAE
from sae_lens_maira.sae.training import MatryoshkaTrainingSAE


def register() -> None:
    """Register the architecture "matryoshka" for training and for inference.

    Raises:
        SAEError: another package holds the name.
    """
    _claim(SAE_CLASS_REGISTRY, (MatryoshkaSAE, MatryoshkaSAEConfig), register_sae_class)
    _claim(
        SAE_TRAINING_CLASS_REGISTRY,
        (MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig),
        register_sae_training_class,
    )


def _claim(registry: Any, ours: tuple[type, type], add: Any) -> None:
    held = registry.get(ARCHITECTURE)
    if held is None:
        add(ARCHITECTURE, *ours)
    elif held != ours:
        raise SAEError(
            f"SAELens' registry holds {held[0].__module__}.{held[0].__qualname__} under {ARCHITECTURE!r}, "
            f"where {ours[0].__module__}.{ours[0].__qualname__} belongs. Two packages claim the name; load "
            "only one."
        )

"""Fingerprints that tell one model and processor from another, without reading every weight.

A model's covers its configuration and every parameter's name, shape, dtype and first 64 numbers; a processor's
covers its vocabulary and image recipe. It knows nothing about stores.
"""

import hashlib
from importlib.metadata import version
from typing import Any

from sae_lens_maira.maira2 import Maira2

LIBRARIES = ("sae-lens-maira", "torch", "transformers", "transformer-lens", "sae-lens", "safetensors")


def model_fingerprint(model: Any) -> str:
    """16 hex digits."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def processor_fingerprint(maira: Maira2) -> str:
    """16 hex digits."""
    processor: Any = maira.processor
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(repr((vocabulary, processor.recipe)).encode()).hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape activations."""
    return {name: version(name) for name in LIBRARIES}

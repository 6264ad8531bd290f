"""Fingerprint of an SAE: a hash of its weights, independent of file format and device.

Interventions and latent records carry it, so that they are never applied to another SAE.
"""

import hashlib
from typing import Any

import torch
from sae_lens import SAE


def fingerprint(sae: SAE[Any]) -> str:
    """SHA-256 (hex) over the names, shapes and float32 values of an SAE's parameters and buffers, in order of name."""
    digest = hashlib.sha256()
    for name, value in sorted(sae.state_dict().items()):
        tensor = value.detach().cpu().to(torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.numpy()).cast("B") if tensor.numel() else b"")
    return digest.hexdigest()


__all__ = ["fingerprint"]

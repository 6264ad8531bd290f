"""The fingerprint of an SAE: the same after saving and loading, another one for another weight."""

import torch

from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig, fingerprint, load_matryoshka


def test_the_fingerprint_follows_the_weights(tmp_path):
    """Saved and loaded it stays; changing one weight by the smallest step changes it."""
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=16, d_sae=8, matryoshka_widths=[2, 8], device="cpu"))
    first = fingerprint(sae)
    sae.save_model(tmp_path)
    assert fingerprint(load_matryoshka(tmp_path)) == first
    with torch.no_grad():
        weight = sae.W_dec[3, 5]
        sae.W_dec[3, 5] = torch.nextafter(weight, weight + 1)
    assert fingerprint(sae) != first

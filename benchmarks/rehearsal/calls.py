"""Steps of the rehearsal that are calls of the library rather than commands."""

import multiprocessing
from pathlib import Path

import torch

import sae_lens_maira as sm
from sae_lens_maira.maira2 import load_maira2
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig


def load(model: str) -> None:
    """Load a checkpoint onto the CPU."""
    load_maira2(model, device="cpu")


def read(model: str, table: str, root: str, hook: str, stop: str) -> None:
    """`run_with_cache` of the study with most images, up to a layer, as in the README."""
    loaded = sm.load(model, device="cpu")
    studies = list(sm.read_studies(Path(table), Path(root)))
    study = max(studies, key=lambda s: sum(x is not None for x in (s.frontal, s.lateral, s.prior_frontal)))
    loaded.run_with_cache(study, names_filter=hook, report="teacher", stop_at_layer=int(stop))


def steer(model: str, table: str, root: str, hook: str, tokens: str) -> None:
    """One report of a study with one image, with and without a latent of an untrained SAE at its patches."""
    loaded = sm.load(model, device="cpu")
    study = next(iter(sm.read_studies(Path(table), Path(root))))
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=loaded.cfg.d_model, d_sae=16_384))
    sae.cfg.metadata.hook_name = hook
    units = torch.full((16_384,), 10.0)
    loaded.steer(study, sae, {7: 1.0}, where=sm.patches("frontal"), p99=units, max_new_tokens=int(tokens))


def ranks(model: str) -> None:
    """Two processes load to a device that is not the CPU at the same time: the meta device, which takes no memory."""
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        grown = pool.map(_rank, [model, model])
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    if max(grown) > 0.25 * weights:
        raise SystemExit(
            f"Ranks grew by {grown} bytes in main memory; {weights} bytes of weights go to the device."
        )


def _rank(model: str) -> int:
    from benchmarks.rehearsal.measured import Resident

    resident = Resident()
    found = load_maira2(model, device_map={"": "meta"})
    assert all(value.device.type == "meta" for value in found.model.parameters())
    resident.stop()
    return resident.above

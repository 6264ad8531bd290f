"""Shared by all tests: a fixed seed before each, two threads, no network."""

import os

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for every test, whichever others ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def phantom():
    """The shipped phantom, in float32 on the CPU."""
    from sae_lens_maira.phantom import load_phantom

    return load_phantom()

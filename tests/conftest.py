"""Shared by all tests: a fixed seed before each, two threads, no network."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for every test, whichever others ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """Handlers are as before after each test: SAELens' runners leave theirs, which raises in forked children."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def phantom():
    """The shipped phantom, in float32 on the CPU."""
    from sae_lens_maira.phantom import load_phantom

    return load_phantom()


@pytest.fixture(scope="session")
def rehearsal() -> Iterator[Callable[[str], Any]]:
    """Modules of `benchmarks.rehearsal` by name; the folder is not installed."""
    root = str(Path(__file__).parents[1])
    sys.path.insert(0, root)
    yield lambda name: importlib.import_module(f"benchmarks.rehearsal.{name}")
    sys.path.remove(root)

"""Shared by all tests: a fixed seed before each, no network, the phantom, a tiny MAIRA-2 and its studies."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

SIDE = 56  # of a tiny MAIRA-2's image in pixels: 4 x 4 patches of 14


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


@pytest.fixture
def no_weights(monkeypatch):
    """Every model and every SAE that is made is an error: what is refused is refused before that."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model or an SAE was made")

    monkeypatch.setattr("torch.nn.Module.__init__", refuse)


@pytest.fixture(scope="session")
def phantom():
    """The shipped phantom, in float32 on the CPU."""
    from sae_lens_maira.phantom import load_phantom

    return load_phantom()


@dataclass(frozen=True, kw_only=True)
class PlainStudy:
    """A study of the attributes that the processor reads, without the checks of `Study`."""

    frontal: Any = None
    lateral: Any = None
    prior_frontal: Any = None
    indication: str | None = None
    technique: str | None = None
    comparison: str | None = None
    prior_report: str | None = None
    report: str | None = None
    grounded_report: Any = None


@pytest.fixture(scope="session")
def make_study() -> type[PlainStudy]:
    return PlainStudy


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., np.ndarray]:
    """Pixels of random grey by seed, height and width."""

    def picture(seed: int = 0, height: int = 70, width: int = 90) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)

    return picture


@pytest.fixture(scope="session")
def make_processor() -> Callable[..., Any]:
    """MAIRA-2's processor around a tokenizer, for images of 56 pixels unless `side` is given."""
    from transformers import BitImageProcessor

    from sae_lens_maira.maira2 import Maira2Processor

    def processor(tokenizer: Any, side: int = SIDE) -> Maira2Processor:
        images = BitImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=[0.5307] * 3,
            image_std=[0.2583] * 3,
            resample=3,
        )
        return Maira2Processor(image_processor=images, tokenizer=tokenizer)

    return processor


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Any]:
    """MAIRA-2 of the real classes: decoder of width 64, vision tower of width 32, weights that tell inputs apart."""
    from sae_lens_maira.maira2 import Maira2, Maira2ForConditionalGeneration, make_config, register

    def tiny(processor: Any, blocks: int, vision_blocks: int, std: float, attention: str = "sdpa") -> Maira2:
        config = make_config(
            text_config={
                "vocab_size": len(processor.tokenizer),
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": blocks,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
            vision_config={
                "hidden_size": 32,
                "num_hidden_layers": vision_blocks,
                "num_attention_heads": 4,
                "mlp_ratio": 2,
                "image_size": SIDE,
                "out_features": [f"stage{vision_blocks}"],
            },
            image_token_index=processor.image_token_id,
            image_seq_length=16,
        )
        register()
        torch.manual_seed(0)
        model = Maira2ForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("lambda1"):
                torch.nn.init.normal_(parameter, std=std)
        # A random model may write any token; a placeholder without an image would stop a run without a cache.
        model.lm_head.weight.data[processor.image_token_id] = 0
        model.set_attn_implementation(attention)
        return Maira2(model, processor)

    return tiny


@pytest.fixture(scope="session")
def rehearsal() -> Iterator[Callable[[str], Any]]:
    """Modules of `benchmarks.rehearsal` by name; the folder is not installed."""
    root = str(Path(__file__).parents[1])
    sys.path.insert(0, root)
    yield lambda name: importlib.import_module(f"benchmarks.rehearsal.{name}")
    sys.path.remove(root)

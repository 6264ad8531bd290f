"""A small MAIRA-2 of the real classes with random weights, its processor, studies of one to three images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BitImageProcessor

from sae_lens_maira.hooks import HookedMaira2, PointTable
from sae_lens_maira.maira2 import (
    Maira2,
    Maira2Encoding,
    Maira2ForConditionalGeneration,
    Maira2Processor,
    make_config,
    register,
)
from sae_lens_maira.maira2.versions import has_transformer_bridge
from sae_lens_maira.phantom.tokenizer import build_tokenizer

SIDE = 56  # 4 x 4 patches of 14
CORPUS = [
    "You are an expert radiology assistant tasked with interpreting a chest X-ray study. USER: ASSISTANT:",
    "Given the current frontal image and the current lateral image and the prior frontal image"
    " PRIOR_REPORT: N/A",
    "Provide a structured description of the findings in the radiology study in comparison to the prior"
    " frontal image. INDICATION: TECHNIQUE: COMPARISON:",
    "The heart size is normal. There is a small left pleural effusion. No pneumothorax is seen.",
]


@dataclass(frozen=True, kw_only=True)
class PlainStudy:
    """A study as the processor sees it."""

    frontal: Any = None
    lateral: Any = None
    prior_frontal: Any = None
    indication: str | None = None
    technique: str | None = None
    comparison: str | None = None
    prior_report: str | None = None
    report: str | None = None
    grounded_report: Any = None


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (70, 60), dtype=np.uint8)


def make_processor() -> Maira2Processor:
    images = BitImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5307] * 3,
        image_std=[0.2583] * 3,
        resample=3,
    )
    return Maira2Processor(image_processor=images, tokenizer=build_tokenizer(CORPUS, vocab_size=400))


def make_model(processor: Maira2Processor, attention: str = "sdpa") -> Maira2ForConditionalGeneration:
    """Four decoder blocks of width 64, three vision blocks of width 32, weights that tell inputs apart."""
    tokenizer = processor.tokenizer
    config = make_config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "image_size": SIDE,
            "out_features": ["stage3"],
        },
        image_token_index=processor.image_token_id,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    model = Maira2ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("lambda1"):
            torch.nn.init.normal_(parameter, std=0.2)
    # A random model may write any token; a placeholder without an image would stop a run without a cache.
    model.lm_head.weight.data[processor.image_token_id] = 0
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def processor() -> Maira2Processor:
    register()
    return make_processor()


@pytest.fixture(scope="session")
def tiny(processor: Maira2Processor) -> Maira2:
    return Maira2(make_model(processor), processor)


@pytest.fixture(scope="session")
def eager(processor: Maira2Processor) -> Maira2:
    return Maira2(make_model(processor, "eager"), processor)


@pytest.fixture
def hooked(tiny: Maira2) -> HookedMaira2:
    return HookedMaira2(tiny)


@pytest.fixture
def hooked_eager(eager: Maira2) -> HookedMaira2:
    return HookedMaira2(eager)


@pytest.fixture(scope="session")
def studies() -> list[PlainStudy]:
    """One, two and three images, texts of unequal length."""
    report = "The heart size is normal. There is a small left pleural effusion."
    return [
        PlainStudy(frontal=picture(0), indication="chest X-ray", report=report),
        PlainStudy(
            frontal=picture(1), lateral=picture(2), technique="frontal and lateral", report="No pneumothorax."
        ),
        PlainStudy(
            frontal=picture(3),
            lateral=picture(4),
            prior_frontal=picture(5),
            prior_report=report,
            report="No pneumothorax is seen. The heart size is normal.",
        ),
    ]


@pytest.fixture(scope="session")
def study(studies: list[PlainStudy]) -> PlainStudy:
    return studies[0]


@pytest.fixture(scope="session")
def encoding(processor: Maira2Processor, studies: list[PlainStudy]) -> Maira2Encoding:
    """Three studies, left-padded, with their reports."""
    return processor.encode(studies, report="teacher")


@pytest.fixture(scope="session")
def prompt(processor: Maira2Processor, studies: list[PlainStudy]) -> Maira2Encoding:
    """Two studies without reports, to generate from."""
    return processor.encode(studies[:2])


@dataclass(frozen=True)
class Reference:
    """What plain torch hooks, written out here, see of one run."""

    logits: torch.Tensor
    values: dict[str, torch.Tensor]

    def assert_same(self, found: dict[str, torch.Tensor]) -> None:
        """Every point's value is there, bit for bit."""
        assert set(self.values) <= set(found)
        for name, value in self.values.items():
            assert found[name].shape == value.shape, name
            assert torch.equal(found[name], value), name


@pytest.fixture(scope="session")
def reference(eager: Maira2, encoding: Maira2Encoding) -> Reference:
    model, found, handles = eager.model, {}, []
    table = PointTable(model.config)

    def keep(name: str, value: Any) -> None:
        point = table.points[name]
        if point.spec.tap == "feature_map":
            value = value.feature_maps[-1]
        if isinstance(value, tuple):
            value = value[1 if point.spec.tap == "pattern" else 0]
        if point.spec.heads:
            value = value.reshape(*value.shape[:-1], 4, 16)
        found[name] = value.detach().clone()

    for name, point in table.points.items():
        module: Any = model.get_submodule(point.module)
        if point.spec.tap == "input":
            handles.append(module.register_forward_pre_hook(lambda _, args, n=name: keep(n, args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _, __, out, n=name: keep(n, out)))
    with torch.no_grad():
        logits = model(**encoding.model_inputs()).logits
    for handle in handles:
        handle.remove()
    return Reference(logits, found)


def _hosts() -> list[str]:
    return ["hooked", "bridge"] if has_transformer_bridge() else ["hooked"]


@pytest.fixture(params=_hosts())
def host(request: pytest.FixtureRequest, eager: Maira2) -> Any:
    """HookedMaira2, and where TransformerLens has one, the bridge."""
    return HookedMaira2(eager) if request.param == "hooked" else request.getfixturevalue("bridge")


@pytest.fixture(scope="session")
def bridge(eager: Maira2) -> Any:
    from sae_lens_maira.hooks import to_bridge

    return to_bridge(eager)


@pytest.fixture(scope="session")
def torch_hooks() -> Callable[[torch.nn.Module], int]:
    """How many hooks a model's modules hold, transformers' own capturing hooks left out."""

    def count(model: torch.nn.Module) -> int:
        return sum(
            len(module._forward_pre_hooks)
            + len(module._backward_hooks)
            + sum("output_capturing" not in repr(hook) for hook in module._forward_hooks.values())
            for module in model.modules()
        )

    return count

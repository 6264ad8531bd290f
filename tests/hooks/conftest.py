"""A small MAIRA-2 of the real classes with random weights, its processor, studies of one to three images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sae_lens_maira.hooks import HookedMaira2, PointTable
from sae_lens_maira.maira2 import Maira2, Maira2Encoding, Maira2Processor, register
from sae_lens_maira.maira2.versions import has_transformer_bridge
from sae_lens_maira.phantom.tokenizer import build_tokenizer

CORPUS = [
    "You are an expert radiology assistant tasked with interpreting a chest X-ray study. USER: ASSISTANT:",
    "Given the current frontal image and the current lateral image and the prior frontal image"
    " PRIOR_REPORT: N/A",
    "Provide a structured description of the findings in the radiology study in comparison to the prior"
    " frontal image. INDICATION: TECHNIQUE: COMPARISON:",
    "The heart size is normal. There is a small left pleural effusion. No pneumothorax is seen.",
]


@pytest.fixture(scope="session")
def processor(make_processor: Callable[..., Maira2Processor]) -> Maira2Processor:
    register()
    return make_processor(build_tokenizer(CORPUS, vocab_size=400))


@pytest.fixture(scope="session")
def tiny(processor: Maira2Processor, make_tiny: Callable[..., Maira2]) -> Maira2:
    """Four decoder blocks, three vision blocks."""
    return make_tiny(processor, blocks=4, vision_blocks=3, std=0.2)


@pytest.fixture(scope="session")
def eager(processor: Maira2Processor, make_tiny: Callable[..., Maira2]) -> Maira2:
    """The same model with eager attention, as TransformerLens' hooks need it."""
    return make_tiny(processor, blocks=4, vision_blocks=3, std=0.2, attention="eager")


@pytest.fixture
def hooked(tiny: Maira2) -> HookedMaira2:
    return HookedMaira2(tiny)


@pytest.fixture
def hooked_eager(eager: Maira2) -> HookedMaira2:
    return HookedMaira2(eager)


@pytest.fixture(scope="session")
def studies(make_study: Any, make_picture: Any) -> list[Any]:
    """One, two and three images, texts of unequal length."""
    report = "The heart size is normal. There is a small left pleural effusion."
    image = [make_picture(seed, width=60) for seed in range(6)]
    return [
        make_study(frontal=image[0], indication="chest X-ray", report=report),
        make_study(
            frontal=image[1], lateral=image[2], technique="frontal and lateral", report="No pneumothorax."
        ),
        make_study(
            frontal=image[3],
            lateral=image[4],
            prior_frontal=image[5],
            prior_report=report,
            report="No pneumothorax is seen. The heart size is normal.",
        ),
    ]


@pytest.fixture(scope="session")
def study(studies: list[Any]) -> Any:
    return studies[0]


@pytest.fixture(scope="session")
def encoding(processor: Maira2Processor, studies: list[Any]) -> Maira2Encoding:
    """Three studies, left-padded, with their reports."""
    return processor.encode(studies, report="teacher")


@pytest.fixture(scope="session")
def prompt(processor: Maira2Processor, studies: list[Any]) -> Maira2Encoding:
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

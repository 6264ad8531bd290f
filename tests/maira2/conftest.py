"""Small real parts for the tests of the model room: tokenizers, a processor, studies and a tiny model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BitImageProcessor, PreTrainedTokenizerFast

from sae_lens_maira.maira2 import (
    ADDED_TOKENS,
    Maira2,
    Maira2Config,
    Maira2ForConditionalGeneration,
    Maira2Processor,
    build_prompt,
    make_config,
    register,
)

SIDE = 56  # four by four patches of 14

CORPUS = [
    "The heart size is normal. No pleural effusion or pneumothorax. A small left pleural effusion is new.",
    "Cardiomegaly is unchanged. Right internal jugular central venous line, tip in the SVC. Pain, fever?",
    "PA and lateral views of the chest. 68-year-old woman with dyspnoea. Compared to the day before.",
    "Opacité basale gauche, 2,5 cm; épanchement pleural droit. INDICATION: N/A COMPARISON: N/A",
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


def picture(seed: int = 0, height: int = 70, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def _texts() -> list[str]:
    frame = PlainStudy(frontal=0, lateral=0, prior_frontal=0)
    prompts = [build_prompt(frame, task).text.replace("<image>", " ") for task in ("findings", "grounded")]
    return CORPUS + prompts


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def llama_tokenizer(prepend_scheme: str = "first") -> PreTrainedTokenizerFast:
    """A BPE with metaspace and byte fallback, as Vicuna's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=True)
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=620,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        show_progress=False,
        limit_alphabet=80,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finish(tokenizer)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=620,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer)


def processor_of(tokenizer: PreTrainedTokenizerFast, side: int = SIDE) -> Maira2Processor:
    images = BitImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5307] * 3,
        image_std=[0.2583] * 3,
        resample=3,
    )
    return Maira2Processor(image_processor=images, tokenizer=tokenizer)


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Maira2Config:
    return make_config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "image_size": SIDE,
            "out_features": ["stage2"],
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_study() -> type[PlainStudy]:
    return PlainStudy


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., np.ndarray]:
    return picture


@pytest.fixture(scope="session")
def make_processor() -> Callable[..., Maira2Processor]:
    return processor_of


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "llama_first": llama_tokenizer("first"),
        "llama_always": llama_tokenizer("always"),
        "byte_level": byte_level_tokenizer(),
    }


@pytest.fixture(scope="session", params=["llama_first", "llama_always", "byte_level"])
def any_processor(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Maira2Processor:
    return processor_of(tokenizers[request.param])


@pytest.fixture(scope="session")
def processor(tokenizers: dict[str, Any]) -> Maira2Processor:
    return processor_of(tokenizers["llama_first"])


@pytest.fixture(scope="session")
def tiny(processor: Maira2Processor) -> Maira2:
    register()
    torch.manual_seed(0)
    model = Maira2ForConditionalGeneration(tiny_config(processor.tokenizer)).eval()
    for parameter in model.parameters():  # the library's initialisation is too small to tell inputs apart
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return Maira2(model, processor)


@pytest.fixture
def study() -> PlainStudy:
    return PlainStudy(
        frontal=picture(0),
        lateral=picture(1, 80, 60),
        prior_frontal=picture(2),
        indication="Dyspnoea  and fever, 2,5 cm opacité?",
        technique="PA and lateral views.",
        prior_report="The heart size is normal.",
        report="There is a small left pleural effusion, new.",
    )

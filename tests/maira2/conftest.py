"""Tokenizers of three kinds with MAIRA-2's tokens, a processor for each, a tiny model and a study."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sae_lens_maira.maira2 import ADDED_TOKENS, Maira2, Maira2Processor, build_prompt, save_processor

CORPUS = [
    "The heart size is normal. No pleural effusion or pneumothorax. A small left pleural effusion is new.",
    "Cardiomegaly is unchanged. Right internal jugular central venous line, tip in the SVC. Pain, fever?",
    "PA and lateral views of the chest. 68-year-old woman with dyspnoea. Compared to the day before.",
    "Opacité basale gauche, 2,5 cm; épanchement pleural droit. INDICATION: N/A COMPARISON: N/A",
]


def _texts() -> list[str]:
    names = ("indication", "technique", "comparison", "prior_report", "report", "grounded_report")
    frame: Any = SimpleNamespace(frontal=0, lateral=0, prior_frontal=0, **dict.fromkeys(names))
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


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "llama_first": llama_tokenizer("first"),
        "llama_always": llama_tokenizer("always"),
        "byte_level": byte_level_tokenizer(),
    }


@pytest.fixture(scope="session", params=["llama_first", "llama_always", "byte_level"])
def any_processor(
    request: pytest.FixtureRequest, tokenizers: dict[str, Any], make_processor: Callable[..., Maira2Processor]
) -> Maira2Processor:
    return make_processor(tokenizers[request.param])


@pytest.fixture(scope="session")
def processor(tokenizers: dict[str, Any], make_processor: Callable[..., Maira2Processor]) -> Maira2Processor:
    return make_processor(tokenizers["llama_first"])


@pytest.fixture(scope="session")
def tiny(processor: Maira2Processor, make_tiny: Callable[..., Maira2]) -> Maira2:
    """Three decoder blocks, two vision blocks."""
    return make_tiny(processor, blocks=3, vision_blocks=2, std=0.15)


@pytest.fixture
def study(make_study: Any, make_picture: Any) -> Any:
    """Three images of unequal size, an accent, two spaces, and no comparison."""
    return make_study(
        frontal=make_picture(0),
        lateral=make_picture(1, 80, 60),
        prior_frontal=make_picture(2),
        indication="Dyspnoea  and fever, 2,5 cm opacité?",
        technique="PA and lateral views.",
        prior_report="The heart size is normal.",
        report="There is a small left pleural effusion, new.",
    )


@pytest.fixture(scope="session")
def saved(tiny: Maira2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the published layout: shards, unknown keys, and remote code that must not run."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model.save_pretrained(folder, max_shard_size="100KB")
    save_processor(tiny.processor, folder)
    for name, extra in (
        ("config.json", {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}),
        ("processor_config.json", {"AutoProcessor": "remote.Processor"}),
    ):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | {"auto_map": extra, "a_key_of_tomorrow": 1}))
    (folder / "remote.py").write_text("raise SystemExit('remote code ran')")
    return folder

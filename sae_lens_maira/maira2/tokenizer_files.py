"""Read and write processor files so that every supported transformers gives the same ids.

Two differences between versions are handled here. transformers 5 rebuilds a `LlamaTokenizer` from its vocabulary and
drops the normaliser of `tokenizer.json`, so that tokens after every `<image>` get other ids than in training. A
processor saved by transformers 5 names classes that 4.56 does not have. Therefore `tokenizer.json` is always used
unchanged, and written files contain only names that both versions accept.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_as_filed(tokenizer: Any, source: str, **hub: Any) -> Any:
    """Return `tokenizer`, or one read unchanged from `tokenizer.json` if the two differ.

    Args:
        tokenizer: Tokenizer as transformers loaded it.
        source: Folder or hub id that it was loaded from.
        **hub: Hub keywords; others are ignored.
    """
    hub = {key: value for key, value in hub.items() if key in _HUB}
    path = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub)
    if path is None or not getattr(tokenizer, "is_fast", False):
        return tokenizer
    filed = json.loads(Path(path).read_text(encoding="utf-8"))
    loaded = json.loads(tokenizer.backend_tokenizer.to_str())
    if all(filed.get(part) == loaded.get(part) for part in _PIPELINE):
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False, **hub)


def write_portable_files(processor: Any, folder: Path) -> None:
    """Write a processor's files so that transformers 4.56 and 5 both read them.

    Args:
        processor: A `Maira2Processor`.
        folder: Folder to write to; created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, images = processor.tokenizer, processor.image_processor
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        name: str(getattr(tokenizer, name)) for name in _NAMED_TOKENS if getattr(tokenizer, name) is not None
    }
    _write(folder / "special_tokens_map.json", named)
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": type(processor).__name__,
            "model_max_length": tokenizer.model_max_length,
            "clean_up_tokenization_spaces": False,
            **named,
        },
    )
    sizes = {"size": {"shortest_edge": processor.recipe.size}}
    sizes |= {"crop_size": {"height": processor.recipe.crop, "width": processor.recipe.crop}}
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "BitImageProcessor",
            "processor_class": type(processor).__name__,
            **{
                f"do_{step}": True
                for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")
            },
            **sizes,
            "resample": processor.recipe.resample,
            "rescale_factor": float(images.rescale_factor),
            "image_mean": list(processor.recipe.mean),
            "image_std": list(processor.recipe.std),
        },
    )
    _write(
        folder / "processor_config.json",
        {
            "processor_class": type(processor).__name__,
            "patch_size": processor.patch_size,
            "vision_feature_select_strategy": processor.vision_feature_select_strategy,
            "num_additional_image_tokens": processor.num_additional_image_tokens,
            "image_token": processor.image_token,
        },
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

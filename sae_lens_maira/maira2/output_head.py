"""Load tokenizer, final norm and `lm_head` of a checkpoint without the rest of the model.

Latent records from an activation store need only these: the tokens of the studies, and the tokens that a decoder row
promotes. For MAIRA-2 in bfloat16 the two tensors take 0.26 GB; the whole model takes 13.8 GB.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sae_lens_maira.errors import CheckpointError
from sae_lens_maira.maira2.configuration import Maira2Config
from sae_lens_maira.maira2.loading import (
    Maira2,
    dtype_of,
    load_config,
    load_processor,
    published_revision,
    source_of,
)
from sae_lens_maira.maira2.processing import Maira2Processor

NORM = ("language_model.model.norm.weight", "model.language_model.norm.weight")
HEAD = ("language_model.lm_head.weight", "lm_head.weight")
"""Names of the tensors in the published layout and in the layout of transformers 5."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class OutputHead:
    """Final layers of a model, from the residual stream to tokens.

    Attributes:
        processor: Processor with the tokenizer.
        config: Configuration of the whole model.
        norm: (d_model,) weight of the final norm.
        lm_head: (vocabulary, d_model) unembedding.
    """

    processor: Maira2Processor
    config: Maira2Config
    norm: torch.Tensor
    lm_head: torch.Tensor

    @classmethod
    def of(cls, maira: Maira2) -> "OutputHead":
        """Take the output head of a loaded model; tensors are shared."""
        norm = maira.model.get_submodule("model.language_model.norm").get_parameter("weight")
        config: Any = maira.model.config
        return cls(maira.processor, config, norm.detach(), maira.model.lm_head.weight.detach())


def load_output_head(
    path_or_id: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **hub: Any,
) -> OutputHead:
    """Read the output head of a checkpoint in safetensors files.

    Args:
        path_or_id: A local folder, a hub id or "phantom"; only the hub's files with the two tensors are downloaded.
        dtype: Precision of the tensors; None is `dtype_of` the model.
        device: Device of the tensors.
        **hub: `revision`, `cache_dir`, `force_download`, `local_files_only`, `token`, for transformers.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged or not MAIRA-2's.
    """
    source, dtype = source_of(path_or_id), dtype_of(path_or_id) if dtype is None else dtype
    if not Path(source).is_dir():
        hub["revision"] = published_revision(source, hub.get("revision"))
    config = load_config(source, **hub)
    processor = load_processor(source, **hub)
    files = _files_of(source, hub)
    norm, head = (_tensor(source, files, names, hub).to(device, dtype) for names in (NORM, HEAD))
    width = config.get_text_config().hidden_size
    if norm.shape != (width,) or head.ndim != 2 or head.shape[1] != width:
        raise CheckpointError(
            f"The final norm and lm_head in {source} have shapes {tuple(norm.shape)} and {tuple(head.shape)}; its "
            f"configuration expects ({width},) and (vocabulary, {width}). Fetch the checkpoint again."
        )
    return OutputHead(processor, config, norm, head)


def _files_of(source: str, hub: dict[str, Any]) -> dict[str, str]:
    """Tensor name -> file; empty if all tensors are in one file."""
    index = _file(source, INDEX, hub)
    if index is None:
        return {}
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a readable shard index ({error}). Fetch it again.") from None


def _tensor(source: str, files: dict[str, str], names: tuple[str, ...], hub: dict[str, Any]) -> torch.Tensor:
    """Read the tensor that has one of these names."""
    name_of_file = next((files[name] for name in names if name in files), WEIGHTS)
    path = _file(source, name_of_file, hub)
    if path is None:
        raise CheckpointError(
            f"{source} has no {name_of_file}. A complete MAIRA-2 checkpoint in safetensors files was expected; "
            "download it again."
        )
    try:
        with safe_open(path, "pt") as opened:
            stored = set(opened.keys())
            for name in names:
                if name in stored:
                    return opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Fetch it again.") from None
    raise CheckpointError(
        f"{path} has no tensor {' or '.join(names)}. A MAIRA-2 checkpoint was expected; fetch it again."
    )


def _file(source: str, name: str, hub: dict[str, Any]) -> Path | None:
    """Local path of a file of a checkpoint; None if there is no such file."""
    from transformers.utils.hub import cached_file

    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(str(found))

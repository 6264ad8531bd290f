"""Load a MAIRA-2 checkpoint, published or saved by this package; every tensor must match the model.

transformers fills missing tensors with random numbers and only warns. Here a missing, unexpected or misshapen tensor is
an error, as are a missing shard, a folder without a processor and a model of another type. Remote code is never run.
`register` adds this package's classes for model type `maira2` to transformers' Auto classes (SAELens uses
`AutoModelForCausalLM`), and the published names of the weights to transformers 5.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from sae_lens_maira.errors import CheckpointError, ConfigError
from sae_lens_maira.maira2.configuration import Maira2Config, check_keywords
from sae_lens_maira.maira2.modeling import Maira2ForConditionalGeneration, Maira2Model
from sae_lens_maira.maira2.processing import Maira2Processor
from sae_lens_maira.maira2.versions import register_key_renames


def register() -> None:
    """Register the classes with transformers; calling it again has no effect."""
    AutoConfig.register(Maira2Config.model_type, Maira2Config, exist_ok=True)
    AutoModel.register(Maira2Config, Maira2Model, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto_class.register(Maira2Config, Maira2ForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(Maira2Config, Maira2Processor, exist_ok=True)
    register_key_renames(Maira2Config.model_type)


PHANTOM = "phantom"
"""Name of the small model that ships with the package, accepted wherever a model is named."""
PUBLISHED_ID = "microsoft/maira-2"
PUBLISHED_REVISION = "795a2b1cd4a310624b4e3d14b5a23e41fd273deb"

_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token")
_MODEL_KEYWORDS = (
    "attn_implementation",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "quantization_config",
    "use_safetensors",
)


def source_of(path_or_id: str | Path) -> str:
    """Convert a model's name to a folder or hub id; "phantom" is the model that ships with the package."""
    shipped = Path(__file__).parents[1] / "phantom" / "weights"
    return str(shipped if str(path_or_id) == PHANTOM else path_or_id)


def dtype_of(path_or_id: str | Path) -> torch.dtype:
    """Default precision of the weights: float32 for the phantom, bfloat16 for other models."""
    return torch.float32 if str(path_or_id) == PHANTOM else torch.bfloat16


class Maira2(NamedTuple):
    """A model in evaluation mode and its processor."""

    model: Maira2ForConditionalGeneration
    processor: Maira2Processor


def load_maira2(
    path_or_id: str | Path = PUBLISHED_ID,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    device_map: Any = None,
    layers: int | None = None,
    **keywords: Any,
) -> Maira2:
    """Load a MAIRA-2 model and its processor from a folder or the hub.

    Args:
        path_or_id: A local folder, a hub id or "phantom".
        dtype: Precision of the loaded weights (tensors are converted while they are read); None for the default
            (`dtype_of`), "auto" for the file's precision.
        device: Device of the whole model. Weights are read to a GPU tensor by tensor, without a copy of the model in
            main memory.
        revision: Hub revision; None for the pinned one of `microsoft/maira-2`, and for "main" of other models.
        device_map: Device map of transformers, for models on several devices (needs accelerate).
        layers: Number of decoder layers to read, from the first; None for all. Such a model has no logits: a forward
            must stop at the last loaded layer (`stop_at_layer`). Embedding, vision tower, projector, final norm and
            `lm_head` are always read.
        **keywords: `attn_implementation`, `quantization_config`, `max_memory`, `offload_folder`,
            `offload_state_dict`, `use_safetensors`, `cache_dir`, `force_download`, `local_files_only`, `token`, for
            transformers.

    Raises:
        ConfigError: An unknown keyword, dtype or device, a device or package that this machine does not have,
            `trust_remote_code=True`, a number of layers out of range, or both a device and a device map.
        CheckpointError: A missing shard or processor, a model of another type, a damaged file, or tensors
            that do not match the model exactly.
    """
    if keywords.pop("trust_remote_code", False):
        raise ConfigError(
            "trust_remote_code=True was given, but MAIRA-2 runs here without remote code, and the published"
            " code stops working at transformers 4.52. Leave the keyword out."
        )
    if "torch_dtype" in keywords:
        raise ConfigError("torch_dtype was given, the old name of dtype in transformers. Pass it as dtype.")
    check_keywords(keywords, {*_HUB_KEYWORDS, *_MODEL_KEYWORDS, "trust_remote_code"}, "load_maira2")
    if (
        isinstance(dtype, str)
        and dtype != "auto"
        and not isinstance(getattr(torch, dtype, None), torch.dtype)
    ):
        raise ConfigError(f"The dtype of the model was {dtype!r}; use float32, bfloat16, float16 or auto.")
    places = device_map.values() if isinstance(device_map, dict) else [device]
    for place in places:
        if isinstance(place, (str, torch.device)) and place != "disk":
            check_device(place)
    if device is not None and device_map is not None:
        raise ConfigError(
            "Both device and device_map were given; give device for one device or device_map for several."
        )
    register()
    source = source_of(path_or_id)
    dtype = dtype_of(path_or_id) if dtype is None else dtype
    hub = {name: value for name, value in keywords.items() if name in _HUB_KEYWORDS}
    if Path(source).is_dir():
        _check_folder(Path(source))
    else:
        hub["revision"] = published_revision(source, revision)

    config = load_config(source, **hub)
    available = config.text_config.num_hidden_layers
    if layers is not None:
        if not 1 <= layers <= available:
            raise ConfigError(
                f"layers={layers} was requested, but {source} has {available} decoder layers; use 1 to {available}."
            )
        config.text_config.num_hidden_layers = layers
    quantized = keywords.get("quantization_config") is not None
    if device is not None and (quantized or torch.device(device).type not in ("cpu", "meta")):
        device_map = {"": device}  # read directly to the device, without a second copy in main memory
    processor = load_processor(source, **hub)
    rest = {name: value for name, value in keywords.items() if name in _MODEL_KEYWORDS}
    try:
        with _leaving_out(range(config.text_config.num_hidden_layers, available)):
            loaded: Any = Maira2ForConditionalGeneration.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                device_map=device_map,
                output_loading_info=True,
                trust_remote_code=False,
                **hub,
                **rest,
            )
    except ImportError as error:  # An attention kernel or a quantization that is not installed.
        raise ConfigError(
            f"{source} cannot be loaded, because a package is missing: {error} Install it, or leave out "
            "attn_implementation, quantization_config or device_map."
        ) from error
    except Exception as error:  # safetensors, OS, hub and shape errors have no common base
        asked = [name for name in ("attn_implementation", "quantization_config") if name in keywords]
        asked += ["device_map"] if device_map is not None else []
        if isinstance(error, ValueError) and any(name in str(error) for name in asked):
            raise ConfigError(f"{source} cannot be loaded with these arguments: {error}") from error
        raise CheckpointError(
            f"The weights in {source} could not be loaded ({type(error).__name__}: {error}). A complete"
            " MAIRA-2 checkpoint was expected; fetch it again if a file is damaged."
        ) from error
    model, info = loaded
    _check_tensors(source, info)
    if layers is not None and layers < available:
        _end_after(model, layers, available)
    if device is not None and not quantized:
        model.to(device)
    model.eval()
    return Maira2(model, processor)


@contextmanager
def _leaving_out(layers: range) -> Iterator[None]:
    """Make transformers skip the tensors of some decoder layers without a warning; they are not read."""
    model: Any = Maira2ForConditionalGeneration
    kept = model._keys_to_ignore_on_load_unexpected
    if layers:
        numbers = "|".join(map(str, layers))
        model._keys_to_ignore_on_load_unexpected = [
            *(kept or ()),
            rf"language_model\.(?:model\.)?layers\.(?:{numbers})\.",
        ]
    try:
        yield
    finally:
        model._keys_to_ignore_on_load_unexpected = kept


def _end_after(model: Any, layers: int, available: int) -> None:
    """Refuse a forward beyond the last layer of a partly loaded model; a run that stops before is not affected."""

    def refuse(*_: Any) -> None:
        raise CheckpointError(
            f"This model was loaded with {layers} of {available} decoder layers, so it has no logits. Stop the run"
            f" with stop_at_layer={layers} or less, or load it without layers=."
        )

    model.model.language_model.norm.register_forward_pre_hook(refuse)


def load_processor(path_or_id: str | Path, **hub: Any) -> Maira2Processor:
    """Load only the processor.

    Raises:
        CheckpointError: Its files are missing or damaged.
    """
    register()
    try:
        processor = Maira2Processor.from_pretrained(source_of(path_or_id), **hub)
    except Exception as error:  # missing files and bad JSON raise many types
        raise CheckpointError(
            f"No processor could be loaded from {path_or_id} ({type(error).__name__}: {error}). Expected were"
            " a preprocessor_config.json (or processor_config.json) and the tokenizer's files next to the"
            " weights; copy them there, or write them with `save_processor`."
        ) from error
    if processor.image_token_id in (None, processor.tokenizer.unk_token_id):
        raise CheckpointError(
            f"The tokenizer in {path_or_id} does not know {processor.image_token!r}. The tokenizer of a"
            " MAIRA-2 checkpoint, with its 207 added tokens, was expected; copy it next to the weights."
        )
    return processor


def save_processor(processor: Maira2Processor, folder: str | Path) -> None:
    """Write a processor's files so that transformers 4.56 and 5 both read them."""
    processor.save_pretrained(folder)


def published_revision(source: str, revision: str | None) -> str:
    """Revision to load: the given one, else the pinned one of the published model, else "main"."""
    return revision or (PUBLISHED_REVISION if source == PUBLISHED_ID else "main")


def check_device(name: torch.device | str) -> None:
    """Raise `ConfigError` if torch has no such device, or this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"There is no device {str(name)!r}; use auto, cpu, cuda, cuda:1 ...") from None
    if device.type in ("cpu", "meta"):
        return
    found = getattr(torch, device.type, None)
    count = found.device_count() if found is not None and found.is_available() else 0
    if not count:
        raise ConfigError(f"The device was {str(name)!r}, but torch finds no such device; use cpu or auto.")
    if device.index is not None and device.index >= count:
        raise ConfigError(
            f"The device was {str(name)!r}, but torch finds only {count}, numbered from 0. Use one of these."
        )


def checkpoint_fingerprint(path_or_id: str | Path, revision: str | None = None) -> str:
    """Identify a checkpoint without loading it: "id@revision" for a hub repository, 16 hex digits for a folder.

    The digits are a hash of the configuration and of the size, header, first and last numbers of every weights file.
    """
    folder = Path(source_of(path_or_id))
    if not folder.is_dir():
        pinned = PUBLISHED_REVISION if str(path_or_id) == PUBLISHED_ID else "main"
        return f"{path_or_id}@{revision or pinned}"
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 16)))
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def load_config(path_or_id: str | Path, revision: str | None = None, **hub: Any) -> Maira2Config:
    """Read only the configuration of a checkpoint.

    Args:
        path_or_id: A local folder, a hub id or "phantom".
        revision: As for `load_maira2`.
        **hub: `cache_dir`, `force_download`, `local_files_only`, `token`, for transformers.

    Raises:
        CheckpointError: The configuration cannot be read, or is not one of MAIRA-2.
    """
    source = source_of(path_or_id)
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise CheckpointError(f"There is no folder {source}. Give the folder of a checkpoint, or a hub id.")
    if not Path(source).is_dir():
        hub["revision"] = published_revision(source, revision)
    try:
        raw: dict[str, Any] = Maira2Config.get_config_dict(source, **hub)[0]
    except Exception as error:  # hub, OS and JSON errors
        raise CheckpointError(
            f"No configuration could be read from {source} ({type(error).__name__}: {error}). A local folder"
            " with a config.json, or a hub id that this machine can download, was expected; for the gated"
            " microsoft/maira-2 log in and accept its terms first."
        ) from error
    if not raw:
        raise CheckpointError(
            f"No configuration is in {source}. A folder with a config.json, the weights and the processor's"
            " files was expected; check the path."
        )
    if raw.get("model_type") != Maira2Config.model_type:
        raise CheckpointError(
            f"The configuration in {source} is of model type {raw.get('model_type')!r}, not 'maira2'. Give a"
            " MAIRA-2 checkpoint."
        )
    config = Maira2Config.from_dict(raw)
    assert isinstance(config, Maira2Config)
    return config


def _check_folder(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a readable shard index ({error}). Fetch it again.") from error
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(shards)} shards that its index names: {', '.join(missing)}."
            " Download the missing files."
        )


def _check_tensors(source: str, info: Any) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(kind) or ())
        if keys:
            shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
            raise CheckpointError(
                f"Loading {source} left {len(keys)} {kind.replace('_', ' ')}: {shown}. Every tensor of the"
                " configuration's model, and no other, was expected; check that config.json and the weights"
                " belong together."
            )

"""Load SAE weights of unknown layout by inspecting keys and shapes.

    f = relu((x - b_dec) W_enc + b_enc),  kept where f > threshold,  x_hat = f W_dec + b_dec

Known are the state dicts of dictionary_learning (also the backup of an interrupted run) and of Bussmann's
repository, as .pt or safetensors, in either orientation, with group sizes in the state dict or in a JSON file next to
it. Anything else is refused with a list of what was found. Pickles are read as tensors only; nothing in them runs.
"""

import ast
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.levels import check_widths, widths_from_fractions, widths_from_sizes

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)

# Names under which each tensor has been seen. A ".weight" is nn.Linear's and is transposed.
_ALIASES = {
    "W_enc": ("W_enc", "w_enc", "encoder.weight", "encoder"),
    "W_dec": ("W_dec", "w_dec", "decoder.weight", "decoder"),
    "b_enc": ("b_enc", "encoder.bias", "encoder_bias"),
    "b_dec": ("b_dec", "decoder.bias", "decoder_bias", "bias", "b_pre", "pre_bias"),
    "threshold": ("threshold", "thresholds", "topk_threshold"),
}
_WRAPPERS = ("module.", "_orig_mod.", "ae.", "sae.", "autoencoder.", "model.")
_GROUP_KEYS = ("group_sizes", "group_fractions", "matryoshka_widths", "level_widths", "group_indices")
_HARMLESS = (*_GROUP_KEYS, "k", "num_batches_not_active", "num_tokens_since_fired", "tokens_since_fired")
_READABLE_CLASSES = ("MatryoshkaBatchTopKSAE", "BatchTopKSAE", "JumpReluAutoEncoder")


@dataclass(frozen=True)
class RawSAE:
    """Weights of a JumpReLU SAE as they were found, in this package's orientation."""

    W_enc: Tensor
    """(d_in, d_sae)"""
    b_enc: Tensor
    """(d_sae,)"""
    W_dec: Tensor
    """(d_sae, d_in)"""
    b_dec: Tensor
    """(d_in,)"""
    threshold: Tensor
    """(d_sae,)"""
    level_widths: tuple[int, ...] | None
    """Cumulative widths, None where nothing names them."""
    k: float | None
    """Mean number of active latents in training, None where nothing names it."""
    apply_b_dec_to_input: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    """Configuration stored next to the weights, as JSON values."""


def read_sae(path: str | Path, dict_class: str | None = None) -> RawSAE:
    """Read the SAE in a weights file, with the configuration next to it.

    Args:
        path: A .pt, .pth, .bin, .ckpt or .safetensors file.
        dict_class: dictionary_learning's name of the class, for a file that does not say which it is.

    Raises:
        SAEError: The file is damaged, holds more than tensors, or has a layout that is not understood.
    """
    path = Path(path)
    state, config = read_state(path), read_config(path)
    scale = 1.0
    if isinstance(state.get("ae"), Mapping):
        # The backup of an interrupted dictionary_learning run. Its biases are still in normalised units.
        scale = float(state.get("norm_factor") or 1.0)
        config = config or {"trainer": state.get("config") or {}}
        config = config | {"interrupted_at_step": state.get("step")}
        state = state["ae"]
    for name in ("state_dict", "model_state_dict"):
        if isinstance(state.get(name), Mapping):
            state = state[name]
    return _assemble({bare_key(key): value for key, value in state.items()}, config, scale, path, dict_class)


def read_state(path: Path) -> dict[str, Any]:
    """The mapping that a weights file holds.

    Raises:
        SAEError: The file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise SAEError(f"{path} is not a file. Give the path of an SAE's weights, such as ae.pt.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:
            raise SAEError(
                f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: {error}. "
                "Download it again."
            ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SAEError(
            f"{path} ({path.stat().st_size} bytes) could not be read as tensors only: {reason}. Either it is "
            "damaged or cut short (download it again), or it holds Python objects; those could run code and "
            "are never loaded, and nothing in the file was run. Ask its author for a state dict or "
            "safetensors."
        ) from error
    if not isinstance(state, Mapping):
        raise SAEError(f"{path} holds a {type(state).__name__}; a state dict of named tensors was expected.")
    return dict(state)


def read_config(weights: Path) -> dict[str, Any]:
    """The JSON next to a weights file (config.json, cfg.json or the same stem), {} where there is none.

    Raises:
        SAEError: The file there is not a JSON object.
    """
    folders = [weights.parent]
    if weights.parent.name == "checkpoints":
        folders.append(weights.parent.parent)
    for folder in folders:
        for path in config_files(weights.name, sorted(folder.glob("*.json"))):
            if path.is_file():
                try:
                    config = json.loads(path.read_text(encoding="utf-8"))
                except (ValueError, RecursionError) as error:
                    raise SAEError(f"{path} is not valid JSON: {error}. Download it again.") from error
                if not isinstance(config, dict):
                    raise SAEError(f"{path} holds a {type(config).__name__}; a JSON object was expected.")
                return config
    return {}


def config_files(weights: str, files: Sequence[Path]) -> list[Path]:
    """JSON files that may be the configuration of a weights file in the same folder, best first.

    `sae_ef4.pt` takes sae_ef4.json, then config_ef4.json or ef4_cfg.json, then config.json.
    """
    stem = PurePosixPath(weights).stem
    own = [file for file in files if file.stem == stem]
    words = _words(stem)
    paired = [
        file for file in files if "config" in _split(file.stem) and words and _words(file.stem) == words
    ]
    common = [file for file in files if file.name in ("config.json", "cfg.json", "sae_config.json")]
    return list(dict.fromkeys([*own, *paired, *sorted(common, key=lambda file: file.name != "config.json")]))


def _split(stem: str) -> list[str]:
    return ["config" if word == "cfg" else word for word in re.split(r"[-_. ]+", stem.lower())]


def _words(stem: str) -> set[str]:
    return set(_split(stem)) - {"config", "sae", "ae", "model", "weights"}


def config_value(config: Mapping[str, Any], *names: str) -> Any:
    """First value under any of the names, in order of names, at any depth; lists in strings are unpacked."""
    entries = list(_entries(config))
    for name in names:
        for key, value in entries:
            if key == name and value is not None:
                return _unpacked(value)
    return None


def _assemble(
    state: dict[str, Any], config: dict[str, Any], scale: float, path: Path, given_class: str | None
) -> RawSAE:
    dict_class = config_value(config, "dict_class") or given_class
    if dict_class is not None and dict_class not in _READABLE_CLASSES:
        raise SAEError(
            f"The configuration next to {path} names the class {dict_class!r}. Only "
            f"{', '.join(_READABLE_CLASSES)} "
            "encode with a threshold as JumpReLU does; other kinds are not read here."
        )
    if str(config_value(config, "input_unit_norm")).lower() == "true":
        raise SAEError(
            f"The configuration next to {path} has input_unit_norm=true: that SAE normalises every row before it "
            "encodes, which JumpReLU cannot express. Train without it, or use that library's own class."
        )
    found = {name: _first(state, aliases) for name, aliases in _ALIASES.items()}
    missing = [name for name, (_, value) in found.items() if value is None]
    used = {key for key, _ in found.values()}
    foreign = [
        key
        for key, value in state.items()
        if key not in used and key not in _HARMLESS and isinstance(value, Tensor) and value.numel() > 1
    ]
    if missing or foreign:
        raise SAEError(
            f"{path} holds {_listing(state)}. "
            + (f"Not found: {', '.join(missing)} under any known name. " if missing else "")
            + (f"Not understood: {', '.join(foreign)}. " if foreign else "")
            + "Expected are W_enc, b_enc, W_dec, b_dec and threshold, or that library's names for them."
        )
    tensors = {name: torch.as_tensor(value).to(_float_dtype(value)) for name, (_, value) in found.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise SAEError(
                f"{path}: {bad} of {tensor.numel()} numbers of {name} are NaN or infinite. A run that "
                "diverged leaves such weights; use an earlier checkpoint."
            )
    d_in, d_sae = tensors["b_dec"].numel(), tensors["b_enc"].numel()
    threshold = tensors["threshold"].reshape(-1)
    if threshold.numel() not in (1, d_sae):
        raise SAEError(
            f"{path} holds {_listing(state)}: the threshold has neither 1 nor d_sae={d_sae} numbers."
        )
    widths = _level_widths(state, config, d_sae, path)
    if widths is None and dict_class is None:
        raise SAEError(
            f"{path} names no groups and no class, neither in its state dict nor in a configuration next to it, so its "
            "encoder's formula is unknown: JumpReLU and TopK SAEs of the same library have the same tensors. Pass "
            f"dict_class= to load_release, one of {', '.join(_READABLE_CLASSES)}, with level_widths=[{d_sae}] for one "
            f'level; for a command write {path.parent / "config.json"} with {{"dict_class": "BatchTopKSAE", '
            f'"level_widths": [{d_sae}]}}.'
        )
    k = _plain(state["k"]) if "k" in state else config_value(config, "k", "top_k")
    return RawSAE(
        W_enc=_oriented(tensors["W_enc"], found["W_enc"][0], (d_in, d_sae), path),
        b_enc=tensors["b_enc"].reshape(-1) * scale,
        W_dec=_oriented(tensors["W_dec"], found["W_dec"][0], (d_sae, d_in), path),
        b_dec=tensors["b_dec"].reshape(-1) * scale,
        # A negative threshold means "never set" and passes every ReLU output: it is a mark, not a length to
        # scale.
        threshold=torch.where(threshold >= 0, threshold * scale, threshold).expand(d_sae).clone(),
        level_widths=widths,
        k=None if k is None else float(k),
        # dictionary_learning's JumpReLU class alone encodes x itself.
        apply_b_dec_to_input=dict_class != "JumpReluAutoEncoder",
        facts={key: value for key, value in _entries(config) if _is_json(value)}
        | {"file": path.name, "norm_factor": scale},
    )


def _level_widths(
    state: Mapping[str, Any], config: dict[str, Any], d_sae: int, path: Path
) -> tuple[int, ...] | None:
    for source in (state, dict(_entries(config))):
        for key in _GROUP_KEYS:
            values = _plain(_unpacked(source.get(key)))
            if not values:
                continue
            if key == "group_fractions":
                widths = widths_from_fractions(values, d_sae)
            elif key == "group_sizes":
                widths = widths_from_sizes(values)
            else:
                widths = tuple(width for width in values if width != 0)
            if widths[-1] != d_sae and key in ("group_sizes", "group_fractions"):
                raise SAEError(
                    f"{path}: {key}={values} ends at {widths[-1]}, but the SAE has d_sae={d_sae} latents."
                )
            return check_widths(widths, d_sae, key)
    return None


def _oriented(weight: Tensor, name: str, shape: tuple[int, int], path: Path) -> Tensor:
    stands_turned = name.endswith(".weight") if shape[0] == shape[1] else tuple(weight.shape) == shape[::-1]
    weight = weight.T if stands_turned and weight.ndim == 2 else weight
    if tuple(weight.shape) != shape:
        raise SAEError(
            f"{path}: {name} has shape {tuple(weight.shape)}, but the biases say {shape} or {shape[::-1]}. "
            "The file mixes two SAEs or is of another kind."
        )
    return weight.contiguous()


def bare_key(key: str) -> str:
    """A tensor's name without the prefixes that wrapping modules leave."""
    for wrapper in _WRAPPERS:
        key = key.removeprefix(wrapper)
    return key


def _first(state: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    return next(((name, state[name]) for name in names if state.get(name) is not None), ("", None))


def _float_dtype(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) and value.is_floating_point() else torch.float32


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value)
        else:
            yield str(key), value


def _unpacked(value: Any) -> Any:
    if isinstance(value, str) and value.strip()[:1] in ("[", "("):
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            return value
    return value


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _listing(state: Mapping[str, Any]) -> str:
    parts = [
        f"{key} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{key} ({type(value).__name__})"
        for key, value in state.items()
    ]
    return ", ".join(parts[:12]) + (f" and {len(parts) - 12} more" if len(parts) > 12 else "") or "nothing"

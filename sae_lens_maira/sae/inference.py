"""A trained Matryoshka SAE with its levels: decode from a prefix, truncate, find the level of a latent.

    f = relu(h) [h > threshold],  h = (x - b_dec) W_enc + b_enc
    x_i = f[:w_i] W_dec[:w_i] + b_dec                             level i of 0 .. L-1, the last one whole

It computes what SAELens' JumpReLU SAE computes, and is saved as one: the levels are in the metadata, so that plain
SAELens reads the folder. `load_matryoshka` makes one from any JumpReLU SAE whose metadata name levels, and `open_sae`
opens the folder of any SAELens SAE after checking it.
"""

import copy
import hashlib
import json
import operator
import warnings
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig, SAEMetadata, TrainingSAE
from torch import Tensor
from typing_extensions import override

from sae_lens_maira.checksums import SUMS, damaged_files, files_with_sums
from sae_lens_maira.errors import MairaError, SAEError
from sae_lens_maira.sae.config import MatryoshkaSAEConfig
from sae_lens_maira.sae.layouts import read_state
from sae_lens_maira.sae.levels import METADATA_KEY, remember_text_context, widths_from_metadata

WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "topk_threshold")
"""Tensors that hold floating-point numbers; a checkpoint of a training also has counts."""


class MatryoshkaSAE(JumpReLUSAE):
    """JumpReLU SAE with nested levels.

    Weights: W_enc (d_in, d_sae), b_enc and threshold (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,).
    Levels are counted from 0; a negative level counts from the end, so that -1 is the whole SAE.

    Attributes:
        p99: (d_sae,) 99th percentile of each latent over the rows where it is active; None if not recorded. It is the
            unit of steering strengths, set by `sae_lens_maira.load_sae` from latent records, and not saved.
        latent_names: Latent -> explanation, from the same records.
        records: The `RecordSet` that both come from; None if none was read.
    """

    cfg: MatryoshkaSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride] - narrowed, as SAELens does
    p99: Tensor | None
    latent_names: dict[int, str]
    records: Any

    def __init__(self, cfg: MatryoshkaSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.p99, self.latent_names, self.records = None, {}, None
        _remember_levels(cfg)

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Cumulative widths, the last one d_sae."""
        return self.cfg.level_widths()

    @property
    def n_levels(self) -> int:
        """Number of levels."""
        return len(self.level_widths)

    def width_of(self, level: int) -> int:
        """Number of latents in the prefix of a level.

        Raises:
            SAEError: There is no such level.
        """
        try:
            return self.level_widths[operator.index(level)]
        except IndexError:
            raise SAEError(
                f"Level {level} was requested, but the SAE has {self.n_levels} levels of widths "
                f"{self.level_widths}. Levels run from 0 to {self.n_levels - 1}."
            ) from None

    @overload
    def level_of(self, latent: int) -> int: ...
    @overload
    def level_of(self, latent: Tensor) -> Tensor: ...
    def level_of(self, latent: int | Tensor) -> int | Tensor:
        """The level that introduced a latent: 0 for the innermost, for an index or a tensor of indices.

        Raises:
            SAEError: An index is outside 0 .. d_sae - 1.
        """
        indices = torch.as_tensor(latent)
        lowest, highest = (int(indices.min()), int(indices.max())) if indices.numel() else (0, 0)
        if lowest < 0 or highest >= self.cfg.d_sae:
            raise SAEError(
                f"Latents {lowest} to {highest} were requested, but the SAE has {self.cfg.d_sae} latents. "
                f"Indices run from 0 to {self.cfg.d_sae - 1}."
            )
        if isinstance(latent, int):
            return bisect_right(self.level_widths, latent)
        return torch.bucketize(latent, torch.tensor(self.level_widths, device=latent.device), right=True)

    def latents_of(self, level: int) -> range:
        """The latents that a level adds to the one inside it."""
        width = self.width_of(level)
        return range((0, *self.level_widths)[self.level_widths.index(width)], width)

    @override
    def decode(self, feature_acts: Tensor, level: int | None = None) -> Tensor:
        """Reconstruction (..., d_in) from activations (..., d_sae), or from a level's prefix of them.

        Args:
            feature_acts: Activations of all latents; with a level, those of its prefix are enough.
            level: Which prefix to use; None uses all latents.
        """
        if level is None:
            return super().decode(feature_acts)
        width = self.width_of(level)
        out = self.hook_sae_recons(feature_acts[..., :width] @ self.W_dec[:width] + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    @torch.no_grad()
    def truncate(self, level: int) -> "MatryoshkaSAE":
        """A smaller SAE of its own: the prefix of a level, with copied weights and the levels inside it."""
        width = self.width_of(level)
        config = copy.deepcopy(self.cfg)
        config.d_sae = width
        config.matryoshka_widths = [w for w in self.level_widths if w <= width]
        facts = config.metadata[METADATA_KEY]
        facts["truncated_from"] = self.cfg.d_sae
        if facts.get("level_weights"):
            facts["level_weights"] = facts["level_weights"][: len(config.matryoshka_widths)]
        return matryoshka_from_state_dict(
            config,
            {
                "W_enc": self.W_enc[:, :width],
                "b_enc": self.b_enc[:width],
                "threshold": self.threshold[:width],
                "W_dec": self.W_dec[:width],
                "b_dec": self.b_dec,
            },
        )

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        if "topk_threshold" in state_dict:
            raise SAEError(
                "This folder is a checkpoint of an SAE under training. Open it with load_matryoshka, which makes a "
                "JumpReLU SAE of it, or with TrainingSAE.load_from_disk to train on."
            )

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save as JumpReLU, which plain SAELens loads without this package; the levels are in the metadata.

        Returns:
            Paths of the weights and of the configuration.
        """
        with files_with_sums(path) as draft:
            _, config_path = super().save_model(draft)
            plain = {
                name: value for name, value in self.cfg.to_dict().items() if name not in _own_field_names()
            }
            plain["architecture"] = JumpReLUSAEConfig.architecture()
            config_path.write_text(json.dumps(plain), encoding="utf-8")
        return Path(path) / SAE_WEIGHTS_FILENAME, Path(path) / SAE_CFG_FILENAME


def load_matryoshka(
    source: str | Path | SAE[Any], *, device: str = "cpu", dtype: str | None = None
) -> MatryoshkaSAE:
    """Make a `MatryoshkaSAE` from a saved folder or from an SAE in memory.

    Args:
        source: A folder that SAELens wrote (an inference SAE or a training checkpoint), a JumpReLU SAE (its
            weights are then shared, not copied), or a training SAE (its weights are copied and its threshold
            becomes JumpReLU's).
        device: Device to load a folder to.
        dtype: Dtype to load a folder in; None keeps the saved one.

    Raises:
        SAEError: The folder is damaged, the SAE is not a JumpReLU one, or its metadata name no levels.
    """
    sae = source if isinstance(source, SAE) else open_sae(Path(source), device, dtype)
    if isinstance(sae, TrainingSAE):
        return _from_training(sae)
    if isinstance(sae, MatryoshkaSAE):
        return sae
    if not isinstance(sae, JumpReLUSAE):
        raise SAEError(
            f"An SAE of architecture {sae.cfg.architecture()!r} was given; levels are read from SAEs saved "
            "as jumprelu or matryoshka. Train with MatryoshkaTrainingSAEConfig, or use load_release."
        )
    widths = widths_from_metadata(sae.cfg.metadata, sae.cfg.d_sae)
    if widths is None:
        raise SAEError(
            f"The metadata of this SAE names no levels; it has the keys {sorted(sae.cfg.metadata.keys())}. "
            "If it has none, use it unchanged; if you know them, build "
            "MatryoshkaSAEConfig(matryoshka_widths=...)."
        )
    facts = sae.cfg.metadata.get(METADATA_KEY) or sae.cfg.metadata.get("training_architecture_details")
    config = MatryoshkaSAEConfig(**_base_fields(sae.cfg), matryoshka_widths=list(widths), k=facts.get("k"))
    result = matryoshka_from_state_dict(
        config, {name: value.detach() for name, value in sae.state_dict().items()}, share=True
    )
    return result.train(sae.training)


def open_sae(folder: str | Path, device: str = "cpu", dtype: str | None = None) -> SAE[Any]:
    """Open a folder that SAELens wrote, and check it: the one place where SAE folders are read.

    Args:
        folder: Folder with cfg.json and sae_weights.safetensors.
        device: Device to load it to.
        dtype: Precision of the weights; None keeps the saved one.

    Returns:
        An SAE of the saved class, a `TrainingSAE` for a checkpoint of one under training.

    Raises:
        SAEError: The folder is incomplete, damaged, inconsistent or of an unknown kind, or a weight is NaN or infinite.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if damaged := damaged_files(folder):
        raise SAEError(
            f"{folder} is damaged: {', '.join(damaged)} is missing or not what was written with it. Copy the folder "
            f"again. If the files were replaced on purpose, remove {SUMS}."
        )
    weights = folder / SAE_WEIGHTS_FILENAME
    state = read_state(weights)
    for name in ("d_in", "d_sae"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise SAEError(
                f"{folder / SAE_CFG_FILENAME} has {name}={config.get(name)!r}; a positive number was expected. The "
                "file is damaged or is not SAELens' configuration."
            )
    saved = str(config.get("dtype", "float32")).removeprefix("torch.")
    if not isinstance(getattr(torch, saved, None), torch.dtype):
        raise SAEError(
            f"{folder / SAE_CFG_FILENAME} has dtype={saved!r}; float32, float16 or bfloat16 was expected."
        )
    d_in, d_sae = config["d_in"], config["d_sae"]
    sizes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, config.get("d_out", d_in))}
    for name, size in sizes.items():
        if name in state and tuple(state[name].shape) != size:
            raise SAEError(
                f"{weights} has {name} of shape {tuple(state[name].shape)}, and {SAE_CFG_FILENAME} says {size}. The "
                "two files belong to different SAEs; copy both from one folder."
            )
    for name, value in state.items():
        if name in WEIGHTS and not value.is_floating_point():
            raise SAEError(
                f"{weights}: {name} holds {value.dtype}, and floating-point numbers were expected. Copy the weights of "
                "the SAE, without a conversion to integers."
            )
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise SAEError(
                f"{weights}: {bad} of {value.numel()} numbers of {name} are NaN or infinite. A run that diverged "
                "leaves such weights; use an earlier checkpoint."
            )
    warn_if_never_set(state, folder)
    del state
    # Only configurations of SAEs under training have this field.
    kind = TrainingSAE if "decoder_init_norm" in config else SAE
    try:
        return kind.load_from_disk(folder, device=device, dtype=dtype)
    except MairaError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise SAEError(
            f"SAELens could not open {folder} as an SAE of architecture {config.get('architecture')!r}: "
            f"{type(error).__name__}: {reason}. The configuration and the weights do not fit together, or another "
            "version wrote them; copy the folder again."
        ) from error


def fingerprint(sae: SAE[Any]) -> str:
    """SHA-256 (hex) over the names, shapes and float32 values of an SAE's parameters and buffers, in order of name.

    It does not depend on file format or device. Interventions and latent records carry it, so that they are never
    applied to another SAE.
    """
    digest = hashlib.sha256()
    for name, value in sorted(sae.state_dict().items()):
        tensor = value.detach().cpu().to(torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.numpy()).cast("B") if tensor.numel() else b"")
    return digest.hexdigest()


def warn_if_never_set(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Warn of latents whose threshold is negative, which marks one that training has not set yet.

    Args:
        state: Weights of the SAE; `threshold` has (d_sae,) values, `topk_threshold` one for all latents.
        source: Folder or name of the SAE, for the message.
    """
    d_sae = len(state["b_enc"]) if "b_enc" in state else 0
    for name in ("threshold", "topk_threshold"):
        if name not in state or not bool((state[name] < 0).any()):
            continue
        count = int((state[name] < 0).sum()) if state[name].numel() > 1 else d_sae
        warnings.warn(
            f"{source}: {count} of {d_sae} latents have a negative {name}. It was never set, so every positive "
            "activation of them passes. Train longer, or lower threshold_start_step.",
            stacklevel=3,
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / SAE_CFG_FILENAME
    if not path.is_file():
        raise SAEError(
            f"{folder} has no {SAE_CFG_FILENAME}, so SAELens did not write it. Give the folder of an SAE, or load "
            "layouts of other libraries with load_release."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SAEError(
            f"{path} is not valid JSON ({error}); it is damaged or cut short. Copy it again from where the SAE was "
            "saved."
        ) from error
    metadata = config.get("metadata") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(metadata or {}, dict):
        raise SAEError(
            f"{path} is not the configuration of an SAE: a JSON object with metadata was expected."
        )
    return config


def _from_training(sae: TrainingSAE[Any]) -> MatryoshkaSAE:
    state_dict: dict[str, Any] = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state_dict)
    plain = sae.cfg.get_inference_sae_cfg_dict()
    metadata = SAEMetadata(**copy.deepcopy(plain["metadata"]))
    widths = widths_from_metadata(metadata, sae.cfg.d_sae)
    if widths is None or "threshold" not in state_dict:
        raise SAEError(
            f"A training SAE of architecture {sae.cfg.architecture()!r} was given, which has no levels or no "
            "threshold. Only Matryoshka BatchTopK SAEs can be turned into a MatryoshkaSAE."
        )
    config = MatryoshkaSAEConfig(
        **(_base_fields(sae.cfg) | {"metadata": metadata}), matryoshka_widths=list(widths), k=sae.cfg.k
    )
    return matryoshka_from_state_dict(config, state_dict, share=True)


def matryoshka_from_state_dict(
    config: MatryoshkaSAEConfig, state: dict[str, Tensor], share: bool = False
) -> MatryoshkaSAE:
    # Built on the meta device, so that no random weights are drawn: neither memory nor the generator's
    # state is spent.
    device, config.device = config.device, "meta"
    sae = MatryoshkaSAE(config)
    config.device, sae.device = device, torch.device(device)
    sae.load_state_dict(
        {name: value if share else value.clone().contiguous() for name, value in state.items()}, assign=True
    )
    return sae


def _base_fields(config: SAEConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(SAEConfig)}


def _own_field_names() -> set[str]:
    return {field.name for field in fields(MatryoshkaSAEConfig)} - {
        field.name for field in fields(JumpReLUSAEConfig)
    }


def _remember_levels(config: MatryoshkaSAEConfig) -> None:
    kept = config.metadata.get(METADATA_KEY) or {}
    config.metadata[METADATA_KEY] = kept | {"level_widths": list(config.level_widths()), "k": config.k}
    remember_text_context(config.metadata)

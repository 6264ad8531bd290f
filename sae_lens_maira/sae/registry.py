"""Register this package's architecture and releases; calling it again changes nothing.

Classes go through SAELens' public registry. For the release, `SAE.from_pretrained("maira-2-sae", "expansion_4")`,
SAELens has a public `converter=` argument and three tables that its lookups read, which are not public:
`register_release` fills them, and a test checks that they exist. Both ways end in `release.convert_release`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from torch import Tensor

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.config import ARCHITECTURE, MatryoshkaSAEConfig, MatryoshkaTrainingSAEConfig
from sae_lens_maira.sae.inference import MatryoshkaSAE
from sae_lens_maira.sae.levels import METADATA_KEY
from sae_lens_maira.sae.release import MAIRA2_MODEL, MAIRA2_RELEASE, ReleaseRequest, convert_release
from sae_lens_maira.sae.training import MatryoshkaTrainingSAE

LOADER_NAME = "maira2_sae"
RELEASE_NAME = "maira-2-sae"
EXPANSIONS = (2, 4, 8)


def register() -> None:
    """Register the architecture "matryoshka" for training and for inference.

    Raises:
        SAEError: Another package holds the name.
    """
    _claim(SAE_CLASS_REGISTRY, (MatryoshkaSAE, MatryoshkaSAEConfig), register_sae_class)
    _claim(
        SAE_TRAINING_CLASS_REGISTRY,
        (MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig),
        register_sae_training_class,
    )


def _claim(registry: Any, ours: tuple[type, type], add: Any) -> None:
    held = registry.get(ARCHITECTURE)
    if held is None:
        add(ARCHITECTURE, *ours)
    elif held != ours:
        raise SAEError(
            f"SAELens' registry holds {held[0].__module__}.{held[0].__qualname__} under {ARCHITECTURE!r}, "
            f"where {ours[0].__module__}.{ours[0].__qualname__} belongs. Two packages claim the name; load "
            "only one."
        )


def maira2_sae_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """SAELens' loader protocol over a release; also fit for `SAE.from_pretrained(repo, id, converter=...)`.

    Args:
        repo_id: A hub repository or a local path.
        folder_name: "expansion_4", or a part of the path of the SAE's file.
        device: Device of the tensors.
        force_download: Fetch and convert again.
        cfg_overrides: Entries of the configuration to replace; facts about the model go to its metadata.

    Raises:
        SAEError: As `load_release`.
    """
    folder, overrides = _converted(repo_id, folder_name, force_download, cfg_overrides)
    config, state_dict = loaders.sae_lens_disk_loader(folder, device, overrides)
    return _with_levels(config, cfg_overrides), state_dict, None


def maira2_sae_config(
    repo_id: str,
    folder_name: str,
    device: str | None = None,
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """SAELens' protocol for an SAE's configuration alone; arguments as `maira2_sae_loader`."""
    folder, overrides = _converted(repo_id, folder_name, force_download, cfg_overrides)
    return _with_levels(loaders.get_sae_lens_config_from_disk(folder, device, overrides), cfg_overrides)


def maira2_sae_disk_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """For `SAE.load_from_disk(path, converter=...)`: any layout that `load_release` reads."""
    folder = convert_release(ReleaseRequest(path_or_repo=path, expansion=None))
    config, state_dict = loaders.sae_lens_disk_loader(folder, device, cfg_overrides)
    return _with_levels(config, cfg_overrides), state_dict


def register_release(
    name: str = RELEASE_NAME,
    path_or_repo: str | Path = MAIRA2_RELEASE,
    expansions: Sequence[int] = EXPANSIONS,
    model_name: str = MAIRA2_MODEL,
) -> None:
    """Make `SAE.from_pretrained(name, "expansion_{n}")` work, in this process.

    Args:
        name: The release's name in SAELens.
        path_or_repo: Its hub repository, or a local copy.
        expansions: The values of d_sae / d_in it holds.
        model_name: The model its activations come from.

    Raises:
        SAEError: SAELens has a release of that name at another place.
    """
    loaders.NAMED_PRETRAINED_SAE_LOADERS.setdefault(LOADER_NAME, maira2_sae_loader)
    loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS.setdefault(LOADER_NAME, maira2_sae_config)
    directory = get_pretrained_saes_directory()
    if name in directory and directory[name].conversion_func != LOADER_NAME:
        raise SAEError(
            f"SAELens already has a release {name!r} at {directory[name].repo_id}. Register ours under "
            "another name."
        )
    ids = [f"expansion_{expansion}" for expansion in expansions]
    directory[name] = PretrainedSAELookup(
        release=name,
        repo_id=str(path_or_repo),
        model=model_name,
        conversion_func=LOADER_NAME,
        saes_map={sae_id: sae_id for sae_id in ids},
        expected_var_explained={},
        expected_l0={},
        neuronpedia_id={},
        norm_scaling_factor={},
        config_overrides=None,
    )


def _converted(
    repo_id: str, folder_name: str, force_download: bool, cfg_overrides: dict[str, Any] | None
) -> tuple[Path, dict[str, Any]]:
    expansion = re.fullmatch(r"expansion_(\d+)", folder_name)
    request = ReleaseRequest(
        path_or_repo=repo_id,
        expansion=int(expansion[1]) if expansion else None,
        folder=None if expansion else folder_name,
        force_download=force_download,
    )
    about_the_sae = {k: v for k, v in (cfg_overrides or {}).items() if k not in loaders.LLM_METADATA_KEYS}
    return convert_release(request), about_the_sae


def _with_levels(config: dict[str, Any], cfg_overrides: dict[str, Any] | None) -> dict[str, Any]:
    # SAELens reads model facts from the metadata only, and drops a metadata whose version it cannot see.
    about_the_model = {k: v for k, v in (cfg_overrides or {}).items() if k in loaders.LLM_METADATA_KEYS}
    known = {key: value for key, value in about_the_model.items() if value is not None}
    metadata = config["metadata"] | known
    facts = metadata[METADATA_KEY]
    levels = {"matryoshka_widths": list(facts["level_widths"]), "k": facts.get("k")}
    return config | levels | {"architecture": ARCHITECTURE, "metadata": metadata}

"""Where dashboards go: names of model, source set and source, in the forms that Neuronpedia and SAELens accept.

    source id = <layer>-<set>          SAE id = <model>/<layer>-<set>, the SAE's metadata `neuronpedia_id`

The layer comes from the records alone, so that rows and folder can not disagree. It knows nothing about latents.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.io import atomic_write
from sae_lens_maira.latents.records import RecordsMeta

MODEL_NAME = re.compile(r"[a-z][a-z0-9.-]{1,31}")
SET_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
PUBLIC_CREATOR = "clkht01d40000jv08hvalcvly"
"""Neuronpedia shows the activations of this creator to everybody, and hides those of others."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Names under which a set of records appears.

    Attributes:
        set_name: source set, such as "res-matryoshka-16k": lower case, digits, single hyphens.
        model_id: 2 to 32 of a-z, 0-9, dot, hyphen; a letter first.
        layers: decoder layers of the model, 1 to 127.
        description: of the source set.
        creator: shown as its author.
        url: of pages that show more, such as our own with the images.
        dataset: what the studies are.
        created_at: written into every row; a constant, so that the same records give the same bytes.
        creator_id: of every row; another one than the default hides the activations.
    """

    set_name: str
    model_id: str = "maira-2"
    layers: int = 32
    description: str = "Sparse autoencoder latents of a radiology vision-language model"
    creator: str = "sae-lens-maira"
    url: str | None = None
    dataset: str = "chest radiographs with reports"
    created_at: str = "2026-01-01T00:00:00.000000"
    creator_id: str = PUBLIC_CREATOR

    def __post_init__(self) -> None:
        """Check the names against Neuronpedia's rules.

        Raises:
            ConfigError: a name or the number of layers is not acceptable.
        """
        if not MODEL_NAME.fullmatch(self.model_id):
            raise ConfigError(
                f"The model id {self.model_id!r} is not one that Neuronpedia takes; expected 2 to 32 of a-z, 0-9, "
                "dot and hyphen with a letter first, such as maira-2."
            )
        if not SET_NAME.fullmatch(self.set_name):
            raise ConfigError(
                f"The source set {self.set_name!r} is not a name that Neuronpedia takes; expected lower-case letters "
                "and digits with single hyphens between them, such as res-matryoshka-16k."
            )
        if not 1 <= self.layers <= 127:
            raise ConfigError(f"A model of {self.layers} layers was given; Neuronpedia takes 1 to 127.")

    def source(self, layer: int) -> str:
        """Source id of a layer.

        Raises:
            ConfigError: the model has no such layer.
        """
        if not 0 <= layer < self.layers:
            raise ConfigError(
                f"The records are of layer {layer}, and the model {self.model_id} is said to have {self.layers} "
                "layers; give the model's number of layers."
            )
        return f"{layer}-{self.set_name}"

    def neuronpedia_id(self, layer: int) -> str:
        """What SAELens' Neuronpedia helpers read from an SAE's metadata: `maira-2/15-<set>`."""
        return f"{self.model_id}/{self.source(layer)}"


def set_metadata(sae: Any, target: Target, meta: RecordsMeta) -> None:
    """Write `neuronpedia_id`, `hook_name` and `model_name` into an SAE's metadata, in place.

    SAELens' helpers read the first and the last; their `model_name` is the model's name on Neuronpedia.

    Args:
        sae: a SAELens SAE.
        target: names on Neuronpedia.
        meta: of the records that the dashboards are made from.
    """
    for name, value in _metadata(target, meta).items():
        setattr(sae.cfg.metadata, name, value)


def save_metadata(folder: Path | str, target: Target, meta: RecordsMeta) -> Path:
    """Write the same into the configuration of a saved SAE; its weights are not touched.

    Returns:
        Path of the configuration.

    Raises:
        ConfigError: the folder has no configuration of an SAE, or its SAE is of another size.
    """
    path = Path(folder) / SAE_CFG_FILENAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        size = (config["d_in"], config["d_sae"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no configuration of an SAE ({error}); give the folder that SAELens saved the SAE to."
        ) from None
    if size != (meta.d_in, meta.d_sae):
        raise ConfigError(
            f"The SAE in {folder} has d_in and d_sae {size}, the records {(meta.d_in, meta.d_sae)}; they are of "
            "another SAE. Give the folder of the SAE that was recorded."
        )
    config["metadata"] = (config.get("metadata") or {}) | _metadata(target, meta)
    atomic_write(path, json.dumps(config))
    return path


def _metadata(target: Target, meta: RecordsMeta) -> dict[str, str]:
    return {
        "neuronpedia_id": target.neuronpedia_id(meta.layer),
        "hook_name": meta.hook_name,
        "model_name": target.model_id,
    }

"""Names of model, source set and source on Neuronpedia, in the forms that Neuronpedia and SAELens accept.

    source id = <layer>-<set>          SAE id = <model>/<layer>-<set>, the SAE's metadata `neuronpedia_id`

The layer comes from the records only, so that rows and folder cannot disagree.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from sae_lens_maira.checksums import rewrite_file
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.latents.records import RecordsMeta
from sae_lens_maira.privacy import SHAREABLE

MODEL_NAME = re.compile(r"(?=.{2,32}$)[a-z][a-z0-9]*([.-][a-z0-9]+)*")
SET_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
RESERVED_SETS = ("neurons",)
MAX_DESCRIPTION = 128
NOTICE = "CREDENTIALED DATA, DO NOT PUBLISH."
PUBLIC_CREATOR = "clkht01d40000jv08hvalcvly"
"""Neuronpedia shows activations of this creator only."""


LAYERS = {"maira-2": 32, "phantom": 8}


def name_of(model: str, model_id: str | None) -> str:
    """Name on Neuronpedia of the records' model: "phantom" for the phantom, else "maira-2", unless another is given."""
    return model_id or ("phantom" if model == "phantom" else "maira-2")


def model_of(model: str, model_id: str | None, layers: int | None) -> tuple[str, int]:
    """Name and number of decoder layers of the model on Neuronpedia.

    Args:
        model: Model of the records.
        model_id: Another name than `name_of` it.
        layers: Another number of layers.

    Raises:
        ConfigError: A model of another name has no number of layers.
    """
    name = name_of(model, model_id)
    if layers is None and name not in LAYERS:
        raise ConfigError(
            f"The number of layers of {name!r} is not known; it is for {' and '.join(LAYERS)}. Give --layers."
        )
    return name, layers if layers is not None else LAYERS[name]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Names under which a record set is published.

    Attributes:
        set_name: Source set, such as "res-matryoshka-16k": lower case, digits, single hyphens; starts with a letter.
        model_id: 2 to 32 characters a-z, 0-9, with single dots or hyphens in between; starts with a letter.
        layers: Number of decoder layers of the model, 1 to 127.
        description: Description of the source set, at most 128 characters.
        creator: Name shown as the author.
        url: Address of a page that shows more, such as one with the images; with http:// or https://.
        dataset: Description of the studies.
        created_at: Time stamp of every row; constant, so that the same records give the same bytes.
        creator_id: Creator of every row; activations of any other than the default are hidden.
        release: Release name; release names are global on Neuronpedia, so it is <model>-<set> if not given.
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
    release: str | None = None

    def __post_init__(self) -> None:
        """Check the names against Neuronpedia's rules.

        Raises:
            ConfigError: A name or the number of layers is invalid.
        """
        if not MODEL_NAME.fullmatch(self.model_id):
            raise ConfigError(
                f"Neuronpedia does not accept the model id {self.model_id!r}; expected 2 to 32 characters a-z and "
                "0-9 with single dots or hyphens in between, starting with a letter, such as maira-2."
            )
        if not SET_NAME.fullmatch(self.set_name):
            raise ConfigError(
                f"Neuronpedia does not accept the source set name {self.set_name!r}; expected lower-case letters and "
                "digits with single hyphens in between, starting with a letter, such as res-matryoshka-16k."
            )
        if self.set_name in RESERVED_SETS:
            raise ConfigError(
                f"Neuronpedia reserves the source set name {self.set_name!r}. Choose another name."
            )
        if len(self.description) > MAX_DESCRIPTION:
            raise ConfigError(
                f"The description has {len(self.description)} characters; Neuronpedia accepts {MAX_DESCRIPTION}. "
                "Shorten it."
            )
        if self.url is not None and not _is_address(self.url):
            raise ConfigError(
                f"{self.url!r} is not an address that Neuronpedia accepts; expected one that starts with https:// or "
                "http:// and names a host. Fix --url."
            )
        if not 1 <= self.layers <= 127:
            raise ConfigError(
                f"The model has {self.layers} layers; Neuronpedia accepts 1 to 127. Check --layers."
            )

    @property
    def release_name(self) -> str:
        """Name of the release."""
        return self.release or f"{self.model_id}-{self.set_name}"

    def marked(self, licence: str) -> Target:
        """Return these names, with a notice in description and dataset if the data are credentialed."""
        if licence in SHAREABLE:
            return self
        return replace(
            self,
            description=f"{NOTICE} {self.description}"[:MAX_DESCRIPTION],
            dataset=f"{NOTICE} {self.dataset}",
        )

    def source(self, layer: int) -> str:
        """Return the source id of a layer.

        Raises:
            ConfigError: The model has no such layer.
        """
        if not 0 <= layer < self.layers:
            raise ConfigError(
                f"The records are of layer {layer}, but the model {self.model_id} was given {self.layers} layers. Give "
                "the model's number of layers."
            )
        return f"{layer}-{self.set_name}"

    def neuronpedia_id(self, layer: int) -> str:
        """Return the id that SAELens' Neuronpedia helpers read from an SAE's metadata: `maira-2/15-<set>`."""
        return f"{self.model_id}/{self.source(layer)}"


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError for an impossible port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", url)


def save_metadata(folder: Path | str, target: Target, meta: RecordsMeta) -> Path:
    """Write `neuronpedia_id`, `hook_name` and `model_name` into the configuration of a saved SAE, not its weights.

    SAELens' helpers read the first and the last; `model_name` is the model's name on Neuronpedia.

    Args:
        folder: Folder of the SAE.
        target: Names on Neuronpedia.
        meta: Metadata of the records that the dashboards are made from.

    Returns:
        Path of the configuration.

    Raises:
        ConfigError: The folder has no SAE configuration, or its SAE has a different size.
    """
    from sae_lens.constants import SAE_CFG_FILENAME

    path = Path(folder) / SAE_CFG_FILENAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        size = (config["d_in"], config["d_sae"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not an SAE configuration ({error}). Give the folder that SAELens saved the SAE to."
        ) from None
    if size != (meta.d_in, meta.d_sae):
        raise ConfigError(
            f"The SAE in {folder} has (d_in, d_sae) = {size}, the records have {(meta.d_in, meta.d_sae)}; they belong "
            "to different SAEs. Give the folder of the SAE that was recorded."
        )
    config["metadata"] = (config.get("metadata") or {}) | {
        "neuronpedia_id": target.neuronpedia_id(meta.layer),
        "hook_name": meta.hook_name,
        "model_name": target.model_id,
    }
    rewrite_file(path, json.dumps(config))
    return path

"""Load a published SAE: find it in its release, convert it once to safetensors, open it with its levels.

    release (folder, file or hub repository) -> the SAE asked for -> JumpReLU folder in the cache ->
    MatryoshkaSAE

The converted folder is an ordinary SAELens folder with the levels in its metadata. What the release does
not say (at which hook point its activations were taken, say) is a parameter here and marked as assumed in
the metadata. This module knows nothing about layouts inside the files; see `layouts.py`.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.saes.sae import SAEMetadata

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.cache import build_once, cache_root, file_digest
from sae_lens_maira.sae.candidates import Candidate, choose, choose_by_name, find_candidates, weight_files
from sae_lens_maira.sae.config import MatryoshkaSAEConfig
from sae_lens_maira.sae.inference import MatryoshkaSAE, load_matryoshka, matryoshka_from_state_dict
from sae_lens_maira.sae.layouts import RawSAE, config_value, read_sae
from sae_lens_maira.sae.levels import METADATA_KEY, check_widths

MAIRA2_RELEASE = "microsoft/maira-2-sae"
MAIRA2_MODEL = "microsoft/maira-2"
# The study names layer 15 and does not say from where it counts; 0-based output of that block is the training
# library's convention. Reconstruction quality tells a wrong neighbour at once, so the hook is a parameter.
MAIRA2_HOOK = "blocks.15.hook_resid_post"
_CONVERTER_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """Which SAE of a release, and what to say where it is silent; the fields are those of `load_release`."""

    path_or_repo: str | Path = MAIRA2_RELEASE
    expansion: float | None = 4
    folder: str | None = None
    d_in: int | None = None
    level_widths: Sequence[int] | None = None
    hook_name: str | None = None
    model_name: str | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False


def load_release(
    path_or_repo: str | Path = MAIRA2_RELEASE,
    expansion: float | None = 4,
    *,
    folder: str | None = None,
    d_in: int | None = None,
    level_widths: Sequence[int] | None = None,
    hook_name: str | None = None,
    model_name: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
) -> MatryoshkaSAE:
    """Load one SAE of a release, from a local path or from the Hugging Face hub.

    Args:
        path_or_repo: a weights file, a folder of SAEs, or a hub repository's name.
        expansion: wanted d_sae / d_in; None takes the only SAE there is.
        folder: part of the path of the SAE's file, needed only where several SAEs fit.
        d_in: width the SAE must have; None accepts any.
        level_widths: cumulative widths, for a release that does not name them.
        hook_name: hook point for the metadata; None takes the release's own layer, else `MAIRA2_HOOK`.
        model_name: model for the metadata; None takes the release's own, else `MAIRA2_MODEL`.
        revision: commit, tag or branch of a hub repository.
        cache_dir: folder of converted SAEs; None as `cache.cache_root` says.
        force_download: fetch and convert again.
        local_files_only: never ask the hub, use its cache.
        device: where to load it to.
        dtype: in which dtype.

    Raises:
        SAEError: nothing or too much fits, or the file is damaged, unsafe or not understood.
    """
    request = ReleaseRequest(
        path_or_repo=path_or_repo,
        expansion=expansion,
        folder=folder,
        d_in=d_in,
        level_widths=level_widths,
        hook_name=hook_name,
        model_name=model_name,
        revision=revision,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )
    return load_matryoshka(convert_release(request), device=device, dtype=dtype)


def convert_release(request: ReleaseRequest) -> Path:
    """The SAELens folder in the cache that holds the SAE asked for, converted now if it was not there.

    Raises:
        SAEError: as `load_release`.
    """
    chosen = locate(request)
    details = (_CONVERTER_VERSION, request.level_widths, request.hook_name, request.model_name)
    stem = PurePosixPath(chosen.name).with_suffix("").as_posix().replace("/", "--")
    target = cache_root(request.cache_dir) / "saes" / f"{stem}-{file_digest(chosen.path, *details)}"
    return build_once(target, lambda scratch: _convert(chosen.path, request, scratch), request.force_download)


def locate(request: ReleaseRequest) -> Candidate:
    """The file of the SAE asked for, downloaded if the release lies on the hub.

    Raises:
        SAEError: nothing or too much fits, or the hub cannot be reached.
    """
    root = Path(request.path_or_repo)
    if not root.exists():
        root = _download(request)
    return choose(
        find_candidates(root),
        str(request.path_or_repo),
        expansion=request.expansion,
        d_in=request.d_in,
        folder=request.folder,
    )


def _download(request: ReleaseRequest) -> Path:
    repo = str(request.path_or_repo)
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise SAEError(
            f"{repo} is neither a path that exists nor a hub repository (owner/name). Check the spelling."
        )
    fetch = functools.partial(
        snapshot_download,
        repo,
        revision=request.revision,
        local_files_only=request.local_files_only,
        force_download=request.force_download,
    )
    try:
        if request.local_files_only:
            return Path(fetch())
        names = HfApi().list_repo_files(repo, revision=request.revision)
        configs = _configs(Path(fetch(allow_patterns=["*.json"])), names)
        wanted = choose_by_name(names, configs, repo, expansion=request.expansion, folder=request.folder)
        parent = PurePosixPath(wanted).parent
        return Path(fetch(allow_patterns=[wanted, (parent / "*.json").as_posix()]))
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, SAEError):
            raise
        raise SAEError(
            f"The release {repo} could not be fetched from the Hugging Face hub: {error}. Download it "
            "elsewhere and pass its folder, or use local_files_only=True if it is in the hub's cache."
        ) from error


def _configs(root: Path, names: Sequence[str]) -> dict[str, Any]:
    configs: dict[str, Any] = {}
    for folder in {PurePosixPath(name).parent.as_posix() for name in weight_files(names)}:
        for path in sorted((root / folder).glob("*.json")):
            try:
                configs.setdefault(folder, {}).update(
                    {path.stem: json.loads(path.read_text(encoding="utf-8"))}
                )
            except ValueError:
                continue  # a broken JSON file is reported when its SAE is read
    return configs


def _convert(weights: Path, request: ReleaseRequest, target: Path) -> None:
    neighbour = weights.parent / SAE_CFG_FILENAME
    is_saelens = neighbour.is_file() and "architecture" in json.loads(neighbour.read_text(encoding="utf-8"))
    if is_saelens and request.level_widths is None:
        load_matryoshka(weights.parent).save_jumprelu(target)
        return
    raw = read_sae(weights)
    matryoshka_from_state_dict(
        _config_of(raw, weights, request),
        {name: getattr(raw, name).float() for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")},
        share=True,
    ).save_jumprelu(target)


def _config_of(raw: RawSAE, weights: Path, request: ReleaseRequest) -> MatryoshkaSAEConfig:
    d_in, d_sae = raw.W_enc.shape
    widths = raw.level_widths
    if request.level_widths is not None:
        widths = check_widths(request.level_widths, d_sae, "level_widths")
    if widths is None:
        raise SAEError(
            f"{weights} names no groups, neither in its state dict nor in a configuration beside it. Pass "
            f"level_widths=[...] if you know them, or level_widths=[{d_sae}] to load it as one level."
        )
    layer = config_value(raw.facts, "layer")
    hook_name = request.hook_name or (MAIRA2_HOOK if layer is None else f"blocks.{layer}.hook_resid_post")
    metadata = SAEMetadata(
        model_name=request.model_name or config_value(raw.facts, "lm_name") or MAIRA2_MODEL,
        hook_name=hook_name,
        release=raw.facts
        | {"source": str(request.path_or_repo), "hook_assumed": request.hook_name is None and layer is None},
    )
    metadata[METADATA_KEY] = {"level_widths": list(widths), "k": raw.k}
    return MatryoshkaSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        apply_b_dec_to_input=raw.apply_b_dec_to_input,
        metadata=metadata,
        matryoshka_widths=list(widths),
        k=raw.k,
    )

"""Load a published SAE: download it to a folder if it is on the hub, find it there, convert it once, open it.

    hub repository -> local folder -> the file asked for -> SAELens folder in the cache -> MatryoshkaSAE

The converted folder is an ordinary SAELens folder with the levels in its metadata, so that a hub id, a local release
and a converted SAE are read by the same code. What a release does not say, such as the hook point of its activations,
is a parameter here and recorded as assumed in the metadata. The cache is SAE_LENS_MAIRA_CACHE, else a folder in
HF_HOME, else in XDG_CACHE_HOME, else ~/.cache/sae-lens-maira.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.saes.sae import SAEMetadata

from sae_lens_maira.errors import SAEError
from sae_lens_maira.io import atomic_folder
from sae_lens_maira.sae.candidates import Candidate, choose, find_candidates, weight_files, worth_downloading
from sae_lens_maira.sae.config import MatryoshkaSAEConfig
from sae_lens_maira.sae.inference import MatryoshkaSAE, load_matryoshka, matryoshka_from_state_dict
from sae_lens_maira.sae.layouts import RawSAE, config_files, config_value, read_config, read_sae
from sae_lens_maira.sae.levels import METADATA_KEY, check_widths

MAIRA2_RELEASE = "microsoft/maira-2-sae"
MAIRA2_MODEL = "microsoft/maira-2"
MAIRA2_HOOK = "blocks.15.hook_resid_post"
"""The study names layer 15 and does not say how it counts; this is the 0-based output of the block."""
_CONVERTER_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """Which SAE of a release, and what to record where it does not say; the fields are those of `load_release`."""

    path_or_repo: str | Path = MAIRA2_RELEASE
    expansion: float | None = 4
    folder: str | None = None
    d_in: int | None = None
    level_widths: Sequence[int] | None = None
    dict_class: str | None = None
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
    device: str = "cpu",
    dtype: str = "float32",
    **request: Any,
) -> MatryoshkaSAE:
    """Load one SAE of a release, from a local path or from the Hugging Face hub.

    Args:
        path_or_repo: A weights file, a folder of SAEs, or a hub repository's name.
        expansion: Wanted d_sae / d_in; None for the only SAE.
        device: Device to load it to.
        dtype: Precision of the weights.
        **request: Fields of `ReleaseRequest`. `folder`: part of the path of the SAE's file, where several SAEs fit.
            `d_in`: width the SAE must have. `level_widths`: cumulative widths, for a release that does not name them.
            `dict_class`: dictionary_learning's class, for a file that names neither groups nor class. `hook_name`,
            `model_name`: for the metadata; the release's own, else MAIRA-2's if not given. `revision`: commit, tag or
            branch of a hub repository. `cache_dir`: folder of converted SAEs. `force_download`: download and convert
            again. `local_files_only`: do not ask the hub, use its cache.

    Raises:
        SAEError: Nothing or too much fits, or the file is damaged, unsafe or not understood.
    """
    return load_matryoshka(
        convert_release(_request(path_or_repo, expansion, request)), device=device, dtype=dtype
    )


def resolve_sae(name_or_folder: str | Path, expansion: float | None = 4, **request: Any) -> Path:
    """Folder that `load_matryoshka` opens: the one given if SAELens wrote it, else the converted release.

    Args:
        name_or_folder: A folder that SAELens wrote, or what `load_release` takes.
        expansion: As in `load_release`.
        **request: As in `load_release`.

    Raises:
        SAEError: As `load_release`.
    """
    folder = Path(name_or_folder)
    if (folder / SAE_CFG_FILENAME).is_file():
        given = sorted(name for name, value in request.items() if name != "hook_name" and value is not None)
        if given:
            raise SAEError(
                f"{', '.join(given)} apply to a release, and {folder} is a folder that SAELens wrote. Leave them out."
            )
        return folder
    return convert_release(_request(name_or_folder, expansion, request))


def _request(path_or_repo: str | Path, expansion: float | None, others: dict[str, Any]) -> ReleaseRequest:
    known = {field.name for field in fields(ReleaseRequest)} - {"path_or_repo", "expansion"}
    if not set(others) <= known:
        raise SAEError(
            f"There is no argument {', '.join(sorted(set(others) - known))} for a release; it has expansion, "
            f"{', '.join(sorted(known))}."
        )
    return ReleaseRequest(path_or_repo=path_or_repo, expansion=expansion, **others)


def convert_release(request: ReleaseRequest) -> Path:
    """The SAELens folder in the cache that holds the requested SAE, converted now if it was not there.

    Raises:
        SAEError: As `load_release`.
    """
    chosen = find_sae(request)
    details = (
        _CONVERTER_VERSION,
        request.level_widths,
        request.dict_class,
        request.hook_name,
        request.model_name,
    )
    stem = PurePosixPath(chosen.name).with_suffix("").as_posix().replace("/", "--")
    target = cache_root(request.cache_dir) / "saes" / f"{stem}-{_digest(chosen.path, *details)}"
    return _build_once(target, lambda draft: _convert(chosen.path, request, draft), request.force_download)


def find_sae(request: ReleaseRequest) -> Candidate:
    """The file of the requested SAE, downloaded if the release is on the hub.

    Raises:
        SAEError: Nothing or too much fits, or the hub cannot be reached.
    """
    root = Path(request.path_or_repo)

    def choice(folder: Path) -> Candidate:
        return choose(
            find_candidates(folder),
            str(request.path_or_repo),
            expansion=request.expansion,
            d_in=request.d_in,
            folder=request.folder,
        )

    return choice(root) if root.exists() else _from_hub(request, choice)


def cache_root(override: str | Path | None = None) -> Path:
    """The cache's folder; it need not exist yet."""
    if override is not None:
        return Path(override)
    if os.environ.get("SAE_LENS_MAIRA_CACHE"):
        return Path(os.environ["SAE_LENS_MAIRA_CACHE"])
    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / "sae-lens-maira"
    return Path.home() / ".cache" / "sae-lens-maira"


def _from_hub(request: ReleaseRequest, choice: Callable[[Path], Candidate]) -> Candidate:
    """Download the small JSON files, then the weights that may fit, and choose among those as in a local folder."""
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
            return choice(Path(fetch()))
        names = HfApi().list_repo_files(repo, revision=request.revision)
        small = [name for name in names if name.endswith(".json") and "interpret" not in name.lower()]
        root = Path(fetch(allow_patterns=small)) if small else None
        all_weights = weight_files(names)
        configs = {} if root is None else {name: _config_or_nothing(root / name) for name in all_weights}
        wanted = worth_downloading(
            names, configs, expansion=request.expansion, d_in=request.d_in, folder=request.folder
        )
        if wanted:
            try:
                return choice(Path(fetch(allow_patterns=[*wanted, *small])))
            except SAEError:
                if set(wanted) == set(all_weights):
                    raise
        # Names and configurations were wrong, or nothing fits: shapes decide, and the message lists all there is.
        return choice(Path(fetch(allow_patterns=[*all_weights, *small])))
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, SAEError):
            raise
        raise SAEError(
            f"The release {repo} could not be fetched from the Hugging Face hub: {error}. Download it "
            "elsewhere and pass its folder, or use local_files_only=True if it is in the hub's cache."
        ) from error


def _config_or_nothing(weights: Path) -> dict[str, Any]:
    try:
        return read_config(weights)
    except SAEError:
        return {}  # a broken JSON file is reported when its SAE is read


def _convert(weights: Path, request: ReleaseRequest, target: Path) -> None:
    neighbour = weights.parent / SAE_CFG_FILENAME
    is_saelens = neighbour.is_file() and "architecture" in json.loads(neighbour.read_text(encoding="utf-8"))
    if is_saelens and request.level_widths is None:
        load_matryoshka(weights.parent).save_model(target)
        return
    raw = read_sae(weights, request.dict_class)
    matryoshka_from_state_dict(
        _config_of(raw, weights, request),
        {name: getattr(raw, name).float() for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")},
        share=True,
    ).save_model(target)


def _config_of(raw: RawSAE, weights: Path, request: ReleaseRequest) -> MatryoshkaSAEConfig:
    d_in, d_sae = raw.W_enc.shape
    widths = raw.level_widths
    if request.level_widths is not None:
        given = check_widths(request.level_widths, d_sae, "level_widths")
        if widths is not None and widths != given:
            raise SAEError(
                f"{weights} has levels of widths {list(widths)}, and level_widths={list(given)} was given. Leave "
                "level_widths out, or give those of the file."
            )
        widths = given
    if widths is None:
        raise SAEError(
            f"{weights} names no groups, neither in its state dict nor in a configuration next to it. Pass "
            f"level_widths=[...] to load_release if you know them, or level_widths=[{d_sae}] to load it as one level; "
            f'for a command write {weights.parent / "config.json"} with {{"level_widths": [{d_sae}]}}.'
        )
    hook_name, source = (
        (request.hook_name, "given") if request.hook_name else hook_of(raw.facts, str(weights))
    )
    metadata = SAEMetadata(
        model_name=request.model_name or config_value(raw.facts, "lm_name") or MAIRA2_MODEL,
        hook_name=hook_name,
        release=raw.facts
        | {
            "source": str(request.path_or_repo),
            "hook_source": source,
            "hook_assumed": "assumed" in source,
        },
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


def hook_of(facts: dict[str, Any], where: str) -> tuple[str, str]:
    """Hook point that a configuration states, and how far that is an assumption.

    A layer number does not say how it counts: as the 0-based output of a block, or as `hidden_states[n]`, which is the
    output of block n - 1. The first is assumed and recorded; `sae-lens-maira locate` can check it.

    Raises:
        SAEError: The configuration names a submodule that is not a hook point known here.
    """
    layer = config_value(facts, "layer")
    submodule = str(config_value(facts, "submodule_name", "hook_name", "hook_point") or "")
    if re.fullmatch(r"blocks\.\d+\.[a-z_.]+", submodule):
        return submodule, "named in the configuration"
    if not submodule and layer is None:
        return MAIRA2_HOOK, "MAIRA-2's published layer, counted as the 0-based output of the block (assumed)"
    places = {
        "resid_post": "hook_resid_post",
        "mlp_out": "hook_mlp_out",
        "attn_out": "hook_attn_out",
        "resid_pre": "hook_resid_pre",
        "resid_mid": "hook_resid_mid",
    }
    place = next((hook for name, hook in places.items() if name in submodule.lower()), None)
    number = re.search(r"layer_?(\d+)", submodule)
    layer = layer if layer is not None else (number[1] if number else None)
    if (submodule and place is None) or layer is None:
        raise SAEError(
            f"The configuration of {where} names the submodule {submodule!r} and the layer {layer}; neither is a hook "
            "point known here. Pass hook_name=, for example blocks.15.hook_resid_post."
        )
    return (
        f"blocks.{layer}.{place or 'hook_resid_post'}",
        "layer number of the configuration, counted as the 0-based output of the block (assumed)",
    )


def _digest(path: Path, *details: object) -> str:
    """Short name for a file's present content and a conversion's settings, without reading the file.

    A hub snapshot is a link to a file named by its content, so the resolved path, size and time identify it.
    """
    texts = [str(part) for part in details]
    for file in (path, *config_files(path.name, sorted(path.parent.glob("*.json")))):
        real = file.resolve()
        stat = real.stat()
        texts += [str(real), str(stat.st_size), str(stat.st_mtime_ns)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _build_once(folder: Path, build: Callable[[Path], None], rebuild: bool = False) -> Path:
    """The folder, built by `build` if it is not there. Interrupted builds leave nothing under its name.

    Raises:
        SAEError: The cache cannot be written to.
    """
    if folder.is_dir() and not rebuild:
        return folder
    with ExitStack() as stack:
        try:
            draft = stack.enter_context(atomic_folder(folder, "replace" if rebuild else "keep"))
        except OSError as error:
            raise SAEError(
                f"The cache {folder.parent} cannot be written to: {error}. Pass cache_dir= or set "
                "SAE_LENS_MAIRA_CACHE."
            ) from error
        build(draft)
    return folder

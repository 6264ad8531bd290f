"""Load models, SAEs and studies by name: "phantom", a folder, a hub id, a table.

    m = load("phantom")                          # or "microsoft/maira-2", or a folder
    sae = load_sae("phantom-image")              # or a folder, a release, a SAELens name
    studies = read_studies("studies.parquet")    # or phantom_studies(200)

The command line, the quickstart, recipes and notebooks load everything with this module. The device "auto" is the GPU
of the local rank under torchrun, if there is one. torch is imported by the functions, not by the module.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sae_lens_maira.errors import ConfigError, SAEError
from sae_lens_maira.ranks import local_rank

if TYPE_CHECKING:
    import torch

    from sae_lens_maira.interactive import InteractiveMaira2
    from sae_lens_maira.maira2 import Maira2, OutputHead
    from sae_lens_maira.sae import MatryoshkaSAE
    from sae_lens_maira.studies import FindingReader, Study, StudyTable

ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(ModelDtype)
PHANTOM_SAES = ("phantom-image", "phantom-text")


def load(
    name: str | Path = "phantom", device: str = "auto", dtype: str = "auto", **keywords: Any
) -> "InteractiveMaira2":
    """Load a model for reading and steering.

    The weights do not require gradients, so that calls keep no autograd graph; `m.model.requires_grad_(True)` changes
    this.

    Args:
        name: "phantom" (ships with the package), a hub id such as "microsoft/maira-2", or a folder.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is a GPU if there is one.
        dtype: "float32", "bfloat16" or "float16"; "auto" is float32 for the phantom and bfloat16 for others.
        **keywords: Further arguments of `load_maira2`, for instance `attn_implementation`, `revision` or
            `device_map`.

    Returns:
        A `HookedMaira2` with `top_latents`, `steer` and `attribute`.

    Raises:
        ConfigError: An unknown dtype, device or keyword.
        CheckpointError: The folder or hub repository is not a complete MAIRA-2 checkpoint.
    """
    from sae_lens_maira.interactive import InteractiveMaira2

    maira = named_model(name, dtype=dtype, device=device, **keywords)
    maira.model.requires_grad_(False)
    return InteractiveMaira2(maira, model_name=str(name))


def named_model(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    hooks: "Sequence[str] | None" = None,
    **keywords: Any,
) -> "Maira2":
    """Load a model and its processor, without hooks.

    Args:
        model: "phantom", a folder or a hub id.
        dtype: "float32", "bfloat16" or "float16"; "auto" is float32 for the phantom and bfloat16 for others.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is a GPU if there is one.
        hooks: Hook points that will be read, if nothing else of the model is needed: decoder layers after the last of
            them are not loaded. None loads the whole model.
        **keywords: Further arguments of `load_maira2`.

    Raises:
        ConfigError: An unknown dtype, device or keyword.
        CheckpointError: The folder or hub repository is not a complete MAIRA-2 checkpoint.
        HookError: An unknown hook point.
    """
    from sae_lens_maira.hooks import PointTable
    from sae_lens_maira.maira2 import load_maira2
    from sae_lens_maira.maira2.loading import load_config

    kind = _dtype_of(model, dtype)
    if "device_map" not in keywords:
        keywords["device"] = device_of(device)
    if hooks is not None:
        hub = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        points = PointTable(load_config(model, **{key: keywords[key] for key in hub if key in keywords}))
        stops = [points.resolve(name).stop for name in hooks]
        if all(stop is not None for stop in stops):
            keywords["layers"] = max(1, *(stop or 0 for stop in stops))
    return load_maira2(model, dtype=kind, **keywords)


def output_head(model: str | Path, *, dtype: str = "auto", device: str = "auto", **hub: Any) -> "OutputHead":
    """Load tokenizer, final norm and `lm_head` of a model, without the rest of it.

    Args:
        model: "phantom", a folder or a hub id.
        dtype: As in `named_model`.
        device: As in `named_model`.
        **hub: Further arguments of `load_output_head`.

    Raises:
        ConfigError: An unknown dtype or device.
        CheckpointError: The folder or hub repository is not a complete MAIRA-2 checkpoint.
    """
    from sae_lens_maira.maira2 import load_output_head

    return load_output_head(model, _dtype_of(model, dtype), device_of(device), **hub)


def _dtype_of(model: str | Path, dtype: str) -> "torch.dtype":
    import torch

    from sae_lens_maira.maira2.loading import dtype_of

    if dtype not in DTYPES:
        raise ConfigError(f"The dtype of the model was {dtype!r}; use {', '.join(DTYPES)}.")
    return dtype_of(model) if dtype == "auto" else getattr(torch, dtype)


def device_of(name: str) -> str:
    """Resolve a device name; "auto" is a GPU if there is one, a different one for each rank of a machine.

    Raises:
        ConfigError: torch has no such device, or this machine does not have it.
    """
    import torch

    from sae_lens_maira.maira2.loading import check_device

    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{local_rank() % torch.cuda.device_count()}"
    if name == "auto":
        return "cpu"
    check_device(name)
    return name


def label(name: str | Path) -> str:
    """Name of a model or an SAE for records and pages; for a local folder, only its last part."""
    path = Path(name)
    return path.resolve().name if path.is_absolute() or path.exists() else str(name)


def load_sae(
    name: str | Path,
    *,
    hook_name: str | None = None,
    p99: "torch.Tensor | None" = None,
    records: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    **release: Any,
) -> "MatryoshkaSAE":
    """Load an SAE with its hook point, the p99 of its latents and their names.

    Every command that takes an SAE uses this function. Damaged, truncated, inconsistent or NaN weights are refused.

    Args:
        name: A folder that SAELens wrote, a release (folder, weights file or hub id), a SAELens name
            "release/sae_id", or "phantom-image" / "phantom-text" (ship with the package).
        hook_name: Hook point that replaces the one in the SAE's metadata.
        p99: `(d_sae,)` 99th percentile of each latent over the rows where it is active; replaces the recorded one.
        records: Folder of latent records with p99 and names; None for the subfolder `records` of the SAE, if any.
        device: As in `load`.
        dtype: Precision of the weights.
        **release: For a release, arguments of `load_release`: `expansion`, `folder`, `level_widths`, ...

    Returns:
        The SAE, without gradients. `sae.p99` is `(d_sae,)` or None, `sae.latent_names` maps a latent to its name,
        `sae.records` is the `RecordSet` or None, and `sae.source` is the name it was loaded by. A JumpReLU SAE without
        levels has one; SAEs of other architectures are returned as SAELens' own classes.

    Raises:
        SAEError: There is no such SAE, it cannot be used, or it names no hook point.
        RecordError: The records cannot be read, or belong to another SAE.
    """
    import torch

    from sae_lens_maira.interactive import describe_sae

    if dtype not in DTYPES[1:]:
        raise ConfigError(f"The dtype of the SAE was {dtype!r}; use {', '.join(DTYPES[1:])}.")
    if hook_name is not None and not _is_saelens_name(str(name)):
        release = release | {"hook_name": hook_name}
    sae, folder = _sae_of(name, device, release)
    if records is None and folder is not None and (folder / "records").is_dir():
        records = folder / "records"
    # Records are compared with the saved weights, before a change of precision.
    described = describe_sae(sae, hook_name, p99, None if records is None else Path(records))
    loaded: Any = described.to(dtype=getattr(torch, dtype))
    loaded.source = str(name)
    return loaded


def load_sae_weights(name: str | Path, device: str = "auto") -> "MatryoshkaSAE":
    """Load an SAE without p99 and names; it need not have a hook point.

    Args:
        name: As in `load_sae`.
        device: As in `load`.

    Raises:
        SAEError: There is no such SAE, or it cannot be used.
    """
    return _sae_of(name, device, {})[0].requires_grad_(False)


def _sae_of(name: str | Path, device: str, release: dict[str, Any]) -> "tuple[MatryoshkaSAE, Path | None]":
    """Load an SAE with its levels; also return its folder, or None for an SAE that SAELens has by name."""
    from sae_lens_maira.sae import open_sae, resolve_sae
    from sae_lens_maira.sae.inference import warn_if_never_set

    place = device_of(device)
    if _is_saelens_name(str(name)):
        from sae_lens import SAE

        release_name, _, sae_id = str(name).partition("/")
        try:
            pretrained: SAE[Any] = SAE.from_pretrained(release_name, sae_id, device=place)
        except ValueError as error:
            raise SAEError(f"SAELens could not load {name}: {error}") from error
        warn_if_never_set(pretrained.state_dict(), name)
        return _with_levels(pretrained), None
    folder = _shipped_sae(str(name)) if str(name) in PHANTOM_SAES else resolve_sae(name, **release)
    return _with_levels(open_sae(folder, device=place)), folder


def read_studies(
    path: str | Path, root: str | Path | None = None, split: str | None = None
) -> "Sequence[Study]":
    """Read a table of studies that `sae-lens-maira studies import` wrote.

    Args:
        path: Parquet or CSV file.
        root: Folder that image paths are relative to; None for the table's folder.
        split: Keep only this split, for instance "train".

    Returns:
        The studies; images are opened when they are used.

    Raises:
        StudyError: The table cannot be read, or no study is in the split.
    """
    from sae_lens_maira.errors import StudyError
    from sae_lens_maira.studies import read_table

    table: StudyTable = read_table(path, root)
    chosen = (table if split is None else table.where(split=split)).studies
    if not len(chosen):
        raise StudyError(
            f"{path} has {len(table):,} studies, none of them in the split {split}. `studies show` counts studies by "
            "split; name one of these."
        )
    return chosen


def phantom_studies(n: int, seed: int = 80_000, **keywords: Any) -> "list[Study]":
    """Generate synthetic studies with known findings.

    Args:
        n: Number of studies.
        seed: Random seed; the shipped phantom was trained on seed 0 and its SAEs on seed 20,000.
        **keywords: Further arguments of `generate_studies`.
    """
    from sae_lens_maira.phantom import generate_studies

    return generate_studies(n, seed, **keywords)


def chosen_studies(
    n: int,
    seed: int,
    side: int,
    table: str | Path | None = None,
    root: str | Path | None = None,
    split: str | None = None,
) -> "Sequence[Study]":
    """First studies of a table, or phantom studies if no table is given.

    Args:
        n: Number of studies.
        seed: Random seed of the phantom studies.
        side: Side of the phantom's images in pixels; use `processor.recipe.crop` of the model.
        table: As `path` in `read_studies`.
        root: As in `read_studies`.
        split: As in `read_studies`.
    """
    return phantom_studies(n, seed, size=side) if table is None else read_studies(table, root, split)[:n]


def finding_reader(
    studies: "Sequence[Study]", choice: Literal["auto", "phantom", "rules"] = "auto"
) -> "FindingReader":
    """Choose the reader of findings in reports that fits these studies.

    Args:
        studies: Studies whose reports will be read.
        choice: "phantom" for the phantom's language, "rules" for rule labels of free text; "auto" is "phantom" if all
            studies are synthetic and have a truth in the phantom's vocabulary, else "rules".

    Returns:
        Reader of findings.

    Raises:
        ConfigError: There is no such reader.
    """
    from sae_lens_maira.phantom import FINDING_KEYS, phantom_reader
    from sae_lens_maira.studies import Licence, rule_reader

    if choice not in ("auto", "phantom", "rules"):
        raise ConfigError(f"The reader was {choice!r}; use auto, phantom or rules.")
    if choice == "auto":
        keys = set(FINDING_KEYS)
        synthetic = all(
            s.licence is Licence.SYNTHETIC and s.truth is not None and s.present_keys <= keys for s in studies
        )
        choice = "phantom" if len(studies) and synthetic else "rules"
    return phantom_reader() if choice == "phantom" else rule_reader()


def _with_levels(sae: Any) -> "MatryoshkaSAE":
    """Return the SAE with its levels, one if it has none; architectures other than JumpReLU are unchanged."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE

    from sae_lens_maira.sae import load_matryoshka
    from sae_lens_maira.sae.levels import METADATA_KEY, widths_from_metadata

    if isinstance(sae, JumpReLUSAE) and widths_from_metadata(sae.cfg.metadata, sae.cfg.d_sae) is None:
        sae.cfg.metadata[METADATA_KEY] = {"level_widths": [sae.cfg.d_sae]}
    readable = isinstance(sae, JumpReLUSAE) or hasattr(sae.cfg, "decoder_init_norm")
    levelled: Any = load_matryoshka(sae) if readable else sae
    return levelled


def _shipped_sae(name: str) -> Path:
    """Folder of an SAE that ships with the package."""
    from sae_lens_maira.phantom import phantom_path

    folder = phantom_path().parent / "saes" / name.removeprefix("phantom-")
    if not (folder / "cfg.json").is_file():
        raise SAEError(
            f"{folder} does not exist, so this installation of the package is incomplete. Install it again, or train "
            "the SAE with `python recipes/train_phantom_saes.py --config recipes/train_phantom_saes.yaml`."
        )
    return folder


def _is_saelens_name(name: str) -> bool:
    """Whether the part before the first slash is a release of SAELens."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, slash, _ = name.partition("/")
    return bool(slash) and not Path(name).exists() and release in get_pretrained_saes_directory()

"""Find the SAE that was requested among the files of a release.

A release is a tree of folders with one or more SAEs each; how its folders are named is not known beforehand. The shapes
in the files decide: expansion = d_sae / d_in. Where more than one SAE fits, the error lists them. For a release on the
hub, `worth_downloading` leaves out the files whose small JSON configuration or name says another expansion.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.layouts import WEIGHT_SUFFIXES, bare_key, config_value, read_state

# Where one folder holds several weight files, the first of these that exists is the SAE.
_PREFERRED = ("sae_weights.safetensors", "ae.safetensors", "sae.safetensors", "ae.pt", "sae.pt")
# Files with a weights suffix that are something else.
_NOT_AN_SAE = ("sparsity", "optimizer", "trainer_state", "activation_whitening", "tokenizer")


@dataclass(frozen=True)
class Candidate:
    """A weights file in a release, with its shape as far as it can be read."""

    path: Path
    name: str
    """Path relative to the release's root."""
    d_in: int | None = None
    d_sae: int | None = None
    problem: SAEError | None = None
    """Why the file could not be read."""

    @property
    def expansion(self) -> float | None:
        """d_sae / d_in, None for an unreadable file."""
        return self.d_sae / self.d_in if self.d_in and self.d_sae else None

    def __str__(self) -> str:
        return f"{self.name} ({f'{self.d_in} -> {self.d_sae}' if self.d_sae else 'unreadable'})"


def weight_files(names: Sequence[str]) -> list[str]:
    """One weights file per folder of posix paths; checkpoints of a run only where nothing else is there."""
    by_folder: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix in WEIGHT_SUFFIXES and not path.stem.startswith(_NOT_AN_SAE):
            by_folder.setdefault(str(path.parent), []).append(name)
    chosen: list[str] = []
    for files in by_folder.values():
        preferred = [name for want in _PREFERRED for name in files if PurePosixPath(name).name == want]
        chosen += preferred[:1] or files
    final = [name for name in chosen if "checkpoints" not in PurePosixPath(name).parts]
    return final or chosen


def find_candidates(root: Path) -> list[Candidate]:
    """Every SAE below a folder, or the one that a file is. Shapes are read without loading the weights."""
    if root.is_file():
        return [_measure(root, root.name)]
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return [_measure(root / name, name) for name in weight_files(names)]


def choose(
    candidates: Sequence[Candidate],
    where: str,
    *,
    expansion: float | None,
    d_in: int | None,
    folder: str | None,
) -> Candidate:
    """The one candidate that fits.

    Args:
        candidates: What `find_candidates` found.
        where: The release, for errors.
        expansion: Wanted d_sae / d_in, None for any.
        d_in: Wanted d_in, None for any.
        folder: Folder of the candidate, or a part of its path; None for any.

    Raises:
        SAEError: None fits or more than one does; the message lists what is there.
    """
    listing = "; ".join(str(candidate) for candidate in candidates[:12])
    below = set(_below([c.name for c in candidates], folder))
    fitting = [c for c in candidates if c.name in below]
    readable = [c for c in fitting if c.problem is None]
    if not candidates:
        raise SAEError(
            f"{where} holds no weights file. Give the folder that `sae-lens-maira train` wrote, or a release."
        )
    if not readable:
        broken = next((c.problem for c in fitting if c.problem is not None), None)
        if broken is not None:
            raise broken
        raise SAEError(
            f"{where} holds {listing}; none of them is in folder={folder!r}. Pass a folder from that list."
        )
    matching = [c for c in readable if d_in is None or c.d_in == d_in]
    if not matching:
        raise SAEError(
            f"{where} holds {listing}, but d_in={d_in} was requested. An SAE fits one model's width only: "
            "check the model, or the hook point."
        )
    matching = [c for c in matching if expansion is None or c.expansion == expansion]
    if not matching:
        raise SAEError(
            f"{where} holds {listing}, none with expansion {expansion} (d_sae / d_in). Ask for one of those."
        )
    if len(matching) > 1:
        raise SAEError(
            f"{where} holds several SAEs that fit: {'; '.join(map(str, matching[:12]))}. "
            "Pass folder=, a part of the path of the one you want."
        )
    return matching[0]


def worth_downloading(
    names: Sequence[str],
    configs: Mapping[str, Mapping[str, Any]],
    *,
    expansion: float | None,
    d_in: int | None,
    folder: str | None,
) -> list[str]:
    """Weight files that may be the requested SAE, judged without their shapes.

    Args:
        names: All files of the repository.
        configs: Weights file -> its parsed configuration, where it has one.
        expansion: Wanted d_sae / d_in, None for any.
        d_in: Wanted d_in, with which a width in a name tells the expansion.
        folder: Folder of the file, or a part of its path; None for any.
    """
    files = _below(weight_files(names), folder)
    if expansion is None:
        return files
    stated = {name: _stated_expansion(name, configs.get(name, {}), d_in) for name in files}
    certain = [name for name in files if stated[name] == expansion]
    return certain or [name for name in files if stated[name] is None]


def _below(names: Sequence[str], folder: str | None) -> list[str]:
    """Names inside the folder; where there is no such folder, names that contain it."""
    if folder is None:
        return list(names)
    exact = [name for name in names if name.startswith(f"{folder.strip('/')}/")]
    return exact or [name for name in names if folder.strip("/") in name]


def _stated_expansion(name: str, config: Mapping[str, Any], d_in: int | None) -> float | None:
    """Expansion that a configuration, or else a name, states; None where neither does."""
    width_in = config_value(config, "activation_dim", "d_in", "act_size")
    width = config_value(config, "dict_size", "d_sae")
    if width_in and width:
        return float(width) / float(width_in)
    stated = config_value(config, "expansion_factor")
    if stated is not None:
        return float(stated)
    lowered = PurePosixPath(name).with_suffix("").as_posix().lower()
    number = re.findall(r"(?:ef|exp|expansion(?:_factor)?|factor|(?<![a-z])x)[-_ =]*(\d+)(?![\d.])", lowered)
    number = number or re.findall(r"(?<![\d.])(\d+)x(?![a-z0-9])", lowered)
    if number:
        return float(number[-1])
    width = re.findall(r"(?:dict|width|d_sae|dim|size)[-_ =]*(\d+)(?![\d.])", lowered)
    return float(width[-1]) / d_in if width and d_in else None


def _measure(path: Path, name: str) -> Candidate:
    try:
        d_in, d_sae = _shape(path)
    except SAEError as error:
        return Candidate(path, name, problem=error)
    return Candidate(path, name, d_in, d_sae)


def _shape(path: Path) -> tuple[int, int]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                sizes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except Exception:
            read_state(path)  # says what is wrong with the file
            raise
    else:
        state = read_state(path)
        for wrapper in ("ae", "state_dict", "model_state_dict"):
            state = state[wrapper] if isinstance(state.get(wrapper), Mapping) else state
        sizes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, torch.Tensor)}
    biases = {bare_key(key): size for key, size in sizes.items()}
    d_sae = next((biases[key] for key in ("b_enc", "encoder.bias", "encoder_bias") if key in biases), None)
    matrices = (size for size in sizes.values() if len(size) == 2)
    matrix = max(matrices, key=lambda size: size[0] * size[1], default=None)
    if d_sae is None or matrix is None or d_sae[0] not in matrix:
        raise SAEError(
            f"{path} holds "
            f"{', '.join(f'{key} {size}' for key, size in list(sizes.items())[:12]) or 'no tensors'}; "
            "an encoder's bias and matrix were expected."
        )
    return (matrix[0] if matrix[1] == d_sae[0] else matrix[1]), d_sae[0]

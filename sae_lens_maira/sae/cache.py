"""Where converted SAEs are kept, and how a conversion gets there once.

The place is SAE_LENS_MAIRA_CACHE, else a folder in HF_HOME, else in XDG_CACHE_HOME, else
~/.cache/sae-lens-maira. This module knows nothing about what is kept.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from sae_lens_maira.errors import SAEError
from sae_lens_maira.io import atomic_folder


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


def file_digest(path: Path, *details: object) -> str:
    """Short name for a file's present content and a conversion's settings, without reading the file.

    A hub snapshot is a link to a file named by its content, so the resolved path, size and time identify it.
    """
    real = path.resolve()
    stat = real.stat()
    text = "\n".join(map(str, (real, stat.st_size, stat.st_mtime_ns, *details)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_once(folder: Path, build: Callable[[Path], None], rebuild: bool = False) -> Path:
    """The folder, built by `build` if it is not there. Interrupted builds leave nothing under its name.

    Raises:
        SAEError: the place cannot be written to.
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

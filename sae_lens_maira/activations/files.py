"""Files that are whole or absent: written aside, forced to disk, then renamed into place.

A full disk becomes a `StoreError` and leaves nothing half-written behind. It knows nothing about activations.
"""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sae_lens_maira.errors import StoreError

# A quota and a limit on file sizes mean the same to a user as a full disk.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, content: bytes) -> dict[str, Any]:
    """Write `content` so that `path` holds all of it or is as before.

    Returns:
        {"name", "bytes", "sha256"} of the file.

    Raises:
        StoreError: the disk is full.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        if error.errno in NO_ROOM:
            raise StoreError(
                f"No room to write {path} ({len(content):,} bytes): {error.strerror}. Everything committed before is "
                "intact; free some space and run the same command again, it continues where it stopped."
            ) from error
        raise
    return {"name": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_json(path: Path, content: Any) -> dict[str, Any]:
    """`write_whole` of JSON."""
    return write_whole(path, json.dumps(content, indent=1, sort_keys=True).encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        StoreError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read as JSON ({error}). If this folder is an activation store, harvest into it again or "
            "restore the file from a copy."
        ) from error


def sha256_of(path: Path) -> str:
    """Hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files that a manifest can vouch for: written whole, with their size and SHA-256, and JSON read back.

`whole` writes them; a full disk is its `DiskError`, which is a `StoreError`. It knows nothing about activations.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from sae_lens_maira.errors import StoreError
from sae_lens_maira.whole import write_whole


def write_listed(path: Path, content: bytes) -> dict[str, Any]:
    """Write `content` so that `path` holds all of it or is as before.

    Returns:
        {"name", "bytes", "sha256"} of the file.

    Raises:
        DiskError: the disk is full.
    """
    write_whole(path, content)
    return {"name": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_json(path: Path, content: Any) -> dict[str, Any]:
    """`write_listed` of JSON."""
    return write_listed(path, json.dumps(content, indent=1, sort_keys=True).encode())


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

"""Checksums of files that this package writes, so that a damaged file is reported when it is read.

    checksums.json   XXH3-128 of the files of a folder: SAEs, checkpoints, dashboards, exports
    "checksum"       XXH3-128 of the rest of a JSON object: descriptions, manifest entries, lines of JSON lines files
    Parquet          CRC-32 of every page, and XXH3-128 of the names of the columns in the metadata

A file without a checksum, because another program wrote it or a person edited it, is read without a check.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sae_lens_maira.io import atomic_file, atomic_folder, atomic_write, digest_of

if TYPE_CHECKING:
    import pandas as pd

SUMS = "checksums.json"
KEY = "checksum"
EDITED = f"If you changed it on purpose, remove its {KEY!r}"
"""Advice in error messages about a JSON object that a person may have edited."""


def write_sums(folder: Path) -> None:
    """Write `checksums.json` for all files of a folder and its subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    sums = {path.relative_to(folder).as_posix(): _sum_of(path) for path in files}
    atomic_write(folder / SUMS, json.dumps(sums, indent=1))


def damaged_files(folder: Path) -> list[str]:
    """List files of `checksums.json` that are missing or changed; empty for a folder without checksums."""
    path = folder / SUMS
    if not path.exists():
        return []
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
        return [n for n, s in sums.items() if not (folder / n).is_file() or _sum_of(folder / n) != s]
    except (OSError, ValueError, AttributeError, RecursionError):
        return [SUMS]


def unlisted_files(folder: Path) -> list[str]:
    """List files below a folder that are not in its `checksums.json`; all of them if it cannot be read."""
    try:
        listed = {SUMS, *json.loads((folder / SUMS).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, RecursionError):
        listed = set()
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name not in listed)


def rewrite_file(path: Path, content: str) -> None:
    """Replace a file of a folder, and its checksum if the folder has checksums."""
    atomic_write(path, content)
    sums = path.parent / SUMS
    if sums.exists():
        known = json.loads(sums.read_text(encoding="utf-8"))
        atomic_write(sums, json.dumps(known | {path.name: _sum_of(path)}, indent=1))


@contextmanager
def files_with_sums(folder: Path | str) -> Iterator[Path]:
    """Yield a draft folder; at the end its files replace those of the same names in `folder`, with checksums.

    JSON files are replaced after the other files, and the checksums last. A process that is killed in between leaves a
    folder that is incomplete or refused.

    Args:
        folder: Folder to write to; created if missing. Its other files are kept.
    """
    folder = Path(folder)
    staged = folder / ".saving"
    with atomic_folder(staged, "replace") as draft:
        yield draft
        write_sums(draft)
    for path in sorted(staged.iterdir(), key=lambda path: (path.name == SUMS, path.suffix == ".json")):
        os.replace(path, folder / path.name)
    staged.rmdir()


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Add the checksum of its entries to a JSON object."""
    return content | {KEY: _sum_of_json(content)}


def take_checksum(content: dict[str, Any]) -> bool:
    """Remove the checksum from a JSON object; return whether it matches the other entries."""
    found = content.pop(KEY, None)
    return found is None or found == _sum_of_json(content)


def write_parquet(frame: "pd.DataFrame", path: Path) -> None:
    """Write a table as Parquet with checksums, atomically."""
    named = frame.copy(deep=False)
    named.attrs = {KEY: _sum_of_json({"columns": list(map(str, frame.columns))})}
    with atomic_file(path) as draft:
        named.to_parquet(draft, write_page_checksum=True)


def read_parquet(path: Path) -> "pd.DataFrame":
    """Read a table that `write_parquet` or another program wrote.

    Raises:
        ValueError: The file cannot be read, or its checksums are wrong.
    """
    import pandas as pd

    try:
        frame = pd.read_parquet(path, page_checksum_verification=True)
    except Exception as error:  # pandas and pyarrow raise many types for a damaged file
        raise ValueError(str(error) or type(error).__name__) from error
    found = frame.attrs.pop(KEY, None)
    if found is not None and found != _sum_of_json({"columns": list(map(str, frame.columns))}):
        raise ValueError("the names of its columns have changed")
    return frame


def _sum_of_json(content: dict[str, Any]) -> str:
    # JSON converts keys that are numbers to text.
    plain = json.loads(json.dumps(content))
    return xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())


def _sum_of(path: Path) -> str:
    return digest_of(path, xxhash.xxh3_128())


__all__ = [
    "EDITED",
    "SUMS",
    "damaged_files",
    "files_with_sums",
    "read_parquet",
    "rewrite_file",
    "take_checksum",
    "with_checksum",
    "write_parquet",
    "write_sums",
]

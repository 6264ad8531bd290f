"""Atomic writes (temporary file or folder, then rename), locks of work folders, JSON, CSV and hashes.

    draft       <name>.<host>-<process>.partial in the same folder; the draft of a running process is never touched
    success     one rename, which is atomic on a file system
    failure     the draft is removed and the target is unchanged; a full disk gives a DiskError

A killed process leaves at most its draft, which the next write to the same target on this machine removes.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_lens_maira.errors import DiskError, LockError, StoreError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_HOST = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
# A quota and a limit on file sizes are reported like a full disk.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Messages of torch, safetensors and numpy for a full disk, which are not OSErrors with these numbers.
_WRITE_FAILED = re.compile(
    r"PytorchStreamWriter failed|basic_ios::clear: iostream error|unexpected pos \d+ vs"
    r"|os error (?:28|122|27)\b|Os \{ code: (?:28|122|27),|\d+ requested and \d+ written"
)


@contextmanager
def atomic_file(path: Path | str, *, sync: bool = True) -> Iterator[Path]:
    """Yield a draft file, which is renamed to `path` at the end of the block; an existing `path` is replaced.

    Args:
        path: The file; its folder exists. A link stays, and the file that it leads to is replaced.
        sync: Force the bytes to disk before the rename, so that the file is complete also after a power cut.

    Raises:
        DiskError: The disk is full.
    """
    path = _target(path)
    draft = _draft(path)
    if sync:
        _remove_abandoned(path)
    try:
        yield draft
        if sync:
            _sync(draft)
        draft.replace(path)
        if sync:
            _sync(path.parent)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        _say_if_full(error, path)
        raise


def atomic_write(path: Path | str, content: bytes | str, *, sync: bool = True) -> None:
    """Write bytes, or text as UTF-8, with `atomic_file`.

    Raises:
        DiskError: The disk is full.
    """
    with atomic_file(path, sync=sync) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(
    path: Path | str, existing: Literal["refuse", "keep", "replace"] = "refuse", owner: str | None = None
) -> Iterator[Path]:
    """Yield an empty folder next to `path`, which is renamed to `path` at the end of the block.

    This is atomic for a kill, but not for a power cut, since the files are not forced to disk.

    Args:
        path: Target folder; parents are created. A link is kept, and the folder that it refers to is replaced.
        existing: What to do if the target is a folder with files at the end of the block. "refuse" raises an error,
            "keep" drops the new folder (another process was faster with the same content), "replace" removes the old
            folder.
        owner: Name of the writer, such as a rank, if only one process at a time writes under this name: drafts that it
            left when it was killed are removed first.

    Raises:
        DiskError: The disk is full.
        FileExistsError: `existing` is "refuse", and the target contains files.
    """
    path = _target(path)
    draft = _draft(path, owner)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    if owner is not None:
        for left in path.parent.glob(f"{path.name}.{owner}-*.partial"):
            shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        yield draft
        _move(draft, path, existing)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        _say_if_full(error, path)
        raise


def _move(draft: Path, path: Path, existing: str) -> None:
    """Rename, and treat an existing folder as requested."""
    filled = path.is_dir() and any(path.iterdir())
    if filled and existing == "refuse":
        raise FileExistsError(errno.EEXIST, "the folder already contains files", str(path))
    if filled and existing == "replace":
        stale = draft.with_suffix(".stale")
        path.rename(stale)
        try:
            draft.rename(path)
        except OSError:
            stale.rename(path)
            raise
        shutil.rmtree(stale, ignore_errors=True)
        return
    try:
        draft.rename(path)  # also replaces an empty folder
    except OSError:
        if existing != "keep" or not path.is_dir():
            raise
        shutil.rmtree(draft, ignore_errors=True)


def _target(path: Path | str) -> Path:
    """Resolve a link, since a rename onto the link would put the data on another disk than the user chose."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def _draft(path: Path, owner: str | None = None) -> Path:
    who = f"{_HOST}-{os.getpid()}" if owner is None else f"{owner}-{os.getpid()}"
    return path.with_name(f"{path.name}.{who}.partial")


def _remove_abandoned(path: Path) -> None:
    """Remove drafts of `path` left by killed processes of this machine; restore a folder that was being replaced."""
    prefix = f"{path.name}.{_HOST}-"
    for entry in os.scandir(path.parent):
        process, _, suffix = entry.name.removeprefix(prefix).partition(".")
        if not entry.name.startswith(prefix) or suffix not in ("partial", "stale") or not process.isdigit():
            continue
        if _is_running(int(process)):
            continue
        with suppress(OSError):
            if suffix == "stale" and not path.exists():
                os.rename(entry.path, path)
            elif entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's process
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _say_if_full(error: BaseException, path: Path) -> None:
    full = isinstance(error, OSError) and error.errno in NO_ROOM
    if full or _WRITE_FAILED.search(str(error)):
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else "the disk did not accept the data"
        )
        raise DiskError(
            f"No space to write {path}: {reason}. Files that were complete before are unchanged; free some space and "
            "run the same command again."
        ) from error


@contextmanager
def locked(folder: Path | str, part: str = "") -> Iterator[None]:
    """Lock a work folder, so that two processes never work in it at the same time.

    The lock is a file next to the folder, locked with `flock`. The system releases it when its process ends, also after
    a kill.

    Args:
        folder: The folder; it need not exist.
        part: Part of the folder that this process works in, such as "rank 3 of 16", if several processes share it.
            Processes with different parts do not exclude each other. A part excludes processes with the same part and
            processes that lock the whole folder.

    Raises:
        LockError: Another process holds the lock; the message gives its host, process id and age.
    """
    folder = Path(os.path.realpath(folder))  # one lock for all names of a folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = folder.with_name(f".{folder.name}.lock")
    if not part:
        with _held(whole, folder):
            yield
        return
    own = folder.with_name(f".{folder.name}-{part.replace(' ', '-')}.lock")
    with _held(whole, folder, shared=True), _held(own, folder):
        yield


@contextmanager
def _held(path: Path, folder: Path, shared: bool = False) -> Iterator[None]:
    """Lock one file; the last process that has the lock removes the file."""
    handle = _lock(path, folder, shared)
    try:
        if handle is not None:
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(owner).encode())
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while others share it
                path.unlink(missing_ok=True)
            os.close(handle)


def _lock(path: Path, folder: Path, shared: bool) -> int | None:
    """Open and lock the file; None, with a warning, if the file system has no locks."""
    while True:
        handle = -1
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    return handle
            os.close(handle)  # the owner removed the file between our open and our lock
        except BlockingIOError:
            text = os.pread(handle, 4096, 0)
            os.close(handle)
            raise LockError(_owned(folder, text)) from None
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            sys.stderr.write(
                f"warning: {folder} cannot be locked ({error.strerror}); do not start a second process that works "
                "in it.\n"
            )
            return None


def _owned(folder: Path, text: bytes) -> str:
    owner = "another process"
    with suppress(ValueError, KeyError, TypeError):
        lock = json.loads(text)
        age = max(0, int(time.time() - lock["started"]))
        words = f"{age} s" if age < 120 else f"{age // 60} min" if age < 7200 else f"{age // 3600} h"
        owner = f"process {lock['pid']} on {lock['host']}, started {words} ago,"
    return (
        f"{folder} is in use: {owner} works in it. Wait until it has ended, end it, or name another folder."
    )


def save_figure(figure: "Figure", path: Path | str, **settings: Any) -> None:
    """Write a matplotlib figure atomically, in the format of the path's suffix.

    Args:
        figure: The figure.
        path: The file; its folder exists. A link stays, and the file that it leads to is replaced.
        **settings: Further arguments of `Figure.savefig`, such as `dpi`.

    Raises:
        DiskError: The disk is full.
    """
    with atomic_file(path) as draft:
        figure.savefig(draft, format=Path(path).suffix.removeprefix(".") or "png", **settings)


def write_listed(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file atomically, and return its entry for a manifest.

    Returns:
        {"name", "bytes", "sha256"} of the file.

    Raises:
        DiskError: The disk is full.
    """
    atomic_write(path, content)
    return {"name": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_json(path: Path, content: Any) -> dict[str, Any]:
    """Write JSON atomically, and return its entry for a manifest as in `write_listed`."""
    return write_listed(path, json.dumps(content, indent=1, sort_keys=True).encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        StoreError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} cannot be read as JSON ({error}). If this folder is an activation store, harvest into it again or "
            "restore the file from a copy."
        ) from error


def csv_cell(cell: str) -> str:
    """Make a CSV cell that a spreadsheet shows as text: an apostrophe precedes a leading =, +, -, @, tab or return."""
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")  # a single return would end an unquoted row
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\n") and not _is_number(cell) else cell


def csv_of(frame: "pd.DataFrame", index: bool = False) -> str:
    """Convert a table to CSV in which spreadsheets run no text as a formula (`csv_cell`)."""
    safe = {
        name: [csv_cell(cell) if isinstance(cell, str) else cell for cell in column]
        if column.dtype == object or column.dtype == "string"
        else column.array
        for name, column in frame.items()
    }
    return type(frame)(safe, index=frame.index, columns=frame.columns).to_csv(index=index)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    return digest_of(path, hashlib.sha256())


def digest_of(path: Path, digest: Any) -> str:
    """Hexadecimal digest of a file, read in pieces into a hash of hashlib or xxhash."""
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


__all__ = [
    "atomic_file",
    "atomic_folder",
    "atomic_write",
    "csv_cell",
    "csv_of",
    "digest_of",
    "locked",
    "read_json",
    "save_figure",
    "sha256_of",
    "write_json",
    "write_listed",
]

"""Check image files in parallel: missing, unreadable, duplicate.

Two files are duplicates when their sizes, their last 64 KiB and then their whole contents agree. Only files of equal
size are read for this, since MIMIC-CXR's images are half a terabyte. Memory, and not the number of threads, bounds
decoding: an image waits until the estimates of all images being decoded fit `DECODE_BYTES`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from sae_lens_maira.errors import StudyError

DEPTHS = ("none", "exist", "open", "decode")
TAIL = 65536
DECODE_BYTES = 1 << 30
"""Memory budget in bytes for all images that are decoded at the same time."""


@dataclass(frozen=True)
class ImageFiles:
    """Result of a check of image files: missing, unreadable and duplicate files."""

    paths: tuple[Path, ...]
    missing: frozenset[Path]
    unreadable: dict[Path, str]
    """File -> why it cannot be read."""
    same: dict[Path, Path]
    """File -> the first file with the same content, for files that are not the only one with it; readable ones only."""


def look_at(
    paths: Sequence[Path],
    depth: str = "decode",
    read_image: Callable[[Path], Any] | None = None,
    workers: int = 16,
    progress: bool = True,
    open_image: Callable[[Path], int] | None = None,
    decode_bytes: int = DECODE_BYTES,
) -> ImageFiles:
    """Check every file.

    Args:
        paths: Image paths, each once.
        depth: "none" checks nothing, "exist" asks the file system, "open" reads headers, "decode" reads all pixels;
            the last two also find files of the same content.
        read_image: Function that reads all pixels and raises on failure; Pillow if not given.
        workers: Number of threads.
        progress: Show a progress bar.
        open_image: Function that reads a header, raises on failure and returns the bytes that decoding takes; Pillow if
            not given.
        decode_bytes: Memory budget for all images decoded at the same time; a larger image is decoded alone.

    Raises:
        StudyError: `depth` is another word.
    """
    if depth not in DEPTHS:
        raise StudyError(
            f"The depth of the image check was {depth!r}; expected one of {', '.join(DEPTHS)}. Choose one of these."
        )
    if depth == "none":
        return ImageFiles((), frozenset(), {}, {})
    budget = _Budget(decode_bytes)
    if open_image is None:  # `read_image` may read formats that Pillow cannot open
        open_image = _open if read_image is None or depth == "open" else lambda path: 0

    def read(path: Path) -> None:
        if depth == "exist":
            return
        needed = open_image(path)
        if depth == "decode":
            with budget.held(needed):
                (read_image or _decode)(path)

    def look(path: Path) -> tuple[int, str | None]:
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return -1, None
        except OSError as error:
            return 0, str(error)
        if not path.is_file():
            return -1, None
        if size == 0:
            return 0, "the file is empty"
        try:
            read(path)
        except Exception as error:  # decoders raise many types, and each means that the file cannot be read
            return size, f"{type(error).__name__}: {error}"
        return size, None

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        seen = list(
            tqdm(pool.map(look, paths, chunksize=64), total=len(paths), unit="image", disable=not progress)
        )
        whole = {
            path: size for path, (size, why) in zip(paths, seen, strict=True) if size > 0 and why is None
        }
        same = _same(whole, pool) if depth != "exist" else {}
    missing = frozenset(path for path, (size, _) in zip(paths, seen, strict=True) if size < 0)
    unreadable = {path: why for path, (_, why) in zip(paths, seen, strict=True) if why is not None}
    return ImageFiles(tuple(paths), missing, unreadable, same)


class _Budget:
    """Memory budget shared by threads."""

    def __init__(self, total: int) -> None:
        self.total, self.free = total, total
        self.changed = threading.Condition()

    @contextmanager
    def held(self, wanted: int) -> Iterator[None]:
        """Reserve bytes for the duration of the block, at most the whole budget; waits until they are free."""
        wanted = min(wanted, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= wanted)
            self.free -= wanted
        try:
            yield
        finally:
            with self.changed:
                self.free += wanted
                self.changed.notify_all()


def _open(path: Path) -> int:
    with Image.open(path) as image:
        return image.width * image.height * 8


def _decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _same(sizes: dict[Path, int], pool: ThreadPoolExecutor) -> dict[Path, Path]:
    groups: Iterable[list[Path]] = _grouped(sizes)
    for digest in (_tail, _whole):
        together = [path for group in groups for path in group]
        keys = pool.map(digest, together)
        groups = _grouped({path: (sizes[path], key) for path, key in zip(together, keys, strict=True)})
    return {path: group[0] for group in groups for path in group}


def _grouped(keys: dict[Path, Any]) -> list[list[Path]]:
    groups: dict[Any, list[Path]] = {}
    for path, key in keys.items():
        groups.setdefault(key, []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def _tail(path: Path) -> bytes:
    return _digest(path, max(path.stat().st_size - TAIL, 0))


def _whole(path: Path) -> bytes:
    return _digest(path, 0)


def _digest(path: Path, start: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()

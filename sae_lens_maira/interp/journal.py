"""Append-only file of JSON lines: cache, resume and audit of every call to a language model.

The key of a row is the SHA-256 of the exact request, so no usable answer is paid for twice, also after a kill. Only
usable answers are a cache: failed calls and answers that did not fit stay in the file for the audit and are asked
again. A last line torn by a kill is ended before anything is appended, or the next good row would be lost with it.

Memory holds one file offset per usable answer, never the rows. Images are stored as the SHA-256 of their bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from sae_lens_maira.errors import RecordError

_IMAGE = "data:image/"


def key_of(request: dict[str, Any]) -> str:
    """SHA-256 of a request, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Journal:
    """Usable answers by key; rows stay in the file.

    Attributes:
        path: path of the file.
        torn: lines that could not be read (0 or 1 per kill).
    """

    def __init__(self, path: Path | str) -> None:
        """Open or create the journal, readable by its owner only.

        Raises:
            RecordError: none of the first lines is a JSON object: the file is not a journal.
        """
        self.path, self.torn = Path(path), 0
        self._places: dict[bytes, int] = {}
        self._notes: dict[str, Any] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        offset, whole = 0, True
        for number, line in enumerate(self._file, 1):
            self._take(line, offset, number)
            offset += len(line)
            whole = line.endswith(b"\n")
        if not whole:
            self._file.write(b"\n")

    def _take(self, line: bytes, offset: int, number: int) -> None:
        try:
            row = json.loads(line) if line.strip() else {"note": "", "value": None}
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError):
            self.torn += 1
            # Every kill may tear one line; a file of nothing but unreadable lines is something else.
            if not self._places and not self._notes and self.torn > 1:
                raise RecordError(
                    f"Line {number} of {self.path} is not a JSON object, and neither is any line before it; this is "
                    "not a journal. Give another path."
                ) from None
            return
        if "note" in row:
            self._notes[row["note"]] = row.get("value")
        elif "key" in row and row.get("usable", not row.get("error")):
            self._places[bytes.fromhex(row["key"])] = offset

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of a usable answer, or None."""
        offset = self._places.get(bytes.fromhex(key))
        if offset is None:
            return None
        self._file.seek(offset)
        return json.loads(self._file.readline())

    def append(self, row: dict[str, Any]) -> None:
        """Write a row and hand it to the operating system, so that a killed process loses nothing.

        Args:
            row: `key`, `request`, `usable` (whether the answer may be served again) and what came back.
        """
        offset = self._write({**row, "request": _without_images(row.get("request"))})
        if row.get("usable"):
            self._places[bytes.fromhex(row["key"])] = offset

    def note(self, name: str) -> Any:
        """What was noted of the server under this name, or None."""
        return self._notes.get(name)

    def set_note(self, name: str, value: Any) -> None:
        """Remember something about the server, such as that it takes no schemas."""
        self._write({"note": name, "value": value})
        self._notes[name] = value

    def _write(self, row: dict[str, Any]) -> int:
        # ASCII only: an answer may hold lone surrogates, which UTF-8 has no bytes for.
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        return offset

    def close(self) -> None:
        """Write everything to the disk and close."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _without_images(value: Any) -> Any:
    """A copy of a request in which every image is replaced by its hash."""
    if isinstance(value, dict):
        return {name: _without_images(inside) for name, inside in value.items()}
    if isinstance(value, list):
        return [_without_images(inside) for inside in value]
    if isinstance(value, str) and value.startswith(_IMAGE):
        return f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
    return value

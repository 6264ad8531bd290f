"""One append-only file of JSON lines: cache, resume and audit of every call to a language model.

A row's key is the SHA-256 of the exact request, so the same question is never paid for twice, also after a kill. A
last line torn by a kill is ended before anything is appended, or the next good row would be lost with it. Rows of
failed calls are kept for the audit and never served as answers. It knows nothing about servers.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from sae_lens_maira.errors import RecordError


def key_of(request: dict[str, Any]) -> str:
    """SHA-256 of a request, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Journal:
    """Answers by key, in memory and in the file.

    Attributes:
        path: of the file.
        torn: lines that could not be read (0 or 1 after a kill).
        hits: answers served from the journal since it was opened.
    """

    def __init__(self, path: Path | str) -> None:
        """Open or make the journal.

        Raises:
            RecordError: a line other than the last is no JSON object: the file is not a journal.
        """
        self.path, self.torn, self.hits = Path(path), 0, 0
        self._answers: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, Any] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = self.path.read_bytes() if self.path.exists() else b""
        lines = held.split(b"\n")
        for number, line in enumerate(lines, 1):
            if line:
                self._take(line, number)
        self._file = self.path.open("ab")
        if held and not held.endswith(b"\n"):
            self._file.write(b"\n")

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
        except ValueError:
            self.torn += 1
            # Every kill may tear one line; a file of nothing but unreadable lines is something else.
            if not self._answers and not self._notes and self.torn > 1:
                raise RecordError(
                    f"{self.path}, line {number} is no JSON object and neither is any line before it; this is no "
                    "journal. Give another path."
                ) from None
            return
        if "note" in row:
            self._notes[row["note"]] = row["value"]
        elif not row.get("error"):
            self._answers[row["key"]] = row

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> dict[str, Any] | None:
        """The answered row of a request, or None."""
        row = self._answers.get(key)
        self.hits += row is not None
        return row

    def append(self, row: dict[str, Any]) -> None:
        """Write a row and hand it to the operating system, so that a killed process loses nothing."""
        self._write(row)
        if not row.get("error"):
            self._answers[row["key"]] = row

    def note(self, name: str) -> Any:
        """What was noted of the server under this name, or None."""
        return self._notes.get(name)

    def set_note(self, name: str, value: Any) -> None:
        """Remember something about the server, such as that it takes no schemas."""
        self._write({"note": name, "value": value})
        self._notes[name] = value

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

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

"""Streams that print control characters of data as escapes.

A study id or a report may hold terminal escape sequences, which could move the cursor, rename the window or hide what
a message says. New lines, tabs, carriage returns and a progress bar's "cursor up" pass through; every other control
character, and those that reverse the direction of text, are printed as escapes.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

_CONTROL = re.compile(r"\x1b\[A|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters as escapes."""
    return _CONTROL.sub(
        lambda found: found[0] if found[0] == "\x1b[A" else found[0].encode("unicode_escape").decode(), text
    )


class _VisibleStream:
    """A text stream whose `write` goes through `visible`; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(visible(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def visible_streams() -> Iterator[None]:
    """Within the block, stdout and stderr print control characters as escapes."""
    out: Any = _VisibleStream(sys.stdout)
    err: Any = _VisibleStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


__all__ = ["visible", "visible_streams"]

"""Word-by-word comparison of two reports."""

import difflib
import re
from dataclasses import dataclass

_WORDS = re.compile(r"\s*\d+\.\d+|\s*\w+(?:[-'’]\w+)*|\s*[^\w\s]|\s+$")


@dataclass(frozen=True)
class Piece:
    """A run of words, `marked` if the other report does not have them at this place."""

    text: str
    marked: bool


def compare_words(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Split two reports into pieces; the unmarked pieces are the same words in the same order.

    Case is ignored. The pieces of a report concatenate to that report exactly.

    Args:
        before: One report.
        after: The other report.

    Returns:
        Pieces of `before` and of `after`.
    """
    words = [_WORDS.findall(text) for text in (before, after)]
    keys = [[word.strip().lower() for word in side] for side in words]
    matcher = difflib.SequenceMatcher(None, *keys, autojunk=False)
    found: tuple[list[Piece], list[Piece]] = ([], [])
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        for side, part in zip(found, (words[0][a0:a1], words[1][b0:b1]), strict=True):
            if part:
                side.append(Piece("".join(part), tag != "equal"))
    return tuple(found[0]), tuple(found[1])

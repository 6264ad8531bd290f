"""Cut a report into sentences and list items, for `labels`.

Sections that state nothing (indication, technique ...) are overwritten with blanks. Positions are those of the given
text throughout, so that a label can point at the words that it was read from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sae_lens_maira.studies import cues

_LONG_WORD = re.compile(r"[^\W_]{65,}")
_ITEM = r"(?:\(?\d{1,2}[.)]|\(?[a-h][.)]|[-*\u2022\u2013\u2014]+)"
_SENTENCE = re.compile(
    rf"(?!(?i:{cues.VALUE}))(?:(?<!\bvs)(?<!\bdr)(?<!\bapprox)\.(?=\s|$)|[;!](?=\s|$)|(?<=[\w)])\?+(?=[\s)]|$)"
    r"|\s(?=[-*\u2022\u2013\u2014]+\s)|\s(?=\(?\d[.)]\s+\D)"
    rf")|\n[ \t]*\n|\n[ \t]*(?={_ITEM}\s)",
    re.IGNORECASE,
)
_SHORT_LINE = re.compile(r"^[^\n]{1,50}\n(?=[ \t]*[A-Z][a-z])", re.MULTILINE)
_HEADER = re.compile(
    r"(?:^|\n|(?<=[.?!;] ))[ \t]*([A-Z][A-Z ()/,&-]{2,60}?|(?i:findings?|impressions?|"
    + cues.SILENT_SECTIONS
    + r"))(?:[ \t]*:|[ \t]+[-\u2013\u2014](?=\s))",
    re.MULTILINE,
)
_SILENT = re.compile(rf"(?:{cues.SILENT_SECTIONS})", re.IGNORECASE)

BULLET = re.compile(rf"^\s*{_ITEM}\s+")
"""The marker in front of a list item."""


def stated_text(text: str) -> str:
    """A report with everything overwritten by blanks that states nothing, character for character.

    A word of thousands of letters states nothing, and patterns over it take quadratic time. A silent section ends at
    the next header, at a blank line, or where none follows at the end of the text.
    """
    text = _LONG_WORD.sub(lambda word: " " * len(word[0]), text.replace("\u2019", "'"))
    out = list(text)
    headers = list(_HEADER.finditer(text))
    for index, header in enumerate(headers):
        if not _SILENT.fullmatch(header[1].strip()):
            continue
        end = headers[index + 1].start() if index + 1 < len(headers) else len(text)
        gap = re.search(r"\n[ \t]*\n", text[header.end() : end])
        if gap and text[header.end() : header.end() + gap.start()].strip():
            end = header.end() + gap.start()
        out[header.start() : end] = [c if c == "\n" else " " for c in text[header.start() : end]]
    return "".join(out)


def sentences(text: str) -> Iterator[tuple[int, str, bool]]:
    """Sentences and list items of a text.

    Args:
        text: The text.

    Yields:
        Start, sentence, and whether a question mark ends it. A short line before a capital is a sentence.
    """
    cuts = [(cut.start(), cut.end()) for cut in _SENTENCE.finditer(text)]
    cuts += [(line.end() - 1, line.end()) for line in _SHORT_LINE.finditer(text)]
    start = 0
    for end, after in sorted(set(cuts)):
        if end >= start:
            yield start, text[start:end], text[end : end + 1] == "?"
            start = after
    yield start, text[start:], False


def is_english(text: str) -> bool:
    """Whether a text has fewer function words of other languages, and words in other letters, than English ones."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"\bnon-", "", text.lower()))
    foreign = sum(word in cues.FOREIGN or not word.isascii() for word in words)
    return foreign == 0 or foreign < sum(word in cues.ENGLISH for word in words)


__all__ = ["BULLET", "is_english", "sentences", "stated_text"]

"""Cut a report into sentences and list items, for `labels`.

Runs of blanks are folded, and sections without statements about this image (indication, technique ...) are overwritten.
`folded` also returns positions in the original text, so that a label can name the words that it was read from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sae_lens_maira.studies import cues

_CLINICAL = r"clinical (?:history|information|indication|question|details?|data|background|concern|statement)"
SILENT_SECTIONS = (
    rf"indications?|history|{_CLINICAL}|reasons? for (?:the )?(?:exam\w*|study|visit|order|request|consult\w*|test)"
    r"|(?:exam )?reason|technique|comparisons?|exam(?:ination)?|study|procedure|type of examination|chief complaint"
    r"|clinical|(?:signs? and )?symptoms?|hx|pmh|past medical history|presenting complaint|background|question"
    r"|admitting diagnosis|diagnosis on admission|provisional diagnosis|referral|request"
)
"""Headers of sections that contain no statement about this image."""

# Function words of English and of other languages, which decide whether a text is English. Words that several languages
# share ("no", "in", "a", "is", "normal", "et" of "ET tube") are left out.
ENGLISH = frozenset(
    """
    the are were not of and or there with without for at this that has have been be seen on
    to by from it may clear left right small stable unchanged new evidence
    """.split()  # noqa: SIM905 - one word per item would take a hundred lines
)
FOREIGN = frozenset(
    """
    el la los las de del se sin con y en un una por que al derecho izquierdo derecha izquierda der die
    das und kein keine keinen nicht ist sind mit ohne im ein eine le les des du est sont pas sans
    avec une dans gauche droit il lo gli di e non sono senza na os da em com sem ao het een van
    geen niet rechts links beidseits herz lunge lungen nachweis hinweis pulmones derrame coeur poumon poumons polmoni
    cuore versamento brak bez ingen inget yok
    """.split()  # noqa: SIM905 - one word per item would take a hundred lines
)

# Runs of characters without meaning, and what is kept of each: regular expressions would take cubic time on long runs.
_RUNS = tuple(
    re.compile(run)
    for run in (
        r"()[^\W_]{65,}",
        r"([ \t])[ \t]+",
        r"(_{3})_+",
        r"(\n)(?:[ \t]?\n){2,}",
        r"([\s:-]{6})[\s:-]+",
    )
)
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
    + SILENT_SECTIONS
    + r"))(?:[ \t]*:|[ \t]+[-\u2013\u2014](?=\s))",
    re.MULTILINE,
)
_SILENT = re.compile(rf"(?:{SILENT_SECTIONS})", re.IGNORECASE)

BULLET = re.compile(rf"^\s*{_ITEM}\s+")
"""Marker before a list item."""


def folded(text: str) -> tuple[str, list[int]]:
    """Fold runs of blanks, empty lines and dashes, and drop words of more than 64 letters.

    Args:
        text: The text.

    Returns:
        The folded text with straight apostrophes, and the position in `text` of each of its characters.
    """
    text = text.replace("\u2019", "'").replace(
        "\u0130", "I"
    )  # U+0130 is the only letter whose lower case is longer
    positions = list(range(len(text)))
    for run in _RUNS:
        kept: list[int] = []
        start = 0
        for found in run.finditer(text):
            kept += range(start, found.end(1))
            start = found.end()
        kept += range(start, len(text))
        text, positions = "".join(text[i] for i in kept), [positions[i] for i in kept]
    return text, positions


def without_silent_sections(text: str) -> str:
    """Overwrite sections without statements (indication, technique ...) with blanks, keeping every position.

    Such a section ends at the next header, at a blank line, or at the end of the text.
    """
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
    """Yield the sentences and list items of a text.

    Args:
        text: The text.

    Yields:
        Start position, sentence, and whether a question mark ends it. A short line before a capital is a sentence.
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
    """Whether a text has more English function words than function words of other languages and non-Latin words."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"\bnon-", "", text.lower()))
    foreign = sum(word in FOREIGN or not word.isascii() for word in words)
    return foreign == 0 or foreign < sum(word in ENGLISH for word in words)


__all__ = ["BULLET", "folded", "is_english", "sentences", "without_silent_sections"]

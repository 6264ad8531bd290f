"""Which findings a sentence names, read by rule from the finding keys themselves.

A key such as `pleural_effusion_left` is a name and perhaps a side. A clause names it if it holds the name and its
side, or the name and no side at all. Quoted words are evidence, not statements, and are skipped, and so are places
("left lower zone"). It knows no list of findings of its own: the keys come from the record set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_SIDES = ("left", "right")
_QUOTED = re.compile(r'"[^"]*"')
_PLACE = re.compile(r"\b(left|right|central) (upper|mid|lower) (zone|part)s?\b")
_CLAUSE = re.compile(r"[.;:\n]+")

_DEVICES = re.compile(r"\b(pacemaker|tube|line|catheter|wires?|clips?|port|drain|device|support)\b")
_CHANGE = re.compile(
    r"\b(new|newly|unchanged|stable|increased?|increasing|decreased?|decreasing|larger|smaller|worsen\w*|"
    r"improv\w*|resol\w+|interval|prior|comparison|previous|since|again|removed|change[ds]?)\b"
)


def name_and_side(key: str) -> tuple[str, str | None]:
    """`pleural_effusion_left` -> ("pleural effusion", "left"); a key without a side -> (name, None)."""
    stem, _, last = key.rpartition("_")
    if stem and last in _SIDES:
        return stem.replace("_", " "), last
    return key.replace("_", " "), None


def key_in_words(key: str) -> str:
    """`pleural_effusion_left` -> "left pleural effusion"."""
    name, side = name_and_side(key)
    return f"{side} {name}" if side else name


def named_findings(text: str, keys: Iterable[str]) -> frozenset[str]:
    """The keys that a sentence names; a name without a side names both sides."""
    known = [(key, *name_and_side(key)) for key in keys]
    named = set()
    for clause in _CLAUSE.split(_PLACE.sub(" ", _QUOTED.sub(" ", text)).lower()):
        sides = {side for side in _SIDES if re.search(rf"\b{side}\b", clause)}
        for key, name, side in known:
            says = re.search(rf"\b{re.escape(name.lower())}(s|es)?\b", clause)
            if says and (side is None or not sides or side in sides):
                named.add(key)
    return frozenset(named)


def category_of(finding: str | None, words: Iterable[str]) -> str:
    """One of the study's categories, from the finding named (None for none) and the words of the evidence."""
    if finding is not None:
        return "device" if _DEVICES.search(name_and_side(finding)[0]) else "pathology"
    words = list(words)
    text = " ".join(words)
    if _CHANGE.search(text):
        return "longitudinal change"
    if _DEVICES.search(text):
        return "device"
    return "textual" if words else "other"


def category_of_text(text: str, keys: Iterable[str]) -> str:
    """Category of a free sentence: change words first, then devices, then any known finding."""
    named = sorted(named_findings(text, keys))
    if _CHANGE.search(text.lower()):
        return "longitudinal change"
    if _DEVICES.search(text.lower()):
        return "device"
    return "pathology" if named else "textual"

"""Rule labels of a report: phrase table plus a scope pass, present / uncertain / absent with the evidence.

A mention is governed by the cues of its own clause: text is cut into sentences, a cue before a mention reaches
forward and a cue behind it reaches back, both up to a terminating word; pseudo-negations ("no change") are masked
first. Of several mentions present beats uncertain beats absent, and an observation without a mention has no entry.
The labels are called rule labels and are nothing else; the module knows nothing about studies or models.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from sae_lens_maira.studies import phrases
from sae_lens_maira.studies.phrases import OBSERVATIONS


class RuleStatus(str, enum.Enum):
    """What a report says of an observation it mentions."""

    PRESENT = "present"
    UNCERTAIN = "uncertain"
    ABSENT = "absent"


@dataclass(frozen=True)
class RuleLabel:
    """One observation's status and the words it was read from."""

    status: RuleStatus
    span: tuple[int, int]
    """Characters [start, end) of the mention in the text that was given."""
    evidence: str
    """The sentence of the mention, white space folded."""


_RANK = {RuleStatus.PRESENT: 2, RuleStatus.UNCERTAIN: 1, RuleStatus.ABSENT: 0}
_SENTENCE = re.compile(r"(?:[.;?!](?=\s|$)|\n[ \t]*\n|(?<=[a-z]):(?=\s)|\n[ \t]*(?=\d+[.)]\s))")
_HEADER = re.compile(r"(?:^|\n|(?<=\. ))[ \t]*([A-Z][A-Z ()/,&-]{2,60}?)[ \t]*:", re.MULTILINE)
_SILENT = re.compile(rf"(?:{phrases.SILENT_SECTIONS})", re.IGNORECASE)


@cache
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    body = "|".join(f"(?:{pattern})" for pattern in patterns).replace(" ", r"[\s-]+")
    return re.compile(rf"(?<![\w/])(?:{body})(?![\w])")


def _blank_silent(text: str) -> str:
    """Overwrite sections that state nothing (indication, technique ...) with blanks, keeping every position.

    A silent section ends at the next header, at a blank line, or where none follows at the end of its line.
    """
    out = list(text)
    headers = list(_HEADER.finditer(text))
    for index, header in enumerate(headers):
        if not _SILENT.fullmatch(header[1].strip()):
            continue
        end = headers[index + 1].start() if index + 1 < len(headers) else len(text)
        gap = re.search(r"\n[ \t]*\n", text[header.end() : end])
        end = (
            header.end() + gap.start()
            if gap and text[header.end() : header.end() + gap.start()].strip()
            else end
        )
        out[header.start() : end] = [c if c == "\n" else " " for c in text[header.start() : end]]
    return "".join(out)


def _sentences(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    for cut in _SENTENCE.finditer(text):
        yield start, text[start : cut.start()]
        start = cut.end()
    yield start, text[start:]


def _mask(text: str, pattern: re.Pattern[str]) -> str:
    return pattern.sub(lambda found: "_" * len(found[0]), text)


def _last_end(pattern: re.Pattern[str], text: str) -> int:
    return max((found.end() for found in pattern.finditer(text)), default=-1)


def _last(patterns: tuple[str, ...], text: str) -> re.Match[str] | None:
    matches = list(_compiled(patterns).finditer(text))
    return matches[-1] if matches else None


def _cut_by_comma(between: str, after: str) -> bool:
    """Whether a comma behind the negation opens a new positive statement: "no edema, small effusion"."""
    cut = re.search(rf",\s+(?:and\s+)?{phrases.SIZE_WORDS}\b", between)
    return cut is not None and not re.search(r"\b(?:or|nor)\b", between[cut.end() :] + after)


def _status(sentence: str, start: int, end: int) -> RuleStatus:
    """Status of the mention at [start, end) of a lower-case sentence."""
    stops = _compiled(phrases.TERMINATION)
    before = sentence[:start]
    before = before[max(_last_end(stops, before), 0) :]
    stop = stops.search(sentence, end)
    after = sentence[end : stop.start() if stop else len(sentence)]
    if _compiled(phrases.UNCERTAIN_AFTER).search(after[:70]):
        return RuleStatus.UNCERTAIN
    if _compiled(phrases.NEGATION_AFTER).search(after[:70]):
        return RuleStatus.ABSENT
    negation = _last(phrases.NEGATION_BEFORE, before)
    doubt = _last(phrases.UNCERTAIN_BEFORE, before)
    if negation and not _cut_by_comma(before[negation.end() :], sentence[end:]):
        # "cannot exclude" holds both cues; a doubt behind or around the negation wins.
        return RuleStatus.UNCERTAIN if doubt and doubt.end() > negation.start() else RuleStatus.ABSENT
    if doubt and len(before) - doubt.end() <= 70:
        return RuleStatus.UNCERTAIN
    return RuleStatus.PRESENT


def _mentions(sentence: str) -> Iterator[tuple[str, int, int, RuleStatus]]:
    masked = _mask(sentence, _compiled(phrases.PSEUDO_NEGATION))
    for observation in OBSERVATIONS:
        denied: list[tuple[int, int]] = []
        if observation in phrases.ABSENT_PHRASES:
            for found in _compiled(phrases.ABSENT_PHRASES[observation]).finditer(masked):
                denied.append(found.span())
                yield observation, *found.span(), RuleStatus.ABSENT
        if observation not in phrases.PHRASES:
            continue
        for found in _compiled(phrases.PHRASES[observation]).finditer(masked):
            if not any(a < found.end() and found.start() < b for a, b in denied):
                yield observation, *found.span(), _status(masked, *found.span())


def rule_labels(text: str) -> dict[str, RuleLabel]:
    """Labels of the 14 usual observations of a report.

    Args:
        text: a report, whole or one of its sections; sections that only ask (indication, technique) are skipped.

    Returns:
        Observation -> label, for the observations that are mentioned; `no_finding` is present where no other
        observation but support devices is present or uncertain, and has no entry otherwise.
    """
    stated = _blank_silent(text)
    labels: dict[str, RuleLabel] = {}
    for offset, sentence in _sentences(stated):
        for observation, start, end, status in _mentions(sentence.lower()):
            old = labels.get(observation)
            if old is None or _RANK[status] > _RANK[old.status]:
                evidence = " ".join(sentence.split())
                labels[observation] = RuleLabel(status, (offset + start, offset + end), evidence)
    troubled = [
        o for o, label in labels.items() if label.status is not RuleStatus.ABSENT and o != "support_devices"
    ]
    if not troubled and stated.strip():
        found = _compiled(phrases.NORMAL_PHRASES).search(stated.lower())
        span = found.span() if found else (0, len(text))
        labels["no_finding"] = RuleLabel(RuleStatus.PRESENT, span, " ".join(text[slice(*span)].split()))
    return labels


def present_observations(texts: Iterable[str]) -> list[frozenset[str]]:
    """Observations that each report states as present."""
    return [
        frozenset(o for o, label in rule_labels(text).items() if label.status is RuleStatus.PRESENT)
        for text in texts
    ]

"""Sections of a free-text radiology report, by their headers.

    addenda and wet reads | a line of underscores | FINAL REPORT | HEADER: text | HEADER: text | ...

A report is cut at headers of a table of known names only, so that "LUNGS:" inside the findings ends nothing. Wrapped
lines are joined, de-identification marks (`___`) stay. Of a header that comes twice the last filled one counts. A title
such as "CHEST, TWO VIEWS:" that is followed by prose stands for findings where no findings header does. The names were
collected from reports and are ours; this module knows nothing about files or data sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

# Whole names of headers, in upper case with single blanks.
_NAMES = {
    kind: re.compile(names)
    for kind, names in {
        "findings": r"FINDINGS?(?: ?(?:AND|/|&) ?IMPRESSIONS?)?|REPORT",
        "impression": r"IMPRESSIONS?|IMPRESSON|CONCLUSIONS?|IMPRESSION ?(?:AND|/|&) ?RECOMMENDATIONS?",
        "indication": (
            r"(?:CLINICAL |PATIENT )?(?:INDICATIONS?|HISTORY|INFORMATION)(?: FOR (?:THIS )?(?:EXAM(?:INATION)?|STUDY))?"
            r"|INDICATIONS? AND HISTORY|REASON(?: FOR (?:THIS )?(?:EXAM(?:INATION)?|STUDY))?|CLINICAL QUESTION"
        ),
        "technique": r"TECHNIQUES?|TECHNICAL FACTORS",
        "comparison": r"COMPARISONS?(?: (?:EXAM(?:INATION)?S?|STUD(?:Y|IES)|FILMS?|RADIOGRAPHS?))?",
        "examination": r"EXAM(?:INATION)?S?|STUDY|PROCEDURE|TYPE OF (?:EXAM(?:INATION)?|STUDY)",
        "addendum": r"ADDEND(?:UM|A)(?: ?#? ?\d+)?|FINAL ADDENDUM",
        "other": (
            r"RECOMMENDATIONS?|RECOMMENDATION\(S\)|NOTIFICATIONS?|NOTIFICATION\(S\)|WET READ(?: VERSION.*)?"
            r"|PRELIMINARY REPORT|DISCUSSION WITH .*|DICTATED BY|ATTENDING.*|PFI(?: REPORT)?"
        ),
        "title": r".*\b(?:CHEST|RADIOGRAPHS?|PORTABLE|UPRIGHT|SUPINE|VIEWS?|LATERAL|FILMS?)\b.*",
    }.items()
}
_MIDLINE = ("findings", "impression", "indication", "technique", "comparison")
_CANDIDATE = re.compile(
    r"(?P<upper>[A-Z][A-Z0-9 \t,./()&#-]{2,70}(?:and IMPRESSIONS?)?)[ \t]*:"
    r"|^[ \t]*(?P<mixed>Findings|Impression|Indication|History|Technique|Comparison|Examination|Addendum)[ \t]*:"
    r"|^[ \t]*(?P<bare>FINDINGS|IMPRESSION|INDICATION|TECHNIQUE|COMPARISON)[ \t]*$",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"^.*[.?!)_][ \t]+")
_RULE = re.compile(r"^[ \t]*_{10,}[ \t]*$", re.MULTILINE)
_BANNER = re.compile(r"^[ \t]*(?:FINAL|SUPPLEMENTARY) REPORT[ \t]*$", re.MULTILINE)
_ASIDE = re.compile(r"\s*(?:FINAL[ \t]+)?(?:ADDENDUM|ADDENDA|WET READ|PRELIMINARY REPORT)\b")
_WORD = re.compile(r"[A-Za-z]{2,}")
_PROSE = re.compile(r"(?:[A-Za-z]{2,}\W+){4,}")


@dataclass(frozen=True)
class ReportSections:
    """Sections as one line of text each, None where missing or without a word."""

    findings: str | None
    impression: str | None
    indication: str | None
    technique: str | None
    comparison: str | None
    addendum: str | None
    has_findings_header: bool
    """Whether the report has a findings header at all, filled or not."""
    body: str
    """The whole report without banner and addenda, one line."""
    findings_from_impression: bool = False
    """Whether `findings` is the impression, because the findings section only refers to it."""

    @property
    def as_prior(self) -> str | None:
        """What a later study is told of this one: findings and impression with their names, else the whole body."""
        parts = [("FINDINGS", self.findings), ("IMPRESSION", self.impression)]
        told = " ".join(f"{name}: {text}" for name, text in parts if text)
        return told or self.body or None


def parse_sections(text: str) -> ReportSections:
    """Cut a report into sections.

    Args:
        text: the report as it is in the file.

    Returns:
        Its sections; all None for a report without headers, whose text is then in `body`.
    """
    report, aside = _main_part(text.replace("\r\n", "\n").replace("\r", "\n"))
    headers = list(_headers(report))
    found: dict[str, list[str]] = {}
    for number, (kind, _, end) in enumerate(headers):
        stop = headers[number + 1][1] if number + 1 < len(headers) else len(report)
        found.setdefault(kind, []).append(_line(report[end:stop]))
    has_findings = "findings" in found
    if not has_findings:
        found["findings"] = [title for title in found.get("title", []) if _PROSE.match(title)]
    later = found.get("addendum", [])
    end = next((start for kind, start, _ in headers if kind == "addendum"), len(report))
    body = _line(report[:end])
    return ReportSections(
        findings=_last(found.get("findings", [])),
        impression=_last(found.get("impression", [])),
        indication=_first_filled(found.get("indication", [])),
        technique=_first_filled(found.get("technique", [])),
        comparison=_first_filled(found.get("comparison", [])),
        addendum=" ".join(part for part in (*aside, *later) if part) or None,
        has_findings_header=has_findings,
        body=body if _WORD.search(body) else "",
    )


def _headers(report: str) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of every header that begins a section, in order."""
    current = ""
    for found in _CANDIDATE.finditer(report):
        name = found.group(found.lastgroup or 0)
        start = found.start(found.lastgroup or 0)
        line_start = report.rfind("\n", 0, start) + 1
        kind = _kind(" ".join(name.upper().split())) if not report[line_start:start].strip() else None
        if kind is None:  # a header behind the end of a sentence, on the same line
            said = _SENTENCE_END.match(report[line_start : found.end()])
            start = line_start + said.end() if said else start
            kind = _kind(" ".join(report[start : found.end()].rstrip(" \t:").split())) if said else None
            kind = kind if kind in _MIDLINE else None
        if kind is None or (kind == "title" and current == "findings"):
            continue
        current = kind
        yield kind, start, found.end()


@cache
def _kind(name: str) -> str | None:
    return next((kind for kind, names in _NAMES.items() if names.fullmatch(name)), None)


def _main_part(text: str) -> tuple[str, list[str]]:
    """The report itself without its banner, and the addenda and wet reads that stand apart from it."""
    blocks = [block for block in _RULE.split(text) if block.strip()]
    # What stands above the banner of a later block was written apart from that report.
    first = max((n for n, block in enumerate(blocks) if _BANNER.match(block.lstrip("\n"))), default=0)
    report, aside = [], []
    for number, block in enumerate(blocks):
        banner = _BANNER.search(block)
        if number >= first and banner and _ASIDE.match(block):  # no line of underscores between the two
            aside.append(block[: banner.start()])
            block = block[banner.end() :]
        (aside if number < first or _ASIDE.match(block) else report).append(block)
    if not report:  # a wet read or an addendum is all there is
        report, aside = aside, []
    return _BANNER.sub("", "\n\n".join(report)), [_line(block) for block in aside]


def _line(text: str) -> str:
    return " ".join(text.split())


def _last(texts: list[str]) -> str | None:
    return next((text for text in reversed(texts) if _WORD.search(text)), None)


def _first_filled(texts: list[str]) -> str | None:
    return next((text for text in texts if _WORD.search(text)), None)

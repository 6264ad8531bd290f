"""Sections of a free-text radiology report, by their headers.

    addenda and wet reads | a line of underscores | FINAL REPORT | HEADER: text | HEADER: text | ...

A report is cut only at headers in a table of known names, so that "LUNGS:" inside the findings does not end the
section. A header is a known name at the start of a line, in any case: with a colon or a dash, as a markdown title, or
alone on its line. A known name after the end of a sentence is a header too. Wrapped lines are joined; de-identification
marks (`___`) are kept. If a header occurs twice, the last section with text is used, or the chest's where the report
names regions. If there is no findings header, prose after a title such as "CHEST, TWO VIEWS:" is the findings. Findings
that only refer to the impression ("See impression.", "None.") are replaced by it, and `findings_from_impression` is
then true.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

# Full names of headers, in upper case with single blanks.
_EXAM = r"(?: (?:FOR|OF) (?:THIS |THE )?(?:EXAM(?:INATION)?|STUDY))?"
_REGION = r"(?:CHEST|THORAX|LUNGS?|ABDOMEN|ABDOMINAL|PELVIS|KUB|SPINE|HIPS?|KNEES?|SHOULDERS?|NECK|RIBS?)"
_PATTERNS = {
    "findings": rf"(?:{_REGION} )?FINDINGS?(?: ?(?:AND|/|&) ?IMPRESSIONS?)?(?:,? (?:\(?{_REGION}\)?))?|REPORT",
    "impression": (
        rf"(?:{_REGION} )?IMPRESSIONS?(?: ?(?:AND|/|&) ?RECOMMENDATIONS?)?(?:,? (?:\(?{_REGION}\)?))?"
        r"|IMPRESSON|CONCLUSIONS?"
    ),
    "indication": (
        rf"(?:CLINICAL |PATIENT )?(?:INDICATIONS?|HISTORY|INFORMATION){_EXAM}"
        rf"|INDICATIONS? AND HISTORY|REASON{_EXAM}|CLINICAL QUESTION"
    ),
    "technique": r"TECHNIQUES?|TECHNICAL FACTORS",
    "comparison": r"COMPARISONS?(?: (?:EXAM(?:INATION)?S?|STUD(?:Y|IES)|FILMS?|RADIOGRAPHS?))?",
    "examination": r"EXAM(?:INATION)?S?|STUDY|PROCEDURE|TYPE OF (?:EXAM(?:INATION)?|STUDY)",
    "addendum": r"ADDEND(?:UM|A)(?: ?#? ?\d+)?|FINAL ADDENDUM",
    "other": (
        r"RECOMMENDATIONS?|RECOMMENDATION\(S\)|NOTIFICATIONS?|NOTIFICATION\(S\)|WET READ(?: VERSION.*)?"
        r"|PRELIMINARY REPORT|DISCUSSION WITH .*|DICTATED BY|ATTENDING.*|PFI(?: REPORT)?|SUMMARY|ACCESSION(?: NUMBER)?"
        r"|PROCEDURE COMMENTS?|END OF IMPRESSION|(?:ELECTRONICALLY )?SIGNED BY|TRANSCRIBED BY|SIGNATURE"
    ),
    "title": r".*\b(?:CHEST|RADIOGRAPHS?|PORTABLE|UPRIGHT|SUPINE|VIEWS?|LATERAL|FILMS?)\b.*",
}
_NAMES = {kind: re.compile(names) for kind, names in _PATTERNS.items()}
_STATED = ("findings", "impression")
_ALONE = ("findings", "impression", "indication", "technique", "comparison")
_MARKS = r"[ \t#>*=\u2022~-]*"  # of markdown, lists and rulers
_LINE = re.compile(
    rf"^{_MARKS}(?P<name>[A-Za-z](?:[^:\n*=]|(?<=\d):(?=\d)){{1,80}}?)[ \t]*[*=~]*[ \t]*"
    r"(?P<end>(?:(?<!\d):|:(?!\d))[*]*|(?<=\s)[-\u2013\u2014]{1,3}(?=\s|$)|[-\u2013\u2014]{2,}|$)",
    re.MULTILINE,
)
_SPOKEN = "|".join(f"(?:{_PATTERNS[kind]})" for kind in ("findings", "impression", "indication", "technique"))
_INSIDE = re.compile(rf"\b(?P<name>(?i:{_SPOKEN}|{_PATTERNS['comparison']}|{_PATTERNS['other']}))[ \t]*:")
_SIGNED = re.compile(
    r"(?:^|(?<=[.?!)_])[ \t]+)[ \t]*(?P<name>(?i:end of impression|(?:electronically |digitally )?signed by"
    r"|(?:dictated|transcribed|reviewed and signed) by|i have (?:personally )?reviewed the))\b",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.?!)_*][ \t]+$")
_RULE = re.compile(r"^[ \t]*_{10,}[ \t]*$", re.MULTILINE)
_BANNER = re.compile(r"^[ \t]*(?:FINAL|SUPPLEMENTARY) REPORT[ \t]*$", re.MULTILINE)
_ASIDE = re.compile(r"\s*(?:FINAL[ \t]+)?(?:ADDENDUM|ADDENDA|WET READ|PRELIMINARY REPORT)\b")
_WORD = re.compile(r"[A-Za-z]{2,}")
_PROSE = re.compile(  # a list item, four words, or fewer words that end a sentence
    r"\d+[.)]\s+[A-Za-z]|(?=.*\b[a-z]{3,})(?:(?:[A-Za-z]+[^A-Za-z.]+){3,}[A-Za-z]+|(?:[A-Za-z]+\W+)+?[a-z]{4,}\.)"
)
_REFERENCE = re.compile(
    r"(?:none|nil|n/?a|nan|null|no (?:text|report|dictation)|(?:please )?(?:see|refer to|as per|as in|per) "
    r"(?:the )?(?:impressions?|conclusions?|above|below|report)(?: section)?(?: below| above)?"
    r"|(?:as |described |noted |reported |same as )+(?:above|below|impression))[.!\s]*",
    re.IGNORECASE,
)
_CHEST = re.compile(r"\b(?:CHEST|THORA\w+|LUNGS?|PULMONARY|CXR)\b", re.IGNORECASE)
_ELSEWHERE = re.compile(
    r"\b(?:ABDOM\w+|PELVI\w+|KUB|SPINE|LUMBAR|CERVICAL|HIPS?|KNEES?|SHOULDERS?|HANDS?|FOOT|FEET|NECK|HEAD|SKULL)\b",
    re.IGNORECASE,
)


class _Header(NamedTuple):
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class ReportSections:
    """Sections of a report, each one line of text, None where missing or empty."""

    findings: str | None
    impression: str | None
    indication: str | None
    technique: str | None
    comparison: str | None
    addendum: str | None
    has_findings_header: bool
    """Whether the report has a findings header, with text after it or not."""
    body: str
    """The whole report without banner and addenda, as one line."""
    findings_from_impression: bool = False
    """Whether `findings` is the impression, because the findings section only refers to it."""

    @property
    def as_prior(self) -> str | None:
        """Prior report that a later study uses: findings and impression with their names, else the whole body."""
        parts = [("FINDINGS", self.findings), ("IMPRESSION", self.impression)]
        named = " ".join(f"{name}: {text}" for name, text in parts if text)
        return named or self.body or None


def parse_sections(text: str) -> ReportSections:
    """Cut a report into sections.

    Args:
        text: The report, unchanged from the file.

    Returns:
        Its sections; all None for a report without headers, whose text is then in `body`.
    """
    report, addenda = _main_part(text.replace("\r\n", "\n").replace("\r", "\n"))
    headers = list(_headers(report))
    found: dict[str, list[str]] = {}
    chest: dict[str, list[bool]] = {}
    region = ""
    for number, header in enumerate(headers):
        stop = headers[number + 1].start if number + 1 < len(headers) else len(report)
        section = report[header.end : stop]
        named = _region(report[header.start : header.end])
        if header.kind in _STATED and number + 1 < len(headers) and headers[number + 1].kind != "impression":
            section, following = _without_next_title(section)
        else:
            following = ""
        if header.kind in ("title", "examination", "region"):
            region = named or _region(section[:80]) or region
        found.setdefault(header.kind, []).append(_line(section))
        chest.setdefault(header.kind, []).append((named or region) != "elsewhere")
        region = following or region
    has_findings = "findings" in found
    if not has_findings:
        found["findings"] = [title for title in found.get("title", []) if _PROSE.match(title)]
        chest["findings"] = [True] * len(found["findings"])
    later = found.get("addendum", [])
    end = next((start for kind, start, _ in headers if kind == "addendum"), len(report))
    body = _line(report[:end])
    findings, impression = (_last(found.get(name, []), chest.get(name, [])) for name in _STATED)
    refers = findings is not None and refers_to_impression(findings)
    impression = None if impression and refers_to_impression(impression) else impression
    return ReportSections(
        findings=impression if refers else findings,
        impression=impression,
        indication=_first_filled(found.get("indication", [])),
        technique=_first_filled(found.get("technique", [])),
        comparison=_first_filled(found.get("comparison", [])),
        addendum=" ".join(part for part in (*addenda, *later) if part) or None,
        has_findings_header=has_findings,
        body=body if _WORD.search(body) else "",
        findings_from_impression=refers and impression is not None,
    )


def refers_to_impression(findings: str) -> bool:
    """Whether a findings section contains only a reference ("See impression.", "None.")."""
    return _REFERENCE.fullmatch(findings) is not None


def _headers(report: str) -> Iterator[_Header]:
    """Headers that begin a section, in order."""
    current = ""
    for header, on_line in sorted(_candidates(report), key=lambda item: (item[0].start, -item[0].end)):
        if header.kind == "title" and current == "findings":
            continue
        upper = report[header.start : header.end].isupper()
        behind_sentence = _SENTENCE_END.search(report[max(header.start - 80, 0) : header.start]) is not None
        # For example "INDICATION: Cough FINDINGS: Clear", where no sentence ends before the second header.
        inside = upper and (current not in _STATED or header.kind in _STATED)
        if not on_line and not behind_sentence and not inside:
            continue
        current = header.kind
        yield header


def _candidates(report: str) -> Iterator[tuple[_Header, bool]]:
    """Yield (header, whether it begins a line); of several headers at one position, the longest."""
    taken = []
    for found in _LINE.finditer(report):
        name, end = found["name"], found["end"]
        kind = _kind(" ".join(name.upper().split()))
        marked = report[found.start() : found.start("name")].strip() or "*" in found[0]
        if kind is None or (kind == "title" and not (name.isupper() and end.startswith(":"))):
            continue
        if not end.startswith(":"):
            # Without a colon a name must look like a header, since a wrapped line may start with the same word.
            alone = kind in _ALONE and (marked or not name.islower())
            if not alone or (end and name.islower()):
                continue
        taken.append(found.span())
        yield _Header(kind, found.start(), found.end()), True
    for pattern in (_INSIDE, _SIGNED):
        for found in pattern.finditer(report):
            if any(a <= found.start("name") < b for a, b in taken):
                continue
            kind = _kind(" ".join(found["name"].upper().split())) if pattern is _INSIDE else "other"
            if kind is not None and (pattern is _SIGNED or not found["name"].islower()):
                yield _Header(kind, found.start("name"), found.end()), pattern is _SIGNED


@cache
def _kind(name: str) -> str | None:
    return next((kind for kind, names in _NAMES.items() if names.fullmatch(name)), None)


def _region(text: str) -> str:
    """Region that a text names: "chest", "elsewhere", or an empty string if it names none."""
    return "chest" if _CHEST.search(text) else "elsewhere" if _ELSEWHERE.search(text) else ""


def _without_next_title(section: str) -> tuple[str, str]:
    """Remove a last line that names the region of the next section ("ABDOMEN"); return the section and the region."""
    head, _, last = section.rstrip().rpartition("\n")
    region = _region(last) if len(last.split()) <= 6 and not last.rstrip().endswith(".") else ""
    return (head, region) if region else (section, "")


def _main_part(text: str) -> tuple[str, list[str]]:
    """Split a text into the report without its banner, and the addenda and wet reads."""
    blocks = [block for block in _RULE.split(text) if block.strip()]
    # Text above the banner of a later block is not part of that report.
    first = max((n for n, block in enumerate(blocks) if _BANNER.match(block.lstrip("\n"))), default=0)
    report, addenda = [], []
    for number, block in enumerate(blocks):
        banner = _BANNER.search(block)
        if number >= first and banner and _ASIDE.match(block):  # no line of underscores between the two
            addenda.append(block[: banner.start()])
            block = block[banner.end() :]
        (addenda if number < first or _ASIDE.match(block) else report).append(block)
    if not report:  # the text contains only a wet read or an addendum
        report, addenda = addenda, []
    return _BANNER.sub("", "\n\n".join(report)), [_line(block) for block in addenda]


def _line(text: str) -> str:
    return " ".join(text.split())


def _last(texts: list[str], chest: list[bool]) -> str | None:
    """The last text about the chest that is not empty, else the last text that is not empty."""
    filled = [(text, mine) for text, mine in zip(texts, chest, strict=True) if _filled(text)]
    return next((text for text, mine in reversed(filled) if mine), filled[-1][0] if filled else None)


def _filled(text: str) -> bool:
    return bool(_WORD.search(text) or _REFERENCE.fullmatch(text))


def _first_filled(texts: list[str]) -> str | None:
    return next((text for text in texts if _WORD.search(text)), None)

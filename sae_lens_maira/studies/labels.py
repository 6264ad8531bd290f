"""Label the 14 usual observations of a report by rules: present, uncertain or absent, with the evidence.

Text is cut into sentences and list items. A mention takes its status from the cues before and after it in the same
clause (`phrases` lists the mentions, `cues` the cues). Pseudo-negations ("no change", "not resolved") are masked first.
Of several mentions, present takes precedence over uncertain, and uncertain over absent. History and clauses about the
technique ("evaluation for edema is limited") are ignored. A text that cannot be read has unknown findings and is left
out of scores. Rule labels repeat what a report states; they are not a diagnosis.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from sae_lens_maira.studies import cues, phrases
from sae_lens_maira.studies.phrases import OBSERVATIONS
from sae_lens_maira.studies.segments import BULLET, folded, is_english, sentences, without_silent_sections


class RuleStatus(str, enum.Enum):
    """What a report states about an observation."""

    PRESENT = "present"
    UNCERTAIN = "uncertain"
    ABSENT = "absent"
    UNKNOWN = "unknown"
    """The text could not be read; only `no_finding` has this status."""


@dataclass(frozen=True)
class RuleLabel:
    """One observation's status and the words it was read from."""

    status: RuleStatus
    span: tuple[int, int]
    """Characters [start, end) of the mention in the text that was given."""
    evidence: str
    """The sentence of the mention, white space folded."""


_REACH = 300
"""Characters around a mention that are searched for cues; bounds the run time on texts without full stops."""
_MASK = "\u01c2"
"""A letter that no report contains; underscores stand for removed names in MIMIC-CXR."""
_RANK = {RuleStatus.PRESENT: 2, RuleStatus.UNCERTAIN: 1, RuleStatus.ABSENT: 0, RuleStatus.UNKNOWN: -1}


@cache
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Compile phrases or cues into one expression, expanding the abbreviations that `cues` explains."""
    body = "|".join(f"(?:{pattern})" for pattern in patterns)
    body = body.replace("can not", "(?:cannot|can not|can't)").replace("NOT", r"(?:not|cannot|\w+n't)")
    body = body.replace(" not", r"(?: not|n't)").replace(" ", r"[\s:-]+")
    return re.compile(rf"(?<!\w)(?:{body})(?!\w)")


def _mask(text: str, pattern: re.Pattern[str]) -> str:
    return pattern.sub(lambda found: _MASK * len(found[0]), text)


def _last_end(pattern: re.Pattern[str], text: str) -> int:
    return max((found.end() for found in pattern.finditer(text)), default=-1)


def _last(patterns: tuple[str, ...], text: str) -> re.Match[str] | None:
    matches = list(_compiled(patterns).finditer(text))
    return matches[-1] if matches else None


_VERB = r"(?:is|are|was|were|has|have|persists?|remains?|appears?)\b"
# A clause with its own verb, up to a comma, or to an "and" before another such clause.
_OWN_VERB = re.compile(
    rf"\b{_VERB}[^,]*?(?=,|\band\s+(?!{_VERB}|now\b|not\b)[\w-][^,]*?\b{_VERB})"
    r"|\bin (?:\w+ )?(?:place|position)\b(?=[\s,]+(?:and|with)\b)"
)
_HAS_VERB = re.compile(rf"(?:\s+[\w-]+){{0,2}}?\s+{_VERB}(?!\s+(?:[\w-]+\s+)?{cues.SHOWN}\b)")
_TASK = re.compile(rf"\b{cues.TASK}(?:\s+(?!{cues.RESULT}\b)[\w-]+){{0,7}}\s+$")
_LIMITED = re.compile(rf"\b{cues.LIMITED}\b")
_RESULT = re.compile(rf"\b(?:shows?|demonstrat\w+|reveal\w*|{_VERB})")
_DENIED = re.compile(r"\b(?:not|non|neither|nor|no|without)\b|n't\b")
_QUESTION_BEFORE = re.compile(r"\?\s*(?:[a-z-]+\s+){0,4}$")
_KNOWN = re.compile(r"\bknown(?:\s+[\w-]+){0,3}\s*$")
_ALTERNATIVE = re.compile(r"(?:\s+[\w-]+){0,2}?\s+or\b")


def _cut(between: str, after: str, device: bool, gone: bool) -> bool:
    """Whether a comma or "and" after a negation begins a positive statement: "no edema, small effusion".

    Args:
        between: Words between the negation and the mention.
        after: Words after the mention.
        device: Whether the mention is a device, which no list of denied findings contains.
        gone: Whether the negation is "resolution of", which "and" continues.
    """
    if _MASK in between:  # a masked phrase, such as "no change in"
        return True
    joint = r",\s+(?:and\s+)?" if gone else r"(?:,\s+(?:and\s+)?|\band\s+)"
    cut = re.search(rf"{joint}(?:an?\s+)?{cues.SIZE_WORDS}\b", between)
    if cut is None and device:
        cut = re.search(",", between)
    if cut is None and _HAS_VERB.match(after):
        cut = re.search(r"(?:,|\band\b)(?:\s+[\w-]+){0,3}\s*$", between)
    return cut is not None and not re.search(r"\b(?:or|nor)\b", between[cut.end() :] + after)


def _governs(between: str) -> bool:
    """Whether a cue after `between` applies to the mention before it: a list without another clause or explanation."""
    listed = "," not in between or re.search(r"\b(?:and|or)\b|/", between) is not None
    clause = re.search(r",\s+and (?:an?|the)\b", between) is not None
    return listed and not clause and not re.search(cues.EXPLAINS, between)


def _reaches_back(patterns: tuple[str, ...], after: str) -> bool:
    """Whether one of the cues in `after` governs the mention."""
    return any(_governs(after[: cue.start()]) for cue in _compiled(patterns).finditer(after))


def _is_removed(before: str, near: str, after: str) -> bool:
    """Whether the device between `before` and `after` is no longer in place."""
    cue = _last(cues.REMOVED_BEFORE, before)
    if cue is None:
        return _compiled(cues.REMOVED_AFTER).search(near) is not None and not _last(cues.PART_BEFORE, before)
    between = before[cue.end() :]
    stays = re.search(r"\b(?:with|while|but)\b", between) and re.match(
        r"\s+(?:is |are )?(?:remain|still|unchanged)", after
    )
    return (
        not stays
        and not re.search(cues.PLACED, between)
        and not (re.search(r",|\band\b", between) and _HAS_VERB.match(after))
    )


def _is_extent(before: str, after: str) -> bool:
    """Whether a cue is about the extent or a part of what is mentioned: "the tip of the tube is not seen"."""
    return _last(cues.EXTENT_BEFORE, before) is not None or re.match(cues.TIP_AFTER, after) is not None


def _states_nothing(sentence: str, before: str, after: str, start: int, end: int) -> bool:
    """Whether the mention belongs to the history or to a clause about the technique."""
    history = _last(cues.NO_STATEMENT_BEFORE, before)
    if history and not _RESULT.search(before[history.end() :]):
        return True
    if _compiled(cues.MISSED_BEFORE).search(before):
        return True
    if re.match(cues.SEEN_ELSEWHERE, after):
        return True
    known = _is_extent(before, after) or _KNOWN.search(before)
    if _reaches_back(cues.NO_STATEMENT_AFTER, after) and not known:
        return True
    around = sentence[max(start - _REACH, 0) : end + _REACH]
    return _TASK.search(before) is not None and _LIMITED.search(around) is not None


def _before(sentence: str, start: int) -> str:
    """Words before a mention that can affect it: those of its clause, after a label such as "Lungs:"."""
    before = sentence[max(start - _REACH, 0) : start]
    before = before[max(_last_end(_compiled(cues.TERMINATION), before), 0) :]
    label, colon, rest = before.rpartition(":")
    return before if colon and _of_list(label, True) is not None else rest


def _after(sentence: str, end: int) -> str:
    """Words after a mention that can affect it: up to the next clause or label."""
    text = re.sub(cues.APPOSITION, " ", sentence[end : end + _REACH])
    stop = _compiled(cues.TERMINATION).search(text)
    text = text[: stop.start() if stop else len(text)][:70]
    label = re.search(r"[,;.]\s+[\w /-]+:", text)
    text = text[: label.start()] if label else text
    own = _OWN_VERB.search(text)
    return text[: own.end()] if own else text


def _asks_of_another(after: str, observation: str) -> bool:
    """Whether a bracket after a mention asks about another observation: "opacity (? pneumonia)"."""
    bracket = re.match(r"\s*\(\s*\?\s*([^)]*)", after)
    others = (known for name, known in phrases.PHRASES.items() if name != observation)
    return bracket is not None and any(_compiled(known).search(bracket[1]) for known in others)


def _status(
    sentence: str, start: int, end: int, carried: RuleStatus | None, observation: str
) -> RuleStatus | None:
    """Status of the mention at [start, end) of a lower-case sentence; None where it states nothing.

    `carried` is the status that a question mark, or the line before a list, gives to its mentions.
    """
    before, after = _before(sentence, start), _after(sentence, end)
    near = re.split("[,;]", after, maxsplit=1)[0]
    label = re.match(cues.LABEL, after)
    if label and _compiled(phrases.PHRASES[observation]).search(sentence, end + label.end()):
        return None
    after = after[: label.start() + 1] if label and not re.match(cues.VALUE, after) else after
    if re.match(cues.VALUE_PRESENT, after):
        return RuleStatus.PRESENT
    if re.match(cues.VALUE_ABSENT, after):
        return RuleStatus.ABSENT
    if "which" not in sentence[start:end] and _states_nothing(sentence, before, after, start, end):
        return None
    if _DENIED.search(sentence[start:end]):
        return RuleStatus.ABSENT
    if re.search(cues.DOUBTED, sentence[start:end]):
        return RuleStatus.UNCERTAIN
    if carried is not None:
        return carried
    if _QUESTION_BEFORE.search(before) or (
        re.match(rf"\s*\(\?\)|{cues.VALUE_UNCERTAIN}", after) and not _asks_of_another(after, observation)
    ):
        return RuleStatus.UNCERTAIN
    device = observation == "support_devices"
    if device and _is_removed(before, near, after):
        return RuleStatus.ABSENT
    if _reaches_back(cues.UNLIKELY_AFTER, near) or (
        _last(cues.LIKELIHOOD_BEFORE, before) and _compiled(cues.LOW_AFTER).search(near)
    ):
        return RuleStatus.ABSENT
    if _reaches_back(cues.LESS_LIKELY_AFTER, near) or (
        _reaches_back(cues.UNCERTAIN_AFTER, after) and not _is_extent(before, after)
    ):
        return RuleStatus.UNCERTAIN
    if _reaches_back(cues.VERSUS_AFTER, re.split(r"\bwith\b|\(", after, maxsplit=1)[0]):
        return RuleStatus.UNCERTAIN
    part = _last(cues.PART_BEFORE, before) or _is_extent(before, after)
    if _reaches_back(cues.NEGATION_AFTER, after) and not part:
        return RuleStatus.ABSENT
    negation = _last(cues.NEGATION_BEFORE, before)
    doubt = _last(cues.UNCERTAIN_BEFORE, before)
    gone = negation is not None and re.match("resol|clear|absence|disap", negation[0]) is not None
    if negation and not _cut(before[negation.end() :], sentence[end:], device, gone):
        if gone and _compiled(cues.RESIDUE_AFTER).search(after):
            return RuleStatus.PRESENT
        if re.search(r"\bcan be (?:\w+ )?(?:excluded|ruled out)", after):
            return RuleStatus.UNCERTAIN
        # "cannot exclude" contains both cues; a doubt after or around the negation takes precedence.
        return RuleStatus.UNCERTAIN if doubt and doubt.end() > negation.start() else RuleStatus.ABSENT
    cause = re.search(cues.CAUSES, sentence[:start])
    if cause and (re.search(r"\bor\b", cause[0]) or _ALTERNATIVE.match(after)):
        return RuleStatus.UNCERTAIN
    if re.search(cues.SUBJECT_OF_DOUBT, before):
        return RuleStatus.PRESENT
    if re.match(cues.EXPLAINED_AWAY, sentence[end : end + _REACH]):
        return RuleStatus.UNCERTAIN
    if doubt and len(before) - doubt.end() <= 70:
        return RuleStatus.UNCERTAIN
    return RuleStatus.PRESENT


def _mentions(sentence: str, carried: RuleStatus | None) -> Iterator[tuple[str, int, int, RuleStatus | None]]:
    masked = _mask(sentence, _compiled(cues.PSEUDO_NEGATION))
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
                yield observation, *found.span(), _status(masked, *found.span(), carried, observation)


def _of_list(line: str, colon: bool) -> RuleStatus | None:
    """Status that a line gives to the list after it: absent after "negative for:", uncertain after "differential:"."""
    body = line.strip().rstrip(": ")
    body = re.sub(r"\s+(?:the )?following$|(?<=differential)(?:\s+\w+){1,3}$", "", body)
    negation = _last(cues.NEGATION_BEFORE, f"{body}:")
    if negation and negation.end() == len(body) and (colon or negation.start() == 0):
        return RuleStatus.ABSENT
    doubt = _last(cues.UNCERTAIN_BEFORE, body)
    return RuleStatus.UNCERTAIN if colon and doubt and doubt.end() == len(body) else None


def rule_labels(text: str) -> dict[str, RuleLabel]:
    """Label the 14 usual observations of a report.

    Args:
        text: A report, whole or one of its sections; sections that only ask (indication, technique) are skipped.

    Returns:
        Observation -> label, for the observations that are mentioned. `no_finding` is present if the text is readable
        and no observation except support devices is present or uncertain. If the text is not English or states nothing
        ("None.", "See above."), `no_finding` is unknown and the only entry. Otherwise `no_finding` has no entry.
    """
    if not text.strip():
        return {}
    unknown = {"no_finding": RuleLabel(RuleStatus.UNKNOWN, (0, len(text)), " ".join(text.split()))}
    if not is_english(text):
        return unknown
    stated, positions = folded(without_silent_sections(text))
    labels: dict[str, RuleLabel] = {}
    heading: RuleStatus | None = None
    for offset, sentence, asked in sentences(stated):
        lower = sentence.lower()
        if lower.strip() and not BULLET.match(lower):
            heading = None
        carried = heading or (RuleStatus.UNCERTAIN if asked else None)
        for observation, start, end, status in _mentions(lower, carried):
            old = labels.get(observation)
            if status is not None and (old is None or _RANK[status] > _RANK[old.status]):
                evidence = " ".join(BULLET.sub("", sentence).split())
                span = (positions[offset + start], positions[offset + end - 1] + 1)
                labels[observation] = RuleLabel(status, span, evidence)
        heading = heading or _of_list(lower, lower.rstrip().endswith(":"))
    masked = _mask(stated.lower(), _compiled(cues.PSEUDO_NEGATION))
    found = _compiled(cues.NORMAL_PHRASES).search(masked)
    if not labels and found is None:
        return {} if _compiled(cues.OTHER_STATEMENTS).search(masked) else unknown
    troubled = [
        o for o, label in labels.items() if label.status is not RuleStatus.ABSENT and o != "support_devices"
    ]
    if not troubled:
        span = (positions[found.start()], positions[found.end() - 1] + 1) if found else (0, len(text))
        labels["no_finding"] = RuleLabel(RuleStatus.PRESENT, span, " ".join(text[slice(*span)].split()))
    return labels


def is_unknown(labels: dict[str, RuleLabel]) -> bool:
    """Whether `rule_labels` could not read the text."""
    return "no_finding" in labels and labels["no_finding"].status is RuleStatus.UNKNOWN


def present_observations(texts: Iterable[str]) -> list[frozenset[str]]:
    """Observations that each report states as present."""
    return [
        frozenset(o for o, label in rule_labels(text).items() if label.status is RuleStatus.PRESENT)
        for text in texts
    ]

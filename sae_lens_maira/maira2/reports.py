"""Parse and write MAIRA-2's output: plain text, or findings with boxes.

    <obj>text<box><x10><y20><x40><y60></box>...</obj>      coordinate = (bin + 0.5) / 100

Boxes are x_min, y_min, x_max, y_max, relative to the centre square crop of the frontal image (`images.py`
maps them to the whole image). If generation is cut off or repeats itself, complete findings are kept and everything
else is returned as `leftover`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sae_lens_maira.errors import PromptError
from sae_lens_maira.token_roles import BOX_END, BOX_START, COORDINATE_BINS, OBJECT_END, OBJECT_START

Box = tuple[float, float, float, float]

_OBJECT = re.compile(f"{OBJECT_START}((?:(?!{OBJECT_START}).)*?){OBJECT_END}", re.DOTALL)
_BOX = re.compile(rf"{BOX_START}\s*<x(\d\d?)>\s*<y(\d\d?)>\s*<x(\d\d?)>\s*<y(\d\d?)>\s*{BOX_END}")
_MARK = re.compile(r"</?obj>|</?box>|<[xy]\d\d?>")


@dataclass(frozen=True)
class GroundedFinding:
    """One statement and its boxes, `(x_min, y_min, x_max, y_max)` in 0..1; no boxes if it is ungrounded."""

    text: str
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class ParsedReport:
    """Report parsed from the model's output.

    Args:
        text: Text of the report; for grounded output the texts of its complete findings, joined by a space.
        findings: Complete findings of grounded output; empty for plain output.
        complete: Whether the output ended with `</s>` and all of it could be parsed.
        leftover: Parts that could not be parsed, in their order.
    """

    text: str
    findings: tuple[GroundedFinding, ...] = ()
    complete: bool = True
    leftover: str = ""


def parse_report(text: str, closed: bool = True) -> ParsedReport:
    """Parse the model's output text.

    Args:
        text: Decoded output with its grounding tokens.
        closed: Whether the output ended with `</s>` (False if it was cut off).
    """
    if not _MARK.search(text):
        return ParsedReport(text=text.strip(), complete=closed)
    findings: list[GroundedFinding] = []
    rest: list[str] = []
    end = 0
    for found in _OBJECT.finditer(text):
        rest.append(text[end : found.start()])
        finding, unread = _read_object(found.group(1))
        findings += [finding] if finding is not None else []
        rest.append(unread)
        end = found.end()
    rest.append(text[end:])
    leftover = " ".join(piece.strip() for piece in rest if piece.strip())
    prose = " ".join(finding.text for finding in findings)
    return ParsedReport(
        text=prose, findings=tuple(findings), complete=closed and not leftover, leftover=leftover
    )


def format_grounded(findings: Iterable[Any]) -> str:
    """Write findings (objects with `text` and `boxes`) in the model's format; the inverse of `parse_report`.

    Raises:
        PromptError: A text is blank or contains grounding tokens, or a box is not ordered within 0..1.
    """
    return "".join(_write_object(finding.text, finding.boxes or ()) for finding in findings)


def teacher_text(study: Any, task: str, phrase: str | None) -> str:
    """Report of a study, as the expected output of a task.

    Args:
        study: Study with `report` and `grounded_report`.
        task: "findings", "grounded" or "phrase".
        phrase: Text of the grounded finding, for task "phrase".

    Raises:
        PromptError: The study has no such report.
    """
    if task == "findings":
        if not study.report:
            raise PromptError(
                "The study has no report to append; give one, or encode without report='teacher'."
            )
        return study.report
    findings = study.grounded_report or ()
    if task == "phrase":
        findings = [finding for finding in findings if finding.text.strip() == str(phrase).strip()]
    if not findings:
        raise PromptError(
            f"The study has no grounded finding to append for task {task!r}"
            + (f" and phrase {phrase!r}" if task == "phrase" else "")
            + "; give a grounded_report, or encode without report='teacher'."
        )
    return format_grounded(findings)


def box_to_bins(box: Sequence[float]) -> tuple[int, int, int, int]:
    """Convert a box `(x_min, y_min, x_max, y_max)` in 0..1 to its four coordinate bins (0..99).

    Raises:
        PromptError: The box is not ordered within 0..1.
    """
    values = [float(value) for value in box]
    ordered = len(values) == 4 and 0 <= values[0] <= values[2] <= 1 and 0 <= values[1] <= values[3] <= 1
    if not ordered:
        raise PromptError(
            f"The box {tuple(values)} is not (x_min, y_min, x_max, y_max) with 0 <= min <= max <= 1. Give"
            " coordinates relative to the frontal image's centre square; `box_to_crop` converts from the"
            " whole image."
        )
    x_min, y_min, x_max, y_max = (
        min(int(value * COORDINATE_BINS + 1e-9), COORDINATE_BINS - 1) for value in values
    )
    return x_min, y_min, x_max, y_max


def _read_object(inner: str) -> tuple[GroundedFinding | None, str]:
    boxes, unread = [], []
    start = _MARK.search(inner)
    text, tail = (inner[: start.start()], inner[start.start() :]) if start else (inner, "")
    end = 0
    for found in _BOX.finditer(tail):
        unread.append(tail[end : found.start()])
        x_min, y_min, x_max, y_max = (int(number) for number in found.groups())
        if x_min <= x_max and y_min <= y_max:
            boxes.append(tuple((number + 0.5) / COORDINATE_BINS for number in (x_min, y_min, x_max, y_max)))
        else:
            unread.append(found.group(0))
        end = found.end()
    unread.append(tail[end:])
    leftover = " ".join(piece.strip() for piece in unread if piece.strip())
    text = text.strip()
    return (GroundedFinding(text, tuple(boxes)) if text else None), leftover


def _write_object(text: str, boxes: Iterable[Sequence[float]]) -> str:
    if not text.strip() or _MARK.search(text):
        raise PromptError(
            f"A grounded finding has the text {text!r}; it must be prose without grounding tokens. Give the"
            " boxes separately from the text."
        )
    written = []
    for box in boxes:
        x_min, y_min, x_max, y_max = box_to_bins(box)
        written.append(f"{BOX_START}<x{x_min}><y{y_min}><x{x_max}><y{y_max}>{BOX_END}")
    return f"{OBJECT_START}{text.strip()}{''.join(written)}{OBJECT_END}"

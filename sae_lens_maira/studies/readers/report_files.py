"""Read a report file into sections, or return the reason why there are none."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sae_lens_maira.errors import StudyError
from sae_lens_maira.studies.readers.imported import SkipReason
from sae_lens_maira.studies.sections import ReportSections, parse_sections


class Report(NamedTuple):
    """Text that a model is trained on, and a remark if it is not the findings section."""

    text: str
    remark: str | None = None


def read_report_file(path: Path) -> ReportSections | SkipReason:
    """Read the sections of a report file, or return the reason why there are none.

    Raises:
        StudyError: The file exists but cannot be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return SkipReason.NO_REPORT
    except OSError as error:
        raise StudyError(
            f"The report {path} exists but could not be read ({error}); expected a readable file. Check its "
            "permissions and the disk."
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return SkipReason.NOT_TEXT
    if "\x00" in text or "\ufffd" in text:
        return SkipReason.NOT_TEXT
    found = parse_sections(text)
    return found if found.body else SkipReason.EMPTY_REPORT


def findings_of(found: ReportSections) -> Report | SkipReason:
    """Findings of a report, its whole text if it has no headers, or the reason why there is neither.

    A findings section that only refers to the impression ("See impression.") is replaced by the impression.
    """
    if found.findings:
        return Report(
            found.findings, "findings taken from the impression" if found.findings_from_impression else None
        )
    if found.has_findings_header:
        return SkipReason.EMPTY_FINDINGS
    named = (found.impression, found.indication, found.technique, found.comparison)
    return SkipReason.NO_FINDINGS if any(named) else Report(found.body)


__all__ = ["Report", "findings_of", "read_report_file"]

"""Read delimited text files exactly as written, or refuse them with the line number.

pandas shifts columns silently where a row has more cells than the header (an unquoted comma in a report), and fills
rows with fewer cells. Here every row has exactly the header's number of cells, empty lines aside, and the separator
(comma, semicolon, tab) and the encoding (UTF-8, or UTF-16 with a byte order mark) are read from the file.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from sae_lens_maira.errors import StudyError

SEPARATORS = (",", ";", "\t", "|")
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_FIELD_LIMIT = 1 << 30
TEXT = pd.StringDtype("pyarrow")


def csv_frame(
    path: Path, errors: str = "strict", known: Iterable[str] = (), columns: Iterable[str] | None = None
) -> pd.DataFrame:
    """Read the cells of a delimited file as text, "" where empty; "NA" and "None" are kept as text.

    Args:
        path: File with a header line, also compressed (.gz).
        errors: "strict", or "replace" to read bytes that are not UTF-8 as U+FFFD.
        known: Column names that are expected; they decide the separator where two are possible.
        columns: Columns to keep; all if not given.

    Raises:
        StudyError: The file is missing, empty or not UTF-8, a row has more or fewer cells than the header, a quoted
            cell does not end, or a column is missing or named twice. The line is named.
    """
    lines = _text(path, errors)
    separator = _separator(lines, set(known))
    rows = _rows(lines, separator, path)
    _, header = next(rows, (0, []))
    header = [name.strip() for name in header]
    if not any(header):
        raise StudyError(f"The table {path} is empty; expected a header line and one row per study.")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise StudyError(
            f"The header of {path} names the column {twice[0]!r} {header.count(twice[0])} times; expected each name "
            "once. Rename or remove a column."
        )
    wanted = list(header) if columns is None else list(columns)
    missing = [name for name in wanted if name not in header]
    if missing:
        raise StudyError(
            f"{path} has no column {missing[0]!r}; its columns, separated by a {_NAMES[separator]}, are "
            f"{', '.join(header[:12])}. Expected {', '.join(wanted)}."
        )
    cells = _checked(rows, header, separator, path)
    places = [header.index(name) for name in wanted]
    kept: list[list[str]] = [[] for _ in wanted]
    for row in cells:
        for column, place in zip(kept, places, strict=True):
            column.append(row[place])
    names = [name or f"unnamed column {place + 1}" for name, place in zip(wanted, places, strict=True)]
    return pd.DataFrame(
        {name: pd.array(column, dtype=TEXT) for name, column in zip(names, kept, strict=True)}
    )


def _text(path: Path, errors: str) -> str:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise StudyError(
            f"The table {path} could not be read ({error}); expected a CSV file with a header line. Check the path."
        ) from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif data[:200].count(b"\0") > len(data[:200]) // 4:
        raise StudyError(
            f"The table {path} looks like UTF-16 without a byte order mark (every second byte is zero); expected "
            "UTF-8. Convert it, for instance with `iconv -f UTF-16LE -t UTF-8`."
        )
    else:
        encoding = "utf-8-sig"
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise StudyError(
            f"Line {line} of the table {path} is not UTF-8 ({error.reason}); expected UTF-8. Save it as UTF-8, for "
            "instance with `iconv -f WINDOWS-1252 -t UTF-8`."
        ) from error


def _separator(text: str, known: set[str]) -> str:
    """Separator whose header has the most known names, then the most names; a comma if these tie."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    best, score = ",", (-1, -1)
    for separator in SEPARATORS:
        names = next(csv.reader([header], delimiter=separator), [])
        found = (len(known & {name.strip() for name in names}), len(names) > 1)
        if found > score:
            best, score = separator, found
    return best


def _rows(text: str, separator: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, cells) for every row that is not empty."""
    limit = csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells and (len(cells) > 1 or cells[0].strip()):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise StudyError(
            f"Line {line} of the table {path} could not be read ({error}). A quoted cell must end with a quote before "
            'the next separator, and a quote inside it is written twice (""). Write the table again with a CSV writer.'
        ) from error
    finally:
        csv.field_size_limit(limit)


def _checked(
    rows: Iterable[tuple[int, list[str]]], header: list[str], separator: str, path: Path
) -> Iterator[list[str]]:
    for line, cells in rows:
        if len(cells) == len(header):
            yield cells
            continue
        more = len(cells) > len(header)
        cause = (
            f"The likely cause is a {_NAMES[separator]} inside a text that is not quoted"
            if more
            else "The likely cause is a line that was cut, or a line break inside a text that is not quoted"
        )
        shown = " | ".join(
            f"{name}={cell[:30]}" for name, cell in itertools.islice(zip(header, cells, strict=False), 4)
        )
        raise StudyError(
            f"Line {line} of the table {path} has {len(cells)} cells where the header names {len(header)} columns, "
            f"separated by a {_NAMES[separator]} ({shown}). {cause}. Put texts in double quotes, or save the table as "
            "Parquet."
        )


__all__ = ["SEPARATORS", "csv_frame"]

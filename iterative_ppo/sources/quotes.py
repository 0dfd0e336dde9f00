"""Quotes of a CSV file that are not closed, or closed before their field ends: what Arrow reads of them is not so."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from iterative_ppo.errors import SourceError
from iterative_ppo.sources.log import BadDialogueError, SetAside, set_aside, short

_QUOTED = r'"(?:[^"]++|"")*+"'
_FIELD = rf'(?:{_QUOTED}|(?!"))[^,\r\n]*+'
_RECORD = re.compile(rf'(?:{_FIELD},)*+(?:{_FIELD}(?:\r\n?|\n|\Z)|(?P<open>".*))', re.DOTALL)
_STRAY = re.compile(rf'(?:(?:{_QUOTED}|(?!")[^,\r\n]*+),)*+(?P<quoted>{_QUOTED})(?P<more>[ \t]*+[^,\s][^,\r\n]*+)')
"""A record with text after the closing quote of a field."""
_BREAK = re.compile(r"\r\n?|\n")
_CLOSES = re.compile(r'(?:[^"]++|"")*+"(?:,|\Z)')
"""A line within quotes that ends them as it should."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """The lines of a record that takes several, and its problem where text follows a closing quote."""

    lines: list[str]
    stray: BadDialogueError | None = None


def fields_of(line: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> list[str]:
    """The fields of one record, or of the beginning of one that is longer than the csv module takes."""
    return next(csv.reader([line[: csv.field_size_limit()]], quoting=quoting), [])


def suspects(file: Path, text: str, header: Sequence[str]) -> dict[int, Suspect]:
    """The records that may not be what they seem, by row; the header is row 0.

    Raises SourceError where a quote is open at the end, or the quotes within a field are escaped by a backslash.
    """
    found = {}
    records = (match for match in _RECORD.finditer(text) if match[0].strip("\r\n"))
    for row, match in enumerate(records):
        stray = _STRAY.match(match[0])
        opens = match.start() + stray.start("quoted") if stray else match.start("open")
        if '\\"' in (stray["quoted"] if stray else match["open"] or ""):
            place = _place(file, row, text, match.start(), opens, header)
            expected = "expected quotes within a field to be doubled, found them escaped by a backslash"
            raise SourceError(f"{place}: {expected}; double them, or write Parquet or JSON Lines")
        if match["open"]:
            place = _place(file, row, text, match.start(), match.start("open"), header)
            raise SourceError(f"{place}: expected a closing quote, found the end of the file; close it or double it")
        lines = _BREAK.split(match[0].rstrip("\r\n"))
        if len(lines) > 1 or stray:
            found[row] = Suspect(lines, _problem(stray, row, header) if stray and row else None)
    return found


def lost(file: Path, row: int, suspect: Suspect, header: Sequence[str], broken: bool) -> list[SetAside]:
    """The conversations of a record that is not what it seems, and of the rows in its quotes; none where it is.

    A line is a row where it does not close the quotes and, read on its own, has an id, a whole number as turn and as
    many fields as the header; in a record that is `broken`, which is set aside anyhow, the id and the turn are enough.
    """
    lines, broken = suspect.lines, broken or suspect.stray is not None
    rows = (line for line in lines[1:] if not _CLOSES.match(line))
    inside = [name for line in rows if (name := _conversation(line, header, broken))]
    problem = suspect.stray
    if inside:
        unclosed = (
            f"a quote that is opened and not closed?: expected one row, found {len(lines) - 1} more lines in its "
            "quotes, which could not be read; close the quote, or double it where it is text"
        )
        problem = BadDialogueError(unclosed, _last_field(lines[0], header), row)
    if problem is None:
        return []
    named = dict(zip(header, fields_of(lines[0]), strict=False)).get("conversation_id")
    own = _conversation(lines[0], header, broken=True) or named
    return [set_aside(name, file, problem) for name in dict.fromkeys([own, *inside])]


def _place(file: Path, row: int, text: str, begins: int, opens: int, header: Sequence[str]) -> str:
    line = len(_BREAK.findall(text, 0, opens)) + 1
    return f"{file}, row {row} (line {line}), field {_last_field(text[begins : opens + 1], header)!r}"


def _problem(stray: re.Match[str], row: int, header: Sequence[str]) -> BadDialogueError:
    found = f"expected a comma or the line's end, found {short(stray['more'])}"
    problem = f"text after a closing quote: {found}; double the quotes that are text"
    return BadDialogueError(problem, _last_field(stray[0], header), row)


def _last_field(record: str, header: Sequence[str]) -> str:
    return header[: len(fields_of(record))][-1]


def _conversation(line: str, header: Sequence[str], broken: bool) -> str | None:
    """The conversation of a line that is a row, also where a stray quote in it hides the fields after it."""
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        fields = fields_of(line, quoting)
        record = dict(zip(header, fields, strict=False))
        whole = broken or len(fields) == len(header)
        if whole and record.get("conversation_id") and re.fullmatch(r"\d+(\.0*)?", record.get("turn", "")):
            return record["conversation_id"]
    return None

"""Quotes of a CSV file that are opened and not closed: the rows after them end up inside one field."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from iterative_ppo.errors import SourceError
from iterative_ppo.sources.log import BadDialogueError, SetAside, set_aside

_FIELD = r'(?:"(?:[^"]++|"")*+"|(?!"))[^,\r\n]*+'
_RECORD = re.compile(rf'(?:{_FIELD},)*+(?:{_FIELD}(?:\r\n?|\n|\Z)|(?P<open>").*)', re.DOTALL)
_BREAK = re.compile(r"\r\n?|\n")
_CLOSES = re.compile(r'(?:[^"]++|"")*+"(?:,|\Z)')
"""A line within quotes that ends them as it should."""


def fields_of(line: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> list[str]:
    """The fields of one record, or of the beginning of one that is longer than the csv module takes."""
    return next(csv.reader([line[: csv.field_size_limit()]], quoting=quoting), [])


def long_records(file: Path, text: str, header: Sequence[str]) -> dict[int, list[str]]:
    """The lines of each record that takes several, by its row. Raises SourceError where a quote is open at the end."""
    found = {}
    records = (match for match in _RECORD.finditer(text) if match[0].strip("\r\n"))
    for row, match in enumerate(records):
        if match["open"]:
            column = _last_field(text[match.start() : match.end("open")], header)
            line = len(_BREAK.findall(text, 0, match.start("open"))) + 1
            place = f"{file}, row {row} (line {line}), field {column!r}"
            raise SourceError(f"{place}: expected a closing quote, found the end of the file; close it or double it")
        lines = _BREAK.split(match[0].rstrip("\r\n"))
        if len(lines) > 1:
            found[row] = lines
    return found


def swallowed(file: Path, row: int, lines: Sequence[str], header: Sequence[str], broken: bool) -> list[SetAside]:
    """The conversations of a record and of the rows in its quotes; none where its lines are those of a message.

    A line is a row where it does not close the quotes and, read on its own, has an id, a whole number as turn and as
    many fields as the header; in a record that is `broken`, which is set aside anyhow, the id and the turn are enough.
    """
    rows = (line for line in lines[1:] if not _CLOSES.match(line))
    inside = [name for line in rows if (name := _conversation(line, header, broken))]
    if not inside:
        return []
    own = _conversation(lines[0], header, broken=True)
    column = _last_field(lines[0], header)
    problem = (
        f"a quote that is opened and not closed?: expected one row, found {len(lines) - 1} more lines in its quotes, "
        "which could not be read; close the quote, or double it where it is text"
    )
    return [set_aside(name, file, BadDialogueError(problem, column, row)) for name in dict.fromkeys([own, *inside])]


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

"""Records of a team's own log: Parquet, CSV or JSON Lines, each with the file and the row that it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from io import BytesIO
from itertools import chain, count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv as arrow_csv

from iterative_ppo.errors import SourceError, did_you_mean
from iterative_ppo.sources.log import BadDialogueError, SetAside, files_in, read_text, set_aside, short
from iterative_ppo.sources.quotes import fields_of, lost, suspects

SUFFIXES = (".parquet", ".csv", ".jsonl")
NEARLY = 0.85
"""Likeness from which an unknown column is taken for a misspelt one, not for a column of the team's own."""

LARGEST_BLOCK = 2**31 - 1
"""Of CSV that Arrow takes, in bytes; a record has to fit."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record. `number` counts records from 1; in JSON Lines it is the line."""

    file: Path
    number: int
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """All records of a log in order, its columns, and the records that could not be read."""

    rows: list[Row] = field(default_factory=list)
    unreadable: list[SetAside] = field(default_factory=list)


def read_rows(path: Path, required: Iterable[str], optional: Iterable[str]) -> Rows:
    """Read a file, or all .parquet, .csv and .jsonl files of a folder in name order.

    Columns that are neither required nor optional are left alone. Raises SourceError where a file is absent, damaged
    or of another kind, where a required column is missing or one seems misspelt, and where there is no record at all.
    """
    files = files_in(path, *SUFFIXES) if path.is_dir() else [path]
    required, optional = list(required), list(optional)
    log = Rows()
    for file in files:
        before = len(log.rows)
        _reader(file)(file, log)
        columns = list(dict.fromkeys(name for row in log.rows[before:] for name in row.values))
        if columns:
            _check_columns(file, columns, required, optional)
    if not log.rows:
        first = f"; the first problem: {log.unreadable[0].reason}" if log.unreadable else ""
        raise SourceError(f"{path}: expected a row a turn, found no readable row{first}")
    return log


def _reader(file: Path) -> Any:
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_json_lines}
    if not file.exists():
        raise SourceError(f"{file}: no such file; check source.path")
    if file.suffix.lower() not in readers:
        raise SourceError(f"{file}: expected a file that ends in {', '.join(SUFFIXES)}; convert or rename it")
    return readers[file.suffix.lower()]


def _check_columns(file: Path, columns: list[str], required: list[str], optional: list[str]) -> None:
    unknown = [name for name in columns if name not in {*required, *optional}]
    _check_spelling(file, unknown, {*required, *optional} - {*columns}, 1.0)
    for name in required:
        if name not in columns:
            raise SourceError(f"{file}: column {name!r} is missing{did_you_mean(name, unknown)}; found {columns}")
    _check_spelling(file, unknown, {*optional} - {*columns}, NEARLY)


def _check_spelling(file: Path, unknown: Iterable[str], absent: Iterable[str], likeness: float) -> None:
    """Refuse an unknown column that is, in upper or lower case, as like to an absent one as that; 1 is the same."""
    folded = {name.casefold(): name for name in absent}
    for name in unknown:
        near = get_close_matches(name.strip().casefold(), folded, n=1, cutoff=likeness)
        if near:
            raise SourceError(f"{file}: unknown column {name!r} (did you mean {folded[near[0]]!r}?); rename it")


def _read_parquet(file: Path, log: Rows) -> None:
    try:
        table = pq.read_table(file, partitioning=None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: expected a Parquet file, {_first_line(error)}; write it again") from None
    columns = [_values(file, name, column) for name, column in zip(table.column_names, table.columns, strict=True)]
    records = (dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True))
    log.rows.extend(Row(file, number, record) for number, record in enumerate(records, start=1))


def _values(file: Path, name: str, column: pa.ChunkedArray) -> list[Any]:
    values: list[Any] = []
    try:
        for value in column:
            values.append(value.as_py())
    except (ValueError, OverflowError, LookupError) as error:  # a time that Python cannot hold, an unknown zone
        place = f"{file}, row {len(values) + 1}, field {name!r}"
        problem = f"expected a {column.type} that Python can hold, found {_first_line(error)}"
        raise SourceError(f"{place}: {problem}; mend it and write the file again") from None
    return values


def _read_csv(file: Path, log: Rows) -> None:
    r"""Nothing between two commas is null, and so is MySQL's \N; two quotes between them are the empty text."""
    text = read_text(file)
    header = fields_of(text.lstrip().splitlines()[0])
    _check_delimiter(file, header)
    if len(set(header)) < len(header):
        raise SourceError(f"{file}: two columns have the same name; found {header}")
    suspected = suspects(file, text, header)
    bad: dict[int, arrow_csv.InvalidRow] = {}

    def skip(row: arrow_csv.InvalidRow) -> str:
        bad[row.number - 1] = row  # Arrow counts the header
        return "skip"

    content = text.encode()
    try:
        table = arrow_csv.read_csv(
            BytesIO(content),
            arrow_csv.ReadOptions(use_threads=False, block_size=min(len(content), LARGEST_BLOCK)),
            arrow_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
            arrow_csv.ConvertOptions(
                column_types={name: pa.string() for name in header},
                null_values=["", r"\N"],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowException as error:
        raise SourceError(f"{file}: expected CSV with a header, {_first_line(error)}") from None
    gone = {number: lost(file, number, record, header, number in bad) for number, record in suspected.items()}
    numbers = (number for number in count(1) if number not in bad)
    records = zip(numbers, table.to_pylist(), strict=False)
    log.rows.extend(Row(file, number, record) for number, record in records if not gone.get(number))
    log.unreadable.extend(chain.from_iterable(gone.values()))
    log.unreadable.extend(_unreadable_csv(file, number, header, row) for number, row in bad.items())


def _check_delimiter(file: Path, header: list[str]) -> None:
    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if other:
        raise SourceError(f"{file}: the header has one column with {other!r} in it: expected commas; convert the file")


def _unreadable_csv(file: Path, number: int, header: list[str], row: arrow_csv.InvalidRow) -> SetAside:
    found = dict(zip(header, fields_of(row.text), strict=False))
    problem = f"expected {row.expected_columns} columns, found {row.actual_columns}"
    return set_aside(found.get("conversation_id"), file, BadDialogueError(problem, row=number))


def _read_json_lines(file: Path, log: Rows) -> None:
    for number, line in _lines(read_text(file)):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(short(record))
            log.rows.append(Row(file, number, record))
        except (ValueError, RecursionError) as error:
            bad = BadDialogueError(f"expected one JSON object a line, found {_first_line(error)}", row=number)
            log.unreadable.append(set_aside(_named_in(line), file, bad))


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines: a message may hold other line separators, which JSON does not escape.
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _named_in(line: str) -> str | None:
    """The conversation of a damaged line, where it can still be read there."""
    found = re.search(r'"conversation_id"\s*:\s*("[^"\\]+"|\d+)', line)
    return found[1].strip('"') if found else None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

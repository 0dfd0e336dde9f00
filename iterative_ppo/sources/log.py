"""What all importers share: the imported log, what was set aside and why, and reading files that may be damaged."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iterative_ppo.errors import SourceError
from iterative_ppo.mdp.conversation import Adoption, Conversation, Suggestion, Turn

OPEN = "open: "
EARLY = "stands before the end"
DATA = {
    ".csv",
    ".json",
    ".jsonl",
    ".ndjson",
    ".parquet",
    ".tsv",
    ".xls",
    ".xlsx",
    ".7z",
    ".bz2",
    ".gz",
    ".tar",
    ".zip",
    ".zst",
}
"""How files end that may hold conversations, whether or not an importer reads them."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SetAside:
    """A conversation that is not imported. `row` counts from 1: an event, a dialogue or a record, by source.

    `reason` is the problem with its place in one sentence.
    """

    conversation_id: str | None
    file: Path
    row: int | None
    field: str | None
    problem: str
    reason: str
    outcome: float | None = None
    """The outcome found, where that is what it is refused for."""

    @property
    def still_open(self) -> bool:
        """Whether nothing is wrong with it: it has no outcome yet, and a later import may take it."""
        return self.problem.startswith(OPEN)

    @property
    def early(self) -> bool:
        """Whether an outcome stands in the first of its rows, so that nothing of it is left."""
        return self.problem.startswith(EARLY)

    @property
    def kind(self) -> str:
        """Its field and problem without what was found there, for counting."""
        if self.still_open:
            return f"{OPEN}not closed yet"
        what = self.problem.partition(", found")[0].partition(": expected")[0]
        return f"{self.field}: {what}" if self.field else what


@dataclass(frozen=True, slots=True)
class ImportedLog:
    """What an importer returns: the closed conversations and, for every other one, why it was set aside."""

    conversations: list[Conversation]
    set_aside: list[SetAside]


class BadDialogueError(Exception):
    """One dialogue is unusable. Importers catch it and set that dialogue aside; it never reaches a caller."""

    def __init__(
        self,
        problem: str,
        field: str | None = None,
        row: int | None = None,
        file: Path | None = None,
        outcome: float | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem, self.field, self.row, self.file, self.outcome = problem, field, row, file, outcome


@dataclass(frozen=True, slots=True)
class RawDialogue:
    """One dialogue as parsed from JSON, with the place that it came from."""

    file: Path
    row: int | None
    content: Any


@dataclass(frozen=True, slots=True)
class Said:
    """One thing said in a dialogue, with the log's own event where the importer needs it later."""

    by_customer: bool
    text: str
    time: datetime | None = None
    event: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the customer said (nothing, where the business opened) and what the business answered (perhaps nothing)."""

    customer: list[Said]
    business: list[Said]


def set_aside(conversation_id: str | None, file: Path, bad: BadDialogueError) -> SetAside:
    """The record of a bad dialogue, whose reason names file, row and field."""
    file = bad.file or file
    row = "" if bad.row is None else f", row {bad.row}"
    name = "" if bad.field is None else f", field {bad.field!r}"
    place = f"{file}{row}{name}"
    reason = f"{bad.problem} ({place})" if bad.problem.startswith(OPEN) else f"{place}: {bad.problem}"
    return SetAside(conversation_id, file, bad.row, bad.field, bad.problem, reason, bad.outcome)


def collect(dialogues: Iterable[RawDialogue], id_field: str, convert: Callable[[Any], Conversation]) -> ImportedLog:
    """Convert each dialogue; a bad one, or one whose id was seen before, is set aside and the others are kept."""
    log = ImportedLog([], [])
    seen: dict[str, Path] = {}
    for raw in dialogues:
        named = raw.content.get(id_field) if isinstance(raw.content, Mapping) else None
        name = str(named) if isinstance(named, str | int) else None
        try:
            talk = convert(raw.content)
            if talk.conversation_id in seen:
                raise BadDialogueError(f"duplicate of {name!r} in {seen[talk.conversation_id]}", id_field)
        except BadDialogueError as bad:
            bad.row = raw.row if bad.row is None else bad.row
            log.set_aside.append(set_aside(name, raw.file, bad))
            continue
        seen[talk.conversation_id] = raw.file
        log.conversations.append(talk)
    return log


def need(record: Any, path: str, kind: type | tuple[type, ...], row: int | None = None, within: str = "") -> Any:
    """The value at a dotted path, of a type. Raises BadDialogueError where a key is missing or of another type."""
    value, name = record, within + path
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise BadDialogueError("missing", name, row)
        value = value[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise BadDialogueError(f"expected {' or '.join(k.__name__ for k in kinds)}, found {short(value)}", name, row)
    if isinstance(value, str) and not encodable(value):
        raise BadDialogueError(f"expected text, found half a character in {short(value)}", name, row)
    return value


def encodable(text: str) -> bool:
    """Whether a text is Unicode: JSON escapes can hold half a surrogate pair, which no file or tokenizer takes."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def short(value: Any) -> str:
    """A value as it is shown in a reason: at most 40 characters of it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def unix_time(value: Any, field: str, row: int | None = None) -> datetime | None:
    """Seconds since 1970, a number or its text, as a time in UTC; null stays null. Raises BadDialogueError."""
    if value is None:
        return None
    try:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError
        return datetime.fromtimestamp(float(value), UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        raise BadDialogueError(f"expected seconds since 1970, found {short(value)}", field, row) from None


def exchanges(said: Iterable[Said]) -> list[Exchange]:
    """Join what one side says in a row, and pair it with the answer."""
    pairs: list[Exchange] = []
    for one in said:
        if not pairs or (one.by_customer and pairs[-1].business):
            pairs.append(Exchange([], []))
        (pairs[-1].customer if one.by_customer else pairs[-1].business).append(one)
    return pairs


def joined(said: Sequence[Said]) -> str:
    """Messages of one side as one text, a line each."""
    return "\n".join(one.text for one in said)


def turns_of(
    said: Sequence[Said], won: bool, action: Callable[[list[Said]], tuple[Suggestion, Adoption | None]]
) -> tuple[Turn, ...]:
    """Turns 1..T+1 of a dialogue with one outcome.

    Where it was won, the last thing that the customer said is terminal with o = 1, and an answer to it is left out.
    Otherwise the last row is terminal with nobody's message, and a customer message that nobody answered is left out,
    because no action was logged in that state. Raises BadDialogueError where no transition remains.
    """
    pairs = exchanges(said)
    acted = pairs[:-1] if pairs and (won or not pairs[-1].business) else pairs
    if not acted:
        raise BadDialogueError(f"no transition: nothing was answered before the end (outcome {int(won)})")
    last = pairs[-1].customer if won else said[-1:]
    end = Turn(joined(last) if won else None, (float(won),), timestamp=last[-1].time)
    return (*(_acted(pair, *action(pair.business)) for pair in acted), end)


def _acted(pair: Exchange, suggestion: Suggestion, adoption: Adoption | None) -> Turn:
    time = (pair.customer or pair.business[:1])[-1].time
    return Turn(joined(pair.customer), (0.0,), suggestion, joined(pair.business), adoption, time)


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises SourceError where it is absent, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file; check source.path") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}, byte {error.start}: expected UTF-8 text; convert the file to UTF-8") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); expected a readable file") from None
    if not text.strip():
        raise SourceError(f"{path}: the file is empty; restore it or remove it")
    return text


def read_json(path: Path) -> Any:
    """A JSON file. Raises SourceError with the line and column where it is damaged, for example truncated."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        ends = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        cut = "the file seems truncated" if ends else error.msg
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise SourceError(f"{place}: expected JSON, {cut}; restore the file or remove it") from None
    except RecursionError:
        raise SourceError(f"{path}: expected JSON of a conversation log, found one nested too deeply") from None


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """The files of a folder with one of these suffixes, in name order, but for those whose name starts with a dot.

    What else there seems to be data, a subfolder with such files too, is named in a warning. Raises SourceError where
    there are none.
    """
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is nothing"
        raise SourceError(f"{folder}: expected a folder, {found}; check source.path")
    there = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [file for file in there if file.suffix.lower() in suffixes and file.is_file()]
    if not files:
        instead = f"; found {_names(there)}; unpack or convert these, or name the subfolder" if there else ""
        raise SourceError(f"{folder}: expected files that end in {' or '.join(suffixes)}, there are none{instead}")
    left = [entry for entry in sorted({*there} - {*files}) if _seems_data(entry)]
    if left:
        ends = ", ".join(suffixes)
        _LOG.warning("%s: not read: %s; only files directly in it that end in %s are", folder, _names(left), ends)
    return files


def _seems_data(entry: Path) -> bool:
    if entry.is_dir():
        return any(file.suffix.lower() in DATA and not file.name.startswith(".") for file in entry.rglob("*"))
    return entry.suffix.lower() in DATA


def _names(entries: Sequence[Path]) -> str:
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""A team's own log with the turn table's columns: one record a turn, those of a conversation in any order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

from iterative_ppo.config import DataConfig
from iterative_ppo.errors import SourceError, did_you_mean
from iterative_ppo.mdp.conversation import REPORTED, Conversation, Turn
from iterative_ppo.mdp.turn_table import outcome_columns
from iterative_ppo.sources.log import OPEN, BadDialogueError, ImportedLog, SetAside, set_aside, short
from iterative_ppo.sources.record import (
    OF_CONVERSATION,
    OPTIONAL,
    REQUIRED,
    identity,
    number,
    refused,
    reports,
    too_early,
    turn_of,
    whole,
)
from iterative_ppo.sources.rows import Row, Rows, read_rows

Talk = tuple[list[Row], list[Turn]]
"""The records of a conversation and the turns that they say, the same number of both."""

ACTIONS = ("suggestion", "business_message")


def import_table(path: Path, outcomes: Mapping[str, float], data: DataConfig) -> ImportedLog:
    r"""Import a Parquet, CSV or JSON Lines file, or a folder of them.

    Required columns: those in `record.REQUIRED` and `outcome_<name>` of each outcome (or just `outcome`, where there is
    one; where there are both, they must agree). Optional ones have the turn table's names. Defaults:
    `suggestion_status` by the suggestion (null missing, "" is abstained), `adoption` by similarity, `customer_id` the
    conversation's id. Times are ISO 8601, in UTC where they do not say. Outcomes are numbers, true or false. A 0 in a
    conversation's last row is a report of none; null reports nothing, and `labels` decides. In CSV, quotes within a
    field are doubled, nothing between two commas is null, as is MySQL's \N, and "" is the empty text, or null where no
    text can be; some writers, pandas among them, do not tell the two apart, and then Parquet or JSON Lines is better.

    A conversation ends where its outcome is not 0, and what follows is left out (`extra["dropped_turns"]` counts it);
    or with a row whose customer_message is null; or by a silence, up to the log's newest time that is not still to
    come, that is longer than `data.outcome_window_hours`. A log without any times is taken to be past it. Others are
    set aside as "open: ...". Of several outcomes the last row that holds one ends it: what an earlier row holds is
    carried there, the last value of each outcome that is not 0, and that row is a turn like others, or left out where
    it says nothing. One that nothing can follow, since the business did not answer, ends the conversation all the same.

    Args:
        outcomes: named outcomes and their weights in R.
        data: the range of outcomes, the window and the similarity from which an answer counts as edited.

    Raises SourceError where a file or a column is missing or damaged. A bad row sets its whole conversation aside.
    """
    rows = _read(path, outcome_columns(outcomes))
    log = ImportedLog([], _one_each(rows.unreadable))
    talks = _talks(rows, outcomes, data, log)
    times = [turn.timestamp for _, turns in talks for turn in turns if turn.timestamp]
    now = datetime.now(UTC)
    newest = max((time for time in times if time <= now), default=max(times, default=None))
    for records, turns in talks:
        try:
            if any(turns[0].outcomes) and len(turns) > 1:
                raise too_early(records[0], outcomes, len(turns))
            closed = _closed(records, turns, newest, timedelta(hours=data.outcome_window_hours))
            log.conversations.append(_conversation(records, turns, closed, outcomes))
        except BadDialogueError as bad:
            log.set_aside.append(set_aside(identity(records[0], "conversation_id"), records[0].file, bad))
    return log


def _read(path: Path, columns: list[str]) -> Rows:
    if len(columns) > 1:
        return read_rows(path, [*REQUIRED, *columns], OPTIONAL)
    rows = read_rows(path, REQUIRED, [*OPTIONAL, *columns])
    named = {name for row in rows.rows for name in row.values}
    if not named & {"outcome", *columns}:
        hint = did_you_mean(columns[0], named)
        raise SourceError(f"{path}: expected a column {columns[0]!r} or 'outcome'{hint}; found {sorted(named)}")
    return rows


def _one_each(unreadable: Iterable[SetAside]) -> list[SetAside]:
    """The first problem of each conversation, and all those whose conversation is unknown."""
    first: dict[str | int, SetAside] = {}
    for place, aside in enumerate(unreadable):
        first.setdefault(place if aside.conversation_id is None else aside.conversation_id, aside)
    return list(first.values())


def _talks(rows: Rows, outcomes: Mapping[str, float], data: DataConfig, log: ImportedLog) -> list[Talk]:
    """Each conversation's records and turns; those of which a record is bad, or unreadable, are set aside."""
    spoilt = {whole(aside.conversation_id) for aside in rows.unreadable if aside.conversation_id}
    good = []
    for name, records in _grouped(rows.rows, log).items():
        if name in spoilt:
            continue
        try:
            records.sort(key=lambda row: number(row, "turn") or 0.0)
            turns = [turn_of(row, outcomes, data) for row in records]
            _check_order(records, turns)
            good.append(_to_the_last_outcome(records, turns, outcomes, data))
        except BadDialogueError as bad:
            log.set_aside.append(set_aside(name, records[0].file, bad))
    return good


def _to_the_last_outcome(
    records: list[Row], turns: list[Turn], outcomes: Mapping[str, float], data: DataConfig
) -> Talk:
    """The rows, and as turns those that hold an outcome before the last one does, which then tells of all of them.

    Where such a row says nothing it is left out, an event alone; where it can be no turn that others follow, the
    conversation ends with it, and what came before the business did anything more is its outcome too.
    """
    paid = [place for place, turn in enumerate(turns) if any(turn.outcomes)]
    if len(outcomes) == 1 or len(paid) < 2:
        return records, turns
    *before, end = paid
    events = {place for place in before if _says_nothing(records[place])}
    said, made = [place for place in range(len(turns)) if place not in events], list(turns)
    for place, following in pairwise(said):
        if place not in before:
            continue
        turn = _ordinary(records[place], outcomes, data)
        if turn is None or (turn.business_message is None and turns[following].customer_message is not None):
            end = place
            break
        made[place] = turn
    acted = (place for place in range(end + 1, len(turns)) if not _says_nothing(records[place], ACTIONS))
    found = [turn.outcomes for turn in turns[: next(acted, len(turns))]]
    last = tuple(next(filter(None, values), 0.0) for values in zip(*reversed(found), strict=True))
    made[end] = replace(turns[end], outcomes=last)
    return [records[place] for place in said], [made[place] for place in said]


def _says_nothing(row: Row, fields: Sequence[str] = ("customer_message", *ACTIONS)) -> bool:
    return all(row.values.get(field) is None for field in fields)


def _ordinary(row: Row, outcomes: Mapping[str, float], data: DataConfig) -> Turn | None:
    try:
        return turn_of(row, outcomes, data, goes_on=True)
    except BadDialogueError:
        return None


def _grouped(rows: Iterable[Row], log: ImportedLog) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        try:
            name = identity(row, "conversation_id")
            if not name:
                raise refused(row, "conversation_id", "expected an id, found none")
            groups.setdefault(name, []).append(row)
        except BadDialogueError as bad:
            log.set_aside.append(set_aside(None, row.file, bad))
    return groups


def _check_order(records: Sequence[Row], turns: Sequence[Turn]) -> None:
    latest: datetime | None = None
    for place, (row, turn) in enumerate(zip(records, turns, strict=True), start=1):
        if number(row, "turn") != place:
            found = short(row.values.get("turn"))
            raise refused(
                row, "turn", f"must count 1, 2, 3, ... without gap or repeat: expected {place}, found {found}"
            )
        if turn.timestamp and latest and turn.timestamp < latest:
            raise refused(row, "timestamp", "earlier than the turn before it")
        latest = turn.timestamp or latest
        for name in OF_CONVERSATION:
            if identity(row, name) not in (None, identity(records[0], name)):
                raise refused(row, name, "not the same as in the conversation's first row")


def _closed(records: list[Row], turns: list[Turn], newest: datetime | None, window: timedelta) -> tuple[Turn, ...]:
    """Turns 1..T+1. Raises BadDialogueError where the conversation is open, or its turns do not follow each other."""
    end = next((i for i, turn in enumerate(turns) if turn.terminal), None)
    if end is None:
        said = [*turns, _silence(records[-1], turns, newest, window)]
    elif end + 1 < len(turns) and not any(turns[end].outcomes):
        raise refused(records[end], "customer_message", 'null before the last row; a message without text is ""')
    else:
        said = turns[: end + 1]
    if len(said) == 1:
        raise refused(records[0], None, "no transition: the conversation ends in its first row")
    for row, turn, following in zip(records, said, said[1:], strict=False):
        if turn.business_message is None and following.customer_message is not None:
            problem = "null although the customer wrote again; join what the customer says in a row into one turn"
            raise refused(row, "business_message", problem)
    return tuple(said)


def _silence(row: Row, turns: Sequence[Turn], newest: datetime | None, window: timedelta) -> Turn:
    """The terminal row of a conversation that was left. Raises BadDialogueError where it is still open."""
    last = max((turn.timestamp for turn in turns if turn.timestamp), default=None)
    if newest is not None and last is None:
        raise refused(row, "timestamp", f"{OPEN}no outcome, and without a time its silence is unknown")
    if newest is not None and last is not None and newest - last <= window:
        raise refused(row, "timestamp", f"{OPEN}no outcome, and silent for {newest - last}, not longer than {window}")
    return Turn(None, (0.0,) * len(turns[-1].outcomes), timestamp=last)


def _conversation(
    records: Sequence[Row], turns: Sequence[Turn], closed: tuple[Turn, ...], outcomes: Mapping[str, float]
) -> Conversation:
    name = str(identity(records[0], "conversation_id"))
    about = {field: identity(records[0], field) for field in OF_CONVERSATION}
    customer = about.pop("customer_id") or name
    extra = {"dropped_turns": str(max(0, len(turns) - len(closed)))}
    reported = reports(records[min(len(closed), len(records)) - 1], outcomes)
    return Conversation(name, closed, customer, **about, outcome_origin=REPORTED if reported else None, extra=extra)

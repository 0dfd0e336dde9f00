"""One record of a team's own log, read as a turn; what cannot be right is refused with its file, row and field."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from iterative_ppo.config import DataConfig
from iterative_ppo.mdp.conversation import (
    ADOPTIONS,
    MISSING,
    SUGGESTION_STATUSES,
    Adoption,
    Suggestion,
    Turn,
    adoption_of,
)
from iterative_ppo.mdp.turn_table import outcome_columns
from iterative_ppo.sources.log import EARLY, BadDialogueError, encodable, short
from iterative_ppo.sources.rows import Row

REQUIRED = ("conversation_id", "turn", "customer_message", "suggestion", "business_message")
OF_CONVERSATION = ("customer_id", "business_id", "context", "policy_version", "arm", "persona")
IDS = ("conversation_id", "customer_id", "business_id")
OPTIONAL = (*OF_CONVERSATION, "suggestion_status", "adoption", "behaviour_logprob", "timestamp", "outcome")

EXACT = 2.0**53
"""From here on a float stands for several whole numbers, so it is no id."""


def turn_of(row: Row, outcomes: Mapping[str, float], data: DataConfig, goes_on: bool = False) -> Turn:
    """A record as a turn: terminal where its outcome is not 0, or where the customer said nothing any more.

    Where the conversation `goes_on` to a later outcome, it is a turn like those without one.

    Raises BadDialogueError where a field has another type, is out of its range or contradicts another.
    """
    heard, sent = text(row, "customer_message"), text(row, "business_message")
    found, time, action = _outcomes(row, outcomes, data), _time(row), _suggestion(row)
    adoption = _adoption(row, action, sent, data.edited_at_least)
    if goes_on:
        found = (0.0,) * len(found)
    if any(found):
        return Turn(heard, found, timestamp=time)
    if heard is not None:
        return Turn(heard, found, action, sent, adoption, time)
    if sent is not None or action.status != "missing":
        raise refused(row, "customer_message", 'null ends a conversation, yet something follows; write "" instead')
    return Turn(None, found, timestamp=time)


def reports(row: Row, outcomes: Mapping[str, float]) -> bool:
    """Whether a record says an outcome, be it 0: null says nothing."""
    return any(_outcome(row, column) is not None for column in _outcome_columns(row, outcomes))


def refused(row: Row, field: str | None, problem: str, outcome: float | None = None) -> BadDialogueError:
    """The error that sets aside the conversation of a record, for its `outcome` where that is out of range or place."""
    return BadDialogueError(problem, field, row.number, row.file, outcome)


def too_early(row: Row, outcomes: Mapping[str, float], rows: int) -> BadDialogueError:
    """The error where the first of a conversation's `rows` holds an outcome."""
    values = {column: _outcome(row, column) for column in _outcome_columns(row, outcomes)}
    column, found = next((column, value) for column, value in values.items() if value)
    return refused(row, column, f"{EARLY}: expected in the last row, found {found:g} in the first of {rows}", found)


def text(row: Row, field: str) -> str | None:
    """A text or null. Raises BadDialogueError for anything else."""
    value = _given(row, field)
    if value is not None and not (isinstance(value, str) and encodable(value)):
        raise refused(row, field, f"expected text or null, found {short(value)}")
    return value


def identity(row: Row, field: str) -> str | None:
    """An id, which may be logged as a number, as text. Raises BadDialogueError for anything else."""
    value = row.values.get(field)
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    found = text(row, field)
    return whole(found) if found and field in IDS else found


def whole(name: str) -> str:
    """An id without the ".0" that pandas writes after whole numbers beside nulls.

    It goes from text too: CSV has no numbers, and one customer with two names would be in both parts of the data.
    """
    return name.removesuffix(".0") if re.fullmatch(r"-?(0|[1-9]\d*)\.0", name) else name


def number(row: Row, field: str) -> float | None:
    """A finite number, or null. Raises BadDialogueError for anything else."""
    value = _unquoted(_given(row, field))
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise refused(row, field, f"expected a number, found {short(value)}")
    return found


def _given(row: Row, field: str) -> Any:
    if field in REQUIRED and field not in row.values:
        raise refused(row, field, "missing; write null where there is nothing")
    return row.values.get(field)


def _unquoted(value: Any) -> Any:
    """The value of a field that holds no text: there "" is null, as a CSV whose writer quotes all has it."""
    return None if isinstance(value, str) and not value else value


def _outcomes(row: Row, outcomes: Mapping[str, float], data: DataConfig) -> tuple[float, ...]:
    """The named outcomes, null being 0. A single one may stand in column `outcome`, as it is and not yet weighted."""
    columns = _outcome_columns(row, outcomes)
    for column in columns:
        if column not in row.values:
            raise refused(row, column, "missing; write null where there is nothing")
    found = tuple(_outcome(row, column) or 0.0 for column in columns)
    for name, column, value in zip(outcomes, columns, found, strict=True):
        low, high = data.range_of(name)
        if not low <= value <= high:
            raise refused(row, column, f"expected {low:g} to {high:g}, found {value:g}", value)
    if len(columns) == 1:
        _check_outcome(row, columns[0], found[0], *outcomes.values())
    return found


def _outcome(row: Row, column: str) -> float | None:
    """A number, which may be logged as true or false, or null. Raises BadDialogueError for anything else."""
    value = row.values.get(column)
    truth = {"true": 1.0, "false": 0.0}.get(value.strip().casefold()) if isinstance(value, str) else None
    return number(row, column) if truth is None else truth


def _check_outcome(row: Row, column: str, found: float, weight: float) -> None:
    """Column `outcome` beside that of the one outcome says the same, weighted or not."""
    said = None if column == "outcome" else _outcome(row, "outcome")
    if said is not None and not any(math.isclose(said, value, abs_tol=1e-6) for value in (found, weight * found)):
        raise refused(row, "outcome", f"contradicts {column}: expected {found:g}, found {said:g}; leave one out")


def _outcome_columns(row: Row, outcomes: Mapping[str, float]) -> list[str]:
    names = outcome_columns(outcomes)
    return [name if name in row.values or len(names) > 1 else "outcome" for name in names]


def _suggestion(row: Row) -> Suggestion:
    words, status = text(row, "suggestion"), _one_of(row, "suggestion_status", SUGGESTION_STATUSES)
    if status == "abstained" and words is None:
        words = ""
    inferred = "missing" if words is None else "suggested" if words else "abstained"
    if status not in (None, inferred):
        raise refused(row, "suggestion_status", f"{status!r} does not go with suggestion {short(words)}")
    logprob = number(row, "behaviour_logprob")
    if logprob is not None and (logprob > 0 or words is None):
        expected = "expected at most 0 (a natural logarithm), and null where no suggestion was logged"
        raise refused(row, "behaviour_logprob", f"{expected}, found {logprob:g}")
    return MISSING if words is None else Suggestion(words, "suggested" if words else "abstained", logprob)


def _adoption(row: Row, action: Suggestion, sent: str | None, edited_at_least: float) -> Adoption | None:
    """The log's own adoption or, for a text that was suggested, by similarity to what was sent."""
    logged: Adoption | None = _one_of(row, "adoption", ADOPTIONS)
    if logged is not None and (logged == "no_reply") != (sent is None):
        raise refused(row, "adoption", f"{logged!r} does not go with business_message {short(sent)}")
    if logged is not None or sent is None:
        return logged or "no_reply"
    return adoption_of(action.text or "", sent, edited_at_least) if action.status == "suggested" else None


def _one_of(row: Row, field: str, known: Sequence[str]) -> Any:
    value = _unquoted(row.values.get(field))
    if value is not None and value not in known:
        raise refused(row, field, f"expected {', '.join(known)} or null, found {short(value)}")
    return value


def _time(row: Row) -> datetime | None:
    value = _unquoted(row.values.get("timestamp"))
    if isinstance(value, pd.Timestamp):
        value = value.to_pydatetime(warn=False)  # the turn table has microseconds
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
        if time is None:
            return None
        return datetime.astimezone(time if time.tzinfo else time.replace(tzinfo=UTC), UTC)
    except (TypeError, ValueError, AttributeError, OverflowError):
        example = "expected ISO 8601 such as 2025-01-31T12:00:00Z"
        raise refused(row, "timestamp", f"{example}, found {short(value)}") from None

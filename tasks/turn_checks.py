"""What a turn table must be: expectations of its columns, and vectorised checks over a conversation's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.errors import TrainingError
from iterative_ppo.mdp.conversation import ADOPTIONS, PARTS, SUGGESTION_STATUSES, part_of
from iterative_ppo.mdp.labels import ORIGINS
from iterative_ppo.mdp.turn_table import ORIGIN, conform, outcome_columns, turn_schema

if TYPE_CHECKING:
    from great_expectations import ExpectationSuite

LEAST_LOGPROB = -1e9

OF_CONVERSATION = ("customer_id", "business_id", "context", "policy_version", "arm", "persona", "part", ORIGIN)

Checks = dict[str, np.ndarray]
"""`"field: must ..."` -> (N,) bool, True where it holds; Great Expectations sees each as a column of its own."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A turn table grouped by conversation; the frame's index keeps the row numbers of the table as given."""

    frame: pd.DataFrame
    talk: np.ndarray
    """(N,) int: which conversation."""
    place: np.ndarray
    """(N,) int: 0, 1, 2, ... within the conversation."""
    last: np.ndarray
    """(N,) bool."""
    terminal: np.ndarray
    """(N,) bool: no suggestion_status."""


def check_parts(frame: pd.DataFrame, config: Config) -> None:
    """Raise TrainingError where the fit or the evidence part is empty: a round learns from one and judges by the other.

    Who divides calls it before the division is stored, so that another setting may divide anew.
    """
    lacking = [part for part in PARTS if part not in set(frame["part"])]
    if lacking:
        count, unit = frame["conversation_id"].nunique(), f"{config.data.split_by}_id"
        raise TrainingError(
            f"none of {count} conversations is in the {lacking[0]} part, which the hash of "
            f"{unit} decides, and there are {frame[unit].nunique()}: collect more, or set another data.split_by or "
            f"data.evidence_share than {config.data.split_by} and {config.data.evidence_share:g}"
        )


def divided_as_set(frame: pd.DataFrame, config: Config) -> bool:
    """Whether each conversation is in the part that today's settings put it in."""
    ends = frame.drop_duplicates("conversation_id")
    units = ends["customer_id"]
    if config.data.split_by == "business":
        units = ends["business_id"].where(ends["business_id"].fillna("") != "", units)
    return bool((units.map(lambda unit: part_of(str(unit), config.data.evidence_share)) == ends["part"]).all())


def check_log_probs(frame: pd.DataFrame, config: Config) -> None:
    """Raise TrainingError where a log has none of the log-probs that Q's targets would need of it."""
    needed = frame.loc[frame["part"] == "fit", "behaviour_logprob"]
    if config.q.target == "retrace" and needed.isna().all():
        raise TrainingError(
            "q.target retrace weighs a log's suggestions by their behaviour_logprob, and none of its fit part has one: "
            "add them to the log, or set q.target to fqe, which needs none"
        )


def turn_suite(config: Config) -> ExpectationSuite:
    """The expectations of a turn table with its check columns; `meta` says which field and what it must do."""
    import great_expectations.expectations as gxe
    from great_expectations import ExpectationSuite

    def must(field: str, words: str) -> dict[str, Any]:
        return {"meta": {"field": field, "must": words}, "notes": f"{field}: must {words}"}

    schema = turn_schema(config.outcomes)
    ranges = [config.data.range_of(name) for name in config.outcomes]  # R, their weighted sum, has its ends from them
    named = zip(outcome_columns(config.outcomes), ranges, strict=True)
    sets = {"suggestion_status": SUGGESTION_STATUSES, "adoption": ADOPTIONS, "part": PARTS}
    expectations: list[Any] = [
        gxe.ExpectTableColumnsToMatchSet(column_set=schema.names, exact_match=False, **must("columns", "be complete")),
        *[
            gxe.ExpectColumnValuesToNotBeNull(column=f.name, **must(f.name, "not be null"))
            for f in schema
            if not f.nullable
        ],
        *[
            gxe.ExpectColumnValueLengthsToBeBetween(column=c, min_value=1, **must(c, "not be empty"))
            for c in ("conversation_id", "customer_id")
        ],
        gxe.ExpectCompoundColumnsToBeUnique(
            column_list=["conversation_id", "turn"], **must("turn", "occur once in a conversation")
        ),
        *[
            gxe.ExpectColumnValuesToBeInSet(column=c, value_set=list(known), **must(c, f"be one of {', '.join(known)}"))
            for c, known in sets.items()
        ],
        *[
            gxe.ExpectColumnValuesToBeBetween(
                column=c, min_value=low, max_value=high, **must(c, f"be from {low:g} to {high:g}")
            )
            for c, (low, high) in named
        ],
        gxe.ExpectColumnValuesToMatchRegex(
            column=ORIGIN, regex=ORIGINS, **must(ORIGIN, "be reported, rule or classifier:<version>")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="behaviour_logprob",
            min_value=LEAST_LOGPROB,
            max_value=0.0,
            **must("behaviour_logprob", "be finite and at most 0"),
        ),
    ]
    no_rows = conform(schema.empty_table().to_pandas(), config.outcomes)
    for name in checks(grouped(no_rows), config.outcomes):
        field, words = name.split(": must ")
        expectations.append(gxe.ExpectColumnValuesToBeInSet(column=name, value_set=[True], **must(field, words)))
    return ExpectationSuite("turns", expectations=expectations)


def grouped(frame: pd.DataFrame) -> Rows:
    """Bring each conversation's rows together, in table order; rows without a conversation_id make one of their own."""
    talk, _ = pd.factorize(frame["conversation_id"], use_na_sentinel=False)
    order = np.argsort(talk, kind="stable")
    talk = talk[order]
    starts = np.append(True, talk[1:] != talk[:-1])[: len(talk)]
    numbers = np.arange(len(talk))
    place = numbers - np.maximum.accumulate(np.where(starts, numbers, 0))
    rows = frame.iloc[order]
    terminal = rows["suggestion_status"].isna().to_numpy()
    return Rows(rows, talk, place, np.append(starts[1:], True)[: len(talk)], terminal)


def sound(frame: pd.DataFrame, outcomes: Mapping[str, float]) -> pd.DataFrame:
    """The rows of conversations that hold no null where none may be and pass all checks; in order, for a first use."""
    return sifted(frame, outcomes)[0]


def sifted(frame: pd.DataFrame, outcomes: Mapping[str, float]) -> tuple[pd.DataFrame, pd.Series]:
    """The rows of `sound` conversations, and what is first wrong with each other one, in words, by its id; in order."""
    rows, wrong = _wrong(frame, outcomes)
    failed = wrong.any(axis=1).to_numpy()
    names, numbers = rows.frame["conversation_id"][failed].fillna(""), rows.frame["turn"][failed]
    told = [f"turn {number}, {field}" for number, field in zip(numbers, wrong[failed].idxmax(axis=1), strict=True)]
    faults = pd.Series(told, index=names.to_numpy(dtype=object), dtype=object).groupby(level=0, sort=False).first()
    return rows.frame[~np.isin(rows.talk, rows.talk[failed])].reset_index(drop=True), faults


def _wrong(frame: pd.DataFrame, outcomes: Mapping[str, float]) -> tuple[Rows, pd.DataFrame]:
    """The rows by conversation, and (N, checks) bool where each fails."""
    rows = grouped(conform(frame, outcomes))
    filled = {
        f"{field.name}: must not be null": rows.frame[field.name].notna().to_numpy()
        for field in turn_schema(outcomes)
        if not field.nullable
    }
    return rows, ~pd.DataFrame({**filled, **checks(rows, outcomes)}, index=rows.frame.index)


def checks(rows: Rows, outcomes: Mapping[str, float]) -> Checks:
    """What no single column can tell, each field's checks in the order in which reasons are listed."""
    return {
        **_order_checks(rows),
        **_message_checks(rows),
        **_suggestion_checks(rows),
        **_outcome_checks(rows, outcomes),
        **_constancy_checks(rows),
    }


def _order_checks(rows: Rows) -> Checks:
    first, numbers = rows.place == 0, rows.frame.index.to_numpy()
    turn = rows.frame["turn"].to_numpy(dtype=float, na_value=np.nan)
    return {
        "turn: must count 1, 2, 3, ... in table order": turn == rows.place + 1,
        "conversation_id: must not return after another conversation's rows": first
        | (np.diff(numbers, prepend=0) == 1),
        "suggestion_status: must be null (terminal) in the last row": rows.terminal | ~rows.last,
        "suggestion_status: must not be null (terminal) before the last row": ~rows.terminal | rows.last,
        "timestamp: must not go back": _not_back(rows),
    }


def _not_back(rows: Rows) -> np.ndarray:
    stamp = rows.frame["timestamp"].dt.tz_localize(None).to_numpy("datetime64[us]").view("int64")  # NaT is the least
    latest = pd.Series(stamp).groupby(rows.talk).cummax().to_numpy()
    return (stamp == np.iinfo(np.int64).min) | (stamp >= latest)


def _message_checks(rows: Rows) -> Checks:
    frame, terminal = rows.frame, rows.terminal
    asked, sent = frame["customer_message"].notna().to_numpy(), frame["business_message"].notna().to_numpy()
    silent = _is(frame["adoption"], "no_reply")
    stops_next = np.append((terminal & ~asked)[1:] & ~rows.last[:-1], False)[: len(frame)]
    paid = _paid(frame)
    return {
        "customer_message: must not be null before the terminal row": asked | terminal,
        "customer_message: must be null in a terminal row without an outcome": ~(asked & terminal & ~paid),
        "business_message: must not be null unless adoption is no_reply": sent | silent | terminal,
        "adoption: must not be no_reply where a business_message was sent": ~(sent & silent),
        "adoption: must be no_reply only before a terminal row without a message": ~silent | terminal | stops_next,
    }


def _suggestion_checks(rows: Rows) -> Checks:
    frame = rows.frame
    text, status = frame["suggestion"], frame["suggestion_status"]
    null, empty = text.isna().to_numpy(), _is(text, "")
    missing = _is(status, "missing")
    checks = {
        "suggestion: must be null where suggestion_status is missing": null | ~missing,
        'suggestion: must be "" where suggestion_status is abstained': empty | ~_is(status, "abstained"),
        "suggestion: must hold text where suggestion_status is suggested": ~_is(status, "suggested") | ~(null | empty),
        "behaviour_logprob: must be null where suggestion_status is missing": _null(frame, "behaviour_logprob")
        | ~missing,
    }
    for field in ("suggestion", "business_message", "adoption", "behaviour_logprob"):
        checks[f"{field}: must be null in a terminal row"] = _null(frame, field) | ~rows.terminal
    return checks


def _outcome_checks(rows: Rows, outcomes: Mapping[str, float]) -> Checks:
    named = outcome_columns(outcomes)
    outcome = rows.frame["outcome"].to_numpy()
    total = rows.frame[named].to_numpy() @ np.array(list(outcomes.values()))
    same = np.isclose(outcome, total, rtol=1e-9, atol=1e-9) | np.isnan(outcome) | np.isnan(total)
    checks = {
        "outcome: must be the weighted sum of the named outcomes": same,
        f"{ORIGIN}: must not be null where there is an outcome": ~(_paid(rows.frame) & _null(rows.frame, ORIGIN)),
    }
    for field in ["outcome", *named]:
        value = rows.frame[field].to_numpy()
        checks[f"{field}: must be 0 before the terminal row"] = (value == 0.0) | np.isnan(value) | rows.terminal
    return checks


def _constancy_checks(rows: Rows) -> Checks:
    first = np.arange(len(rows.place)) - rows.place
    checks = {}
    for field in OF_CONVERSATION:
        code, _ = pd.factorize(rows.frame[field], use_na_sentinel=False)
        checks[f"{field}: must be the same in all rows of a conversation"] = code == code[first]
    return checks


def _paid(frame: pd.DataFrame) -> np.ndarray:
    outcomes = frame.filter(regex="^outcome").drop(columns=ORIGIN)
    return outcomes.fillna(0.0).ne(0.0).any(axis=1).to_numpy()


def _is(column: pd.Series, value: str) -> np.ndarray:
    return column.eq(value).fillna(False).to_numpy(dtype=bool)


def _null(frame: pd.DataFrame, field: str) -> np.ndarray:
    return frame[field].isna().to_numpy()

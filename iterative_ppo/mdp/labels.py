"""Where outcomes come from: as reported; where nobody reported one, by rule or by a classifier. Each label says which.

A reported outcome is never touched. A label stands where a reported one would: in the conversation's last row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd

from iterative_ppo.config import RuleConfig
from iterative_ppo.mdp.conversation import REPORTED
from iterative_ppo.mdp.turn_table import ORIGIN, named_columns, outcome_columns

RULE, CLASSIFIER = "rule", "classifier"
ORIGINS = rf"^(?:{REPORTED}|{RULE}|{CLASSIFIER}:\d+)$"
"""What `outcome_origin` holds where it is not null."""
UNREPORTED = "none"
"""What a count calls conversations that no label has."""
SIDES = {"customer": "customer_message", "business": "business_message"}


def as_reported(frame: pd.DataFrame, outcomes: Mapping[str, float]) -> pd.DataFrame:
    """Outcomes as reported, R under today's weights; a conversation that nobody reported on has none, which is 0.

    Where an outcome is above 0 although no origin is named, somebody has reported it; what is null beside it is 0.
    """
    named, labelled = frame[outcome_columns(outcomes)], frame[ORIGIN].notna()
    paid = named.fillna(0.0).ne(0.0).any(axis=1) & ~labelled
    reported = paid.groupby(frame["conversation_id"], dropna=False).transform("any").astype(bool)
    origin = frame[ORIGIN].mask(reported & ~labelled, REPORTED)
    return weighted(frame.assign(**named.where(labelled, named.fillna(0.0)), **{ORIGIN: origin}), outcomes)


def judged(
    frame: pd.DataFrame, outcomes: Mapping[str, float], rules: Mapping[str, RuleConfig] | None = None
) -> pd.DataFrame:
    """Outcomes that a policy may be judged by: as reported and, where there are rules, by rule."""
    table = as_reported(frame, outcomes)
    return with_labels(table, by_rule(table, rules), RULE, outcomes) if rules else table


def guessed(frame: pd.DataFrame) -> pd.Series:
    """(N,) bool: the rows of conversations whose outcome a classifier said."""
    return frame[ORIGIN].str.startswith(CLASSIFIER).fillna(False).astype(bool)


def without_outcome(frame: pd.DataFrame, rows: pd.Series) -> pd.DataFrame:
    """The table with outcomes of 0 in these rows.

    Args:
        rows: (N,) bool, of whole conversations.
    """
    return frame.assign(**{name: frame[name].mask(rows, 0.0) for name in ("outcome", *named_columns(frame))})


def by_rule(frame: pd.DataFrame, rules: Mapping[str, RuleConfig]) -> pd.DataFrame:
    """(C, K) what the rules say of conversations that nobody reported on, by their ids: the rule's value, or 0."""
    unknown = unreported(frame)
    found = {
        column: _matches(unknown, rule).groupby(unknown["conversation_id"], sort=False).any() * rule.value
        for column, rule in zip(outcome_columns(rules), rules.values(), strict=True)
    }
    return pd.DataFrame(found, dtype=float)


def _matches(frame: pd.DataFrame, rule: RuleConfig) -> pd.Series:
    last = np.inf if rule.last_turn is None else rule.last_turn
    turn = frame["turn"].to_numpy(dtype=float, na_value=np.nan)
    find, messages = re.compile(rule.pattern).search, frame[SIDES[rule.side]].astype(object)
    said = messages.map(lambda text: isinstance(text, str) and find(text) is not None)
    return said.astype(bool) & (rule.first_turn <= turn) & (turn <= last)


def unreported(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of conversations without any label."""
    return frame[frame[ORIGIN].isna() & frame["conversation_id"].notna()]


def with_labels(frame: pd.DataFrame, labels: pd.DataFrame, origin: str, outcomes: Mapping[str, float]) -> pd.DataFrame:
    """The table with labels in the last rows of conversations that nobody reported on, and R under today's weights.

    Args:
        labels: (C, K) values of some of the outcome columns, by conversation_id.
        origin: rule, or classifier:<version>.
    """
    ids = frame["conversation_id"]
    fresh = (frame[ORIGIN].isna() & ids.isin(labels.index)).to_numpy(dtype=bool)
    ends = fresh & ~ids.duplicated(keep="last").to_numpy()
    changed = {ORIGIN: frame[ORIGIN].mask(fresh, origin)}
    for column in labels:
        said = labels[column].reindex(ids[ends].astype(object)).to_numpy()
        values = frame[column].to_numpy(dtype=float, na_value=np.nan, copy=True)
        values[ends] = said
        changed[str(column)] = pd.Series(values, index=frame.index)
    return weighted(frame.assign(**changed), outcomes)


def weighted(frame: pd.DataFrame, outcomes: Mapping[str, float]) -> pd.DataFrame:
    """The table with R, its `outcome`, under these weights."""
    named = frame[outcome_columns(outcomes)].to_numpy(dtype=float)
    return frame.assign(outcome=named @ np.array(list(outcomes.values())))


def counts(frame: pd.DataFrame) -> dict[str, int]:
    """Conversations by the origin of their outcome, the most frequent first."""
    first = frame.drop_duplicates("conversation_id")[ORIGIN].astype(object)
    return {str(origin): int(n) for origin, n in first.fillna(UNREPORTED).value_counts().items()}


def transcripts(frame: pd.DataFrame) -> pd.Series:
    """All that was said in each conversation, by its id: a line a message, `customer: ...` or `business: ...`."""
    sides = {side: frame[column].astype(object).str.split().str.join(" ") for side, column in SIDES.items()}
    lines = pd.DataFrame({side: f"{side}: " + said for side, said in sides.items()}).stack()
    lines = lines.dropna()
    talk = frame["conversation_id"].astype(object).reindex(lines.index.get_level_values(0)).to_numpy()
    said = lines.groupby(talk, sort=False).agg("\n".join)
    return said.reindex(frame["conversation_id"].dropna().astype(object).unique(), fill_value="")

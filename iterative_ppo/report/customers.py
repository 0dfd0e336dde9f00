"""What customers and staff did in one round's conversations, by policy version and arm, from the turn table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from iterative_ppo.errors import StoreError, TurnTableError
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.evaluation.metrics import proportion_interval
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.labels import guessed, without_outcome
from iterative_ppo.report.words import LOGGED

ADOPTIONS = ("verbatim", "edited", "rejected", "none")
CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval (normal approximation)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Conversations of one policy version in one arm."""

    policy: str
    arm: str | None
    success: Arm
    adoption: Mapping[str, float] = field(default_factory=dict)
    """Shares of the suggestions that were sent verbatim, edited, rejected, or none of these; empty without any."""
    abstained: float | None = None
    """Share of turns at which the policy chose to suggest nothing."""
    turns: float | None = None
    """Business turns a conversation."""
    returned: Mean | None = None
    """Discounted return at the start of a conversation."""
    outcomes: Mapping[str, Mean] = field(default_factory=dict)
    """Each named outcome of a conversation."""

    @property
    def of_log(self) -> bool:
        """Whether its policy is a log's, which is none of ours."""
        return self.policy.split(" ")[0] == LOGGED

    @property
    def role(self) -> str:
        return CHALLENGER if self.arm == CHALLENGER else CHAMPION

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.success)


def wilson(arm: Arm) -> tuple[float, float]:
    """Wilson's 95 % interval of an arm's success rate."""
    return proportion_interval(arm.successes, arm.conversations)


def outcome_weights(file: Path) -> dict[str, float]:
    """The outcomes that a turn table names, with their weights. Raises StoreError where the file is damaged."""
    try:
        metadata = pq.read_schema(file).metadata or {}
        weights = json.loads(metadata[b"outcome_weights"])
        return {str(name): float(weight) for name, weight in weights.items()}
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"{file}: not a turn table ({_reason(error)}); restore it or remove it") from None


def read_turns(folder: Path, outcomes: Mapping[str, float] | None = None) -> pd.DataFrame | None:
    """All rows below `folder`, or None where there is no table yet. Raises StoreError for a damaged file.

    Args:
        outcomes: their weights, for tables that others have written; None means what the first one names.
    """
    files = sorted(file for file in folder.rglob("*.parquet") if not _hidden(file.relative_to(folder)))
    if not files:
        return None
    try:
        return turn_table.read(folder, outcomes or outcome_weights(files[0]))
    except TurnTableError as error:
        raise StoreError(f"{error} (below {folder})") from None


def read_returns(file: Path) -> pd.Series | None:
    """The return at the start of each conversation, by its id. None where there is no such file."""
    if not file.exists():
        return None
    try:
        table = pd.read_parquet(file, columns=["conversation_id", "turn", "return"])
        return table[table["turn"] == 1].set_index("conversation_id")["return"].astype(float)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{file}: not a table of returns ({_reason(error)}); restore it or remove it") from None


def groups(frame: pd.DataFrame, above: float, returns: pd.Series | None = None) -> tuple[Group, ...]:
    """One group a policy version and arm, the champion's first; what a classifier guessed is no outcome here.

    Args:
        above: the R above which a conversation is a success.
        returns: by id, of all outcomes; one whose outcome is none here, as a guess or a late one, is taken as 0.
    """
    frame = without_outcome(frame, guessed(frame))
    if returns is not None:
        returns = returns.where(returns.index.isin(frame["conversation_id"][frame["outcome"] != 0]), 0.0)
    parted = frame.groupby(["policy_version", "arm"], dropna=False, sort=False)
    found = [_group(_label(version), _label(arm), rows, above, returns) for (version, arm), rows in parted]
    return tuple(sorted(found, key=lambda group: (group.role != CHAMPION, group.policy, group.arm or "")))


def _label(value: object) -> str | None:
    return None if pd.isna(value) else str(value)


def _group(policy: str | None, arm: str | None, rows: pd.DataFrame, above: float, returns: pd.Series | None) -> Group:
    ends = rows[turn_table.last_rows(rows)]
    conversations = len(ends)
    status = rows["suggestion_status"]
    suggested = rows[(status == "suggested").fillna(False)]
    abstained = int((status == "abstained").sum())
    chances = len(suggested) + abstained
    return Group(
        policy=policy or "unknown",
        arm=arm,
        success=Arm(int((ends["outcome"] > above).sum()), conversations),
        adoption=_adoption(suggested),
        abstained=abstained / chances if chances else None,
        turns=int(status.notna().sum()) / conversations,
        returned=_mean(_first_returns(returns, ends)),
        outcomes={name: mean for name, column in _named(ends) if (mean := _mean(ends[column].dropna()))},
    )


def _named(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Each named outcome and its column."""
    return [(column.removeprefix(turn_table.OUTCOME_PREFIX), column) for column in turn_table.named_columns(frame)]


def _first_returns(returns: pd.Series | None, ends: pd.DataFrame) -> pd.Series:
    if returns is None:
        return pd.Series(dtype=float)
    return returns.reindex(ends["conversation_id"].astype(object)).dropna()


def _adoption(suggested: pd.DataFrame) -> dict[str, float]:
    if suggested.empty:
        return {}
    fate = suggested["adoption"].astype(object).where(suggested["adoption"].isin(ADOPTIONS[:3]), "none")
    return {name: float((fate == name).mean()) for name in ADOPTIONS}


def _mean(found: pd.Series) -> Mean | None:
    values = found.to_numpy(dtype=float)
    if not len(values):
        return None
    half = 1.96 * float(np.std(values)) / len(values) ** 0.5
    return Mean(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

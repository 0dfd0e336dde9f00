"""Conversations of an A/B test, each of the version that it was assigned to, and which of them a look counted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Counted:
    """The conversations of a test's arms that a look counted: those that began from `first` to `last`, both included.

    None where they have no timestamps: all of them had matured then.
    """

    first: pd.Timestamp | None = None
    last: pd.Timestamp | None = None

    @classmethod
    def of(cls, start: pd.Series) -> Counted:
        """Of those that began at these times."""
        return cls(start.min(), start.max()) if start.notna().any() else cls()

    def __call__(self, start: pd.Series) -> pd.Series:
        """(C,) bool: whether conversations that began at these times are among them."""
        return start.between(self.first, self.last) if self.first is not None else start.isna()

    def as_dict(self) -> dict[str, str | None]:
        """JSON-able; `from_dict` reads it."""
        return {name: None if at is None else at.isoformat() for name, at in (("from", self.first), ("to", self.last))}

    @classmethod
    def from_dict(cls, values: Mapping[str, str | None]) -> Counted:
        """Raises KeyError or ValueError where it is none."""
        first, last = (None if values[name] is None else pd.Timestamp(values[name]) for name in ("from", "to"))
        return cls(first, last)


def assigned(frame: pd.DataFrame, versions: Collection[str], window_hours: float) -> pd.DataFrame:
    """One row a conversation of one of the versions, in order of arrival, by its id.

    It is its first answerer's, which is whom it was assigned to. What a persona led is in no test.

    Returns columns version, arm, business, start, end, outcome (its R), and in_time: whether that came within the
    window, for what comes after it is no outcome.
    """
    kept = frame[frame["policy_version"].isin(list(versions)) & frame["persona"].isna()]
    table = kept.groupby("conversation_id", sort=False).agg(
        version=("policy_version", "first"),
        arm=("arm", "first"),
        business=("business_id", "first"),
        start=("timestamp", "min"),
        end=("timestamp", "max"),
        outcome=("outcome", "sum"),
    )
    lasted = table["end"] - table["start"]
    return table.assign(in_time=table["start"].isna() | (lasted <= pd.Timedelta(hours=window_hours)))

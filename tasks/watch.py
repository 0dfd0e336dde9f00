"""Watching the champion while it serves: what it was promoted on, what it did since, and the alarms of the two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.evaluation.alarms import ABSTENTION, ACCEPTANCE, LENGTH, OUTCOME, Alarm, alarms, measure
from iterative_ppo.files import write_bytes
from iterative_ppo.learning.objective import success_above
from tasks.audit import DONE, INTENT, history, record, standing
from tasks.datasets import arrived, closed, of_policy, round_folder, whole_until
from tasks.labels import judged
from tasks.state import NightState
from tasks.turn_checks import sound

EVENT = "alarm"


@dataclass(frozen=True)
class Raised:
    """The alarms about a version. `id` is the same each night until more conversations raise others."""

    version: int
    alarms: tuple[Alarm, ...]

    @property
    def id(self) -> str:
        return f"rollback of version {self.version} (alarm at {self.alarms[0].conversations} conversations)"

    def evidence(self) -> dict[str, Any]:
        return {"alarm": self.id, "alarms": [alarm.as_dict() for alarm in self.alarms]}


def keep_what_it_is_promoted_on(config: Config, round_number: int, version: int) -> Path:
    """Keep a challenger's conversations of its A/B test, measured, beside the round that made it."""
    path = _baseline(config, round_number)
    write_bytes(path, _served(config, version, [round_number + 1]).to_parquet())
    return path


def raised(config: Config, state: NightState) -> Raised | None:
    """The alarms about the champion, or None; also where it was not promoted by an A/B test of this pipeline."""
    records = history(config.data.root)
    version = standing(records).champion
    promoted_in = _promoting_round(records, version)
    if not config.alarms.enabled or version is None or promoted_in is None:
        return None
    if not _baseline(config, promoted_in).exists():
        return None
    since = _served(config, version, range(promoted_in + 1, state.gathering + 1))
    kept = pd.read_parquet(_baseline(config, promoted_in))
    before = kept.reindex(columns=since.columns)  # what an older one did not measure as today is unknown
    since = since[~since.index.isin(before.index)]
    found = alarms(_measures(before), _measures(since), config.alarms)
    return Raised(version, found) if found else None


def known(config: Config, found: Raised) -> bool:
    """Whether the alarm is in the audit trail."""
    return any(r.get("event") == EVENT and r.get("alarm") == found.id for r in history(config.data.root))


def note(config: Config, found: Raised) -> None:
    """Add the alarm to the audit trail."""
    record(config.data.root, {"event": EVENT, "version": found.version, **found.evidence()})


def _baseline(config: Config, round_number: int) -> Path:
    return round_folder(config, round_number) / "promoted_on.parquet"


def _promoting_round(records: list[dict[str, Any]], version: int | None) -> int | None:
    done = {r.get("id") for r in records if r.get("event") == DONE}
    for r in reversed(records):
        if r.get("event") == INTENT and r["kind"] == "promote" and r["to"] == version and r["id"] in done:
            number = r["evidence"].get("round")
            return None if number is None else int(number)
    return None


def _served(config: Config, version: int, rounds: Iterable[int]) -> pd.DataFrame:
    """A version's conversations of some rounds, measured: one row each by its id, in the order of service.

    Only those whose last turn is a window or longer ago: of later ones the successes are here, and not yet those that
    are left without an outcome, so any of them would look better than they are.
    """
    frames = [frame for n in rounds if (frame := arrived(config, n)) is not None]
    until = whole_until(frames, config)
    tables = [_in_order(frame, str(version), until) for frame in frames]
    sounds = [sound(judged(frame, config), config.outcomes) for frame in tables]
    found = [table for frame in sounds if len(table := _measured(frame, success_above(config)))]
    return pd.concat(found) if found else _measured(None, 0.0)


def _in_order(frame: pd.DataFrame, label: str, until: pd.Timestamp) -> pd.DataFrame:
    """A policy's rows, conversations by the time of their last turn where that is known, and then not after `until`."""
    mine = frame[of_policy(frame, label)]
    ends = closed(mine).set_index("conversation_id")["timestamp"].sort_values(kind="stable", na_position="last")
    rank = mine["conversation_id"].map({name: place for place, name in enumerate(ends.index[~(ends > until)])})
    order = np.argsort(rank.to_numpy(dtype=float), kind="stable")
    return mine.iloc[order[: rank.notna().sum()]]


def _measured(frame: pd.DataFrame | None, above: float) -> pd.DataFrame:
    if frame is None or frame.empty:
        return pd.DataFrame({name: np.zeros(0) for name in (OUTCOME, ACCEPTANCE, ABSTENTION, LENGTH)})
    return pd.DataFrame(
        measure(frame, above), index=pd.Index(frame["conversation_id"].unique(), name="conversation_id")
    )


def _measures(table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {str(name): table[name].to_numpy(dtype=float) for name in table.columns}

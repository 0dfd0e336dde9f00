"""The conversations of a round: what arrived, what was frozen as its dataset, and who may train on which rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.labels import weighted

LOGGED = "logged"


@dataclass(frozen=True)
class Dataset:
    """A round's frozen, validated, versioned turn table."""

    round_number: int
    path: Path
    md5: str

    def read(self, config: Config) -> pd.DataFrame:
        """Its rows, R under today's weights, which may be others than when it was frozen."""
        return weighted(turn_table.read(self.path, config.outcomes), config.outcomes)

    def blocks(self, config: Config) -> Iterator[pd.DataFrame]:
        """The same, some conversations at a time (turn_table.blocks)."""
        for block in turn_table.blocks(self.path, config.outcomes):
            yield weighted(block, config.outcomes)


def round_folder(config: Config, round_number: int) -> Path:
    return config.data.root / "rounds" / f"{round_number:04d}"


def turns_folder(config: Config, round_number: int) -> Path:
    return config.data.root / "turns" / f"round={round_number:04d}"


def inbox(config: Config) -> Path:
    """Where traffic and importers leave turn tables: whole Parquet files, taken up by the next night."""
    return config.data.root / "inbox"


def tables_in(folder: Path) -> list[Path]:
    """The files of a folder that a night takes for turn tables."""
    return sorted(file for file in folder.glob("*.parquet") if file.is_file() and not file.name.startswith("."))


def arrived(config: Config, round_number: int) -> pd.DataFrame | None:
    """All rows that have arrived for a round, as they came; None where nothing has."""
    folder = round_folder(config, round_number) / "arrived"
    if not folder.exists() or not any(folder.glob("*.parquet")):
        return None
    return turn_table.read(folder, config.outcomes)


def frozen_conversations(config: Config, round_number: int) -> list[str]:
    """Ids of the conversations of a round's frozen dataset; none where it is not here."""
    folder = turns_folder(config, round_number)
    found = pd.read_parquet(folder, columns=["conversation_id"]) if folder.exists() else None
    return [] if found is None else found["conversation_id"].astype(str).unique().tolist()


def trained_on_before(config: Config, ids: Iterable[str], before: int) -> tuple[str, int] | None:
    """A conversation that is in the dataset of a round before some round, and that round's number; None is good."""
    wanted = set(ids)
    for number in range(before):
        for name in frozen_conversations(config, number):
            if name in wanted:
                return name, number
    return None


def write_once(path: Path, frame: pd.DataFrame, config: Config) -> Path:
    """Write a turn table."""
    turn_table.write(frame, path, config.outcomes)
    return path


def served_by(frame: pd.DataFrame, label: str) -> pd.Series:
    """(N,) bool: the rows of one policy version's conversations, whatever persona led them.

    A log is one policy's, whatever versions it names: pi_0 is cloned from all of it.
    """
    if label == LOGGED:
        return pd.Series(True, index=frame.index)
    return (frame["policy_version"] == label).fillna(False).astype(bool)


def of_policy(frame: pd.DataFrame, label: str) -> pd.Series:
    """(N,) bool: the rows of one policy version's own conversations, which no persona led; of a log all rows."""
    served = served_by(frame, label)
    return served if label == LOGGED else served & frame["persona"].isna()


def closed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a conversation: its last, which holds the outcome."""
    return frame[turn_table.last_rows(frame)]


def whole_until(frames: Sequence[pd.DataFrame], config: Config) -> pd.Timestamp:
    """When the last turn of a conversation must be for all of then to be here: by the newest time in the traffic.

    A success is here when it comes, a conversation that is left only after a window of silence. NaT without any time.
    """
    times = pd.concat([frame["timestamp"] for frame in frames]) if frames else pd.Series(dtype="datetime64[us, UTC]")
    newest = times[times <= pd.Timestamp.now("UTC")].max()
    return newest - pd.Timedelta(hours=config.data.outcome_window_hours)


def arm(frame: pd.DataFrame, label: str, above: float = 0.0) -> Arm:
    """Successes (R above what `success_above` says) among a policy version's closed conversations."""
    ends = closed(frame)
    ends = ends[served_by(ends, label)]
    return Arm(int((ends["outcome"] > above).sum()), len(ends))


def datasets_before(config: Config, round_number: int, count: int) -> list[Dataset]:
    """Up to `count` earlier rounds' datasets, newest first."""
    numbers = range(round_number - 1, max(-1, round_number - 1 - count), -1)
    return [Dataset(n, turns_folder(config, n), "") for n in numbers if turns_folder(config, n).exists()]

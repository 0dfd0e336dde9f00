"""The conversations of a round: what arrived, what was frozen as its dataset, and who may train on which rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import time

import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.errors import StoreError
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.files import content_hash
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.labels import weighted
from tasks import notify

log = logging.getLogger("iterative_ppo.datasets")
LOGGED = "logged"
SETTLED_SECONDS = 3600
"""A damaged file that was written to since may be somebody's unfinished one."""


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


def take_up(config: Config, round_number: int) -> list[Path]:
    """Move what lies in the inbox to the round that gathers it (a rename each, so nothing is lost or taken twice).

    Another file under a name that was taken before gets its content's hash for a second name. One that was taken
    already under another name or by an earlier round, to the letter, goes to quarantine instead; so does a damaged one,
    with an alarm, once nobody can be writing it any more. Hidden files are somebody's unfinished ones, and stay.
    """
    target = round_folder(config, round_number) / "arrived"
    for file in tables_in(inbox(config)):
        damage = _damage(file)
        if damage and time() - file.stat().st_mtime < SETTLED_SECONDS:
            log.warning("inbox: %s; perhaps it is being written, so it stays until it is an hour old", damage)
            continue
        content = content_hash(file)
        aside = config.data.root / "quarantine" / "inbox" / f"{file.stem}-{content}.parquet"
        if damage:
            place = aside
        elif (taken := _taken_before(config, round_number, file, content)) is not None:
            place = aside
            log.warning("inbox: %s is %s once more; it is set aside as %s", file.name, taken, place)
        else:
            place = target / file.name
            if place.exists() and content_hash(place) != content:
                place = target / f"{file.stem}-{content}.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
        if damage:
            said = f"{damage}; it is set aside as {aside}: deliver it again"
            log.warning("inbox: %s", said)
            notify.tell(config, "alarm", f"{file.name} arrived damaged", said)
    return tables_in(target)


def _damage(file: Path) -> str | None:
    try:
        turn_table.check_file(file)
    except StoreError as error:
        if getattr(error.__context__, "errno", None):  # the disk or a permission, not the file
            raise
        return " ".join(str(error).split())
    return None


def tables_in(folder: Path) -> list[Path]:
    """The files of a folder that a night takes for turn tables."""
    return sorted(file for file in folder.glob("*.parquet") if file.is_file() and not file.name.startswith("."))


def _taken_before(config: Config, round_number: int, file: Path, content: str) -> Path | None:
    """What was taken that is the same file, if any; not what has its name in this round, whose place it may take."""
    size, own = file.stat().st_size, round_folder(config, round_number) / "arrived" / file.name
    taken = (one for k in range(round_number + 1) for one in tables_in(round_folder(config, k) / "arrived"))
    same = (one for one in taken if one != own and one.stat().st_size == size)
    return next((one for one in same if content_hash(one) == content), None)


def here_already(config: Config) -> set[str]:
    """Ids of the conversations that lie in the inbox, or that a round has gathered."""
    arrivals = (config.data.root / "rounds").glob("[0-9]*/arrived")
    found: set[str] = set()
    for file in (file for folder in (inbox(config), *arrivals) for file in tables_in(folder)):
        with suppress(StoreError):  # somebody may be writing it; whoever takes it up says what is wrong with it
            found |= turn_table.ids_in(file)
    return found


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

"""What arrives: whole Parquet files in the inbox, taken up by the next night, each conversation once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from time import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from iterative_ppo.config import Config
from iterative_ppo.errors import StoreError, TurnTableError
from iterative_ppo.files import content_hash, write_bytes
from iterative_ppo.mdp import turn_table
from tasks import notify
from tasks.datasets import frozen_conversations, inbox, round_folder, tables_in, turns_folder

log = logging.getLogger("iterative_ppo.inbox")
SETTLED_SECONDS = 3600
"""A damaged file that was written to since may be somebody's unfinished one."""


def take_up(config: Config, round_number: int) -> list[Path]:
    """Move what lies in the inbox to the round that gathers it (a rename each, so nothing is lost or taken twice).

    Another file under a name that was taken before gets its content's hash for a second name. To quarantine go a file
    that was taken already under another name or by an earlier round, to the letter; the conversations of any that are
    here already, so that the first that came of each stands; one that is no turn table, with an alarm; and a damaged
    one likewise, once nobody can be writing it any more. Rows that are out of order are put into it. Hidden files are
    somebody's unfinished ones, and stay.
    """
    target, waiting = round_folder(config, round_number) / "arrived", tables_in(inbox(config))
    here = _held(config) if waiting else set[str]()
    for file in waiting:
        damage = _damage(file)
        if damage and time() - file.stat().st_mtime < SETTLED_SECONDS:
            log.warning("inbox: %s; perhaps it is being written, so it stays until it is an hour old", damage)
            continue
        content = content_hash(file)
        aside = config.data.root / "quarantine" / "inbox" / f"{file.stem}-{content}.parquet"
        rows = damage or _read(file, config)
        if isinstance(rows, str):
            _move(file, aside)
            said = f"{rows}; it is set aside as {aside}: deliver it again, mended"
            log.warning("inbox: %s", said)
            notify.tell(config, "alarm", f"{file.name} arrived damaged", said)
        elif (taken := _taken_before(config, round_number, file, content)) is not None:
            log.warning("inbox: %s is %s once more; it is set aside as %s", file.name, taken, aside)
            _move(file, aside)
        else:
            _take(file, rows, target, content, aside, here)
            here |= set(rows["conversation_id"].dropna())
    return tables_in(target)


def here_already(config: Config) -> set[str]:
    """Ids of the conversations that lie in the inbox, or that a round has."""
    return _ids(tables_in(inbox(config))) | _held(config)


def _held(config: Config) -> set[str]:
    """Ids of a frozen round's conversations, and of what others gather: what was quarantined may come again, mended."""
    found: set[str] = set()
    for folder in sorted((config.data.root / "rounds").glob("[0-9]*")):
        frozen = turns_folder(config, int(folder.name)).exists()
        found |= set(frozen_conversations(config, int(folder.name))) if frozen else _ids(tables_in(folder / "arrived"))
    return found


def _take(file: Path, rows: pd.DataFrame, target: Path, content: str, aside: Path, here: set[str]) -> None:
    """Move a file of these rows to its round, in order, but for those of conversations that are here already."""
    place, order = target / file.name, _order(rows)
    taken = place.exists() and content_hash(place) == content
    if place.exists() and not taken:
        place = target / f"{file.stem}-{content}.parquet"
    ids = rows["conversation_id"].iloc[order].astype(object)
    known = np.zeros(len(ids), dtype=bool) if taken else ids.isin(here).to_numpy(dtype=bool)
    if not known.any() and (np.diff(order) == 1).all():
        _move(file, place)
        return
    table = pq.read_table(file, partitioning=None)
    for some, where in ((order[~known], place), (order[known], aside)):
        if len(some):
            sink = pa.BufferOutputStream()
            pq.write_table(table.take(some), sink, compression="zstd", write_page_checksum=True)
            write_bytes(where, sink.getvalue().to_pybytes())
    file.unlink()
    if not (repeated := set(ids[known])):
        return
    log.warning(
        "inbox: %d of the conversations of %s are here already, the first is %r; they are set aside as %s, and "
        "what came first of each stands: deliver a conversation once it is closed, and once",
        len(repeated),
        file.name,
        min(repeated),
        aside,
    )


def _order(rows: pd.DataFrame) -> np.ndarray:
    """(N,) places of the rows in order: conversations as they come, each with its turns counting up."""
    turn = rows["turn"].to_numpy(dtype=float, na_value=np.inf)
    return np.lexsort((turn, pd.factorize(rows["conversation_id"])[0]))


def _move(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    file.replace(place)


def _damage(file: Path) -> str | None:
    try:
        turn_table.check_file(file)
    except StoreError as error:
        if getattr(error.__context__, "errno", None):  # the disk or a permission, not the file
            raise
        return " ".join(str(error).split())
    return None


def _read(file: Path, config: Config) -> pd.DataFrame | str:
    """The rows of a file that is not damaged, or what it lacks for a turn table of these outcomes."""
    try:
        return turn_table.read(file, config.outcomes)
    except (TurnTableError, StoreError) as error:
        return " ".join(str(error).split())


def _taken_before(config: Config, round_number: int, file: Path, content: str) -> Path | None:
    """What was taken that is the same file, if any; not what has its name in this round, whose place it may take."""
    size, own = file.stat().st_size, round_folder(config, round_number) / "arrived" / file.name
    same = (one for one in _gathered(config) if one != own and one.stat().st_size == size)
    return next((one for one in same if content_hash(one) == content), None)


def _gathered(config: Config) -> list[Path]:
    """What the rounds so far have taken up."""
    arrivals = sorted((config.data.root / "rounds").glob("[0-9]*/arrived"))
    return [file for folder in arrivals for file in tables_in(folder)]


def _ids(files: Iterable[Path]) -> set[str]:
    found: set[str] = set()
    for file in files:
        with suppress(StoreError):  # somebody may be writing it; whoever takes it up says what is wrong with it
            found |= turn_table.ids_in(file)
    return found

"""The audit trail: `audit.jsonl`, lines are only ever added, each forced to disk; and what it says stands.

A move of the champion opens with a record that holds an `id` (an intent, or a move that somebody made outside) and
ends with `done` or `abandoned` under the same id. Other records tell what is no move: experiments, alarms, refusals.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from iterative_ppo.errors import StoreError

INTENT, MOVED, REFUSED = "intent", "moved outside", "refused outside"
OPENINGS = (INTENT, MOVED, REFUSED)
DONE, ABANDONED = "done", "abandoned"
LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Standing:
    """Who speaks by the trail, and who spoke before.

    line: the champions in their order, the last one speaks. Left out are versions that were rolled back, and those
        that a rollback or a refusal passed over because they no longer load.
    """

    line: tuple[int, ...] = ()
    rolled_back: frozenset[int] = frozenset()

    @property
    def champion(self) -> int | None:
        return self.line[-1] if self.line else None

    @property
    def earlier(self) -> tuple[int, ...]:
        """The champions before this one, latest first, each once."""
        return tuple(dict.fromkeys(number for number in reversed(self.line) if number != self.champion))

    def after(self, move: Mapping[str, Any]) -> Standing:
        """What stands once a move is done."""
        source, to, kind = move["from"], move["to"], kind_of(move)
        line, rolled_back = self.line, self.rolled_back
        if not line and source is not None:
            line = (source,)
        if kind == "rollback":
            line, rolled_back = tuple(n for n in line if n != source), rolled_back | {source}
        if kind in ("rollback", REFUSED):
            line = line[: len(line) - line[::-1].index(to)] if to in line else ()
        if to is not None and to not in line[-1:]:
            line = (*line, to)
        return replace(self, line=line, rolled_back=rolled_back)


def kind_of(move: Mapping[str, Any]) -> str:
    """promote, rollback, moved outside or refused outside."""
    return str(move.get("kind", move["event"]))


def standing(records: Sequence[Mapping[str, Any]]) -> Standing:
    """What the moves that were done amount to."""
    done = {record.get("id") for record in records if record.get("event") == DONE}
    stands = Standing()
    for record in records:
        if record.get("event") in OPENINGS and record["id"] in done:
            stands = stands.after(record)
    return stands


def audit_file(data_root: Path) -> Path:
    return data_root / "audit.jsonl"


def append(data_root: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Add a record, dated, and return it. The caller holds the lock.

    What a killed writer left of a last line becomes a record of its own, so that every whole line is JSON.

    Raises StoreError where the record is not JSON or the disk refuses; then nothing was added.
    """
    dated = {**record, "at": datetime.now(UTC).isoformat(timespec="milliseconds")}
    path = audit_file(data_root)
    try:
        whole, torn = _split(path)
        added = b"".join(_line(one) for one in ([_torn(torn)] if torn else []) + [dated])
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.lseek(handle, len(whole), os.SEEK_SET)
            while added:
                added = added[os.write(handle, added) :]
            os.fsync(handle)
        except OSError:  # half a record on a full disk is none
            os.ftruncate(handle, len(whole))
            os.pwrite(handle, torn, len(whole))
            raise
        finally:
            os.close(handle)
    except (OSError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: cannot be added to ({error}); nothing was changed") from None
    return dated


def record(data_root: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """As `append`, for who does not hold the lock."""
    with locked(data_root):
        return append(data_root, entry)


def history(data_root: Path) -> list[dict[str, Any]]:
    """The audit trail, oldest first: intents, and by their ids what became of them.

    A last line that a kill tore is reported as `{"event": "torn", "text": ...}`. Raises StoreError for other damage.
    """
    path = audit_file(data_root)
    whole, torn = _split(path)
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise StoreError(f"{path}: line {number} is damaged; restore the file from a backup") from None
    return [*records, _torn(torn)] if torn else records


def open_intent(data_root: Path) -> dict[str, Any] | None:
    """The move that was begun and not ended, if any."""
    records = history(data_root)
    ended = {record.get("id") for record in records if record.get("event") in (DONE, ABANDONED)}
    begun = [record for record in records if record.get("event") in OPENINGS and record.get("id") not in ended]
    return begun[-1] if begun else None


@contextmanager
def locked(data_root: Path) -> Iterator[None]:
    """Hold the trail and the aliases.

    Raises StoreError where another process holds them for 30 seconds, or the folder cannot be written to.
    """
    lock = FileLock(data_root / "registry.lock", timeout=LOCK_SECONDS)
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise StoreError(f"{data_root}: another promotion or rollback has run for {LOCK_SECONDS:g} seconds") from None
    except OSError as error:
        raise StoreError(f"{data_root}: cannot be written to ({error}); nothing was changed") from None
    try:
        yield
    finally:
        lock.release()


def _split(path: Path) -> tuple[bytes, bytes]:
    """Whole lines, and what follows the last line's end."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b"", b""
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _torn(text: bytes) -> dict[str, Any]:
    return {"event": "torn", "text": text.decode(errors="replace")}

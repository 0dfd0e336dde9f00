"""The audit trail of promotions and rollbacks: `audit.jsonl`, lines are only ever added, each forced to disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iterative_ppo.errors import StoreError


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
        finally:
            os.close(handle)
    except (OSError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: cannot be added to ({error}); nothing was changed") from None
    return dated


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
    ended = {record.get("id") for record in records if record.get("event") in ("done", "abandoned")}
    begun = [record for record in records if record.get("event") == "intent" and record.get("id") not in ended]
    return begun[-1] if begun else None


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

"""Files that are written whole or not at all, and the fingerprints that name their content."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iterative_ppo.errors import StoreError


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: a reader, or a kill, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. Raises ValueError on NaN, which JSON does not know."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON. Raises StoreError, naming the file and the place, where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: not found") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: not valid JSON ({error}); restore it or remove it") from None


def read_settings(path: Path, known: int) -> dict[str, Any]:
    """Read a JSON object whose `format` is at most `known`. Raises StoreError."""
    values = read_json(path)
    written = values.get("format", 0) if isinstance(values, dict) else None
    if not isinstance(written, int):
        raise StoreError(f"{path}: expected a JSON object whose format is a number; restore it")
    if written > known:
        raise StoreError(f"{path}: format {written}, this program knows up to {known}; install a newer one")
    settings: dict[str, Any] = values
    return settings


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` that becomes `path` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        draft.chmod(0o755)
        yield draft
        if not path.exists():
            draft.replace(path)
        elif not _exchange(draft, path):
            _replace_in_two_steps(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step: Linux's renameat2 with RENAME_EXCHANGE. False where there is no such thing."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _replace_in_two_steps(draft: Path, path: Path) -> None:
    """Elsewhere: an error puts the old directory back, a kill between the steps leaves it in `.<name>.old.*`."""
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    path.replace(old / "content")
    try:
        draft.replace(path)
    except BaseException:
        (old / "content").replace(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def fingerprint(*values: Any) -> str:
    """A short, stable hash of JSON-able values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def content_hash(path: Path, *leave_out: str) -> str:
    """A short hash of a file, or of all files below a directory (but `leave_out` in it) with their names."""
    if not path.exists():
        raise StoreError(f"{path}: not found")
    digest = hashlib.sha256()
    left_out = {path / name for name in leave_out}
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p not in left_out)
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as source:
            while block := source.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]

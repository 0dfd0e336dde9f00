"""Data versions with DVC, in process: each round's turns become one pointer file, and come back from the remote by it.

The data root is a DVC repository of its own, without SCM. DVC refuses .dvc files that git ignores, and the data root is
ignored; so pointers travel with MLflow runs, nothing here is ever committed, and all works outside git just the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from filelock import FileLock, Timeout
from prefect import task
from prefect.cache_policies import NO_CACHE

from iterative_ppo.config import Config
from iterative_ppo.errors import StoreError
from iterative_ppo.files import write_bytes
from tasks.mlflow_store import shown

REMOTE = "store"
LOCK_SECONDS = 600.0
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
NEW_CONFIG = b"[core]\n    no_scm = True\n    analytics = False\n    check_update = False\n"
IGNORE = b"""\
# DVC looks at the turns alone; dot files inside a round are leftovers of a killed write.
/*
!/turns
!/.restore
/turns/*/.*
"""


@dataclass(frozen=True)
class DatasetVersion:
    """A round's turns, named by content: `md5` as DVC writes it (it ends in `.dir`)."""

    path: Path
    md5: str
    dvc_file: Path
    rows: int
    files: int


@dataclass(frozen=True)
class VersionedRound:
    """What a round's pointer file says, and whether its turns lie in the data root now."""

    round_number: int
    md5: str
    size: int
    files: int
    dvc_file: Path
    present: bool


def ensure_repository(root: Path, remote: str | None = None) -> None:
    """Make `root` a DVC repository whose default remote is `remote` (None: `<root>/remote`).

    Does nothing where it is one already, other than to set the remote in `.dvc/config.local`. Two processes may call it
    at once. Raises StoreError where DVC does not accept the settings or another process holds the lock too long.
    """
    with _locked(root.absolute()), _plain_errors(f"DVC repository {root}"):
        _prepare(root.absolute(), remote)


def version(round_number: int, config: Config) -> DatasetVersion:
    """Put a round's turns under DVC and push them to the remote; cheap, and the same md5, when repeated.

    Raises StoreError where the round has no Parquet files or one is damaged, or where the remote cannot be reached.
    """
    place, pointer = _place(round_number, config)
    rows, files = _count(place)
    to = _remote_url(config.data.root.absolute(), config.data.remote)
    with _repository(config, pointer, f"pushing {place.name} to {to}") as repo:
        (stage,) = repo.add(str(place))
        repo.push([str(pointer)])
        _push_lost(repo, stage.outs[0])
    return DatasetVersion(place, _read(pointer)["md5"], pointer, rows, files)


def checkout(round_number: int, config: Config, dvc_file: Path | None = None) -> Path:
    """Bring a round's turns back, as its pointer (or `dvc_file`, say from an MLflow run) says, and return their folder.

    The round appears whole or stays as it was. Raises StoreError where there is no pointer, the remote lacks an object,
    or the folder holds files that were never versioned and would be lost.
    """
    place, pointer = _place(round_number, config)
    source = dvc_file or pointer
    if not source.is_file():
        known = ", ".join(str(one.round_number) for one in rounds(config)) or "none"
        raise StoreError(f"{source}: no such pointer, so round {round_number} cannot be restored (versioned: {known})")
    wanted = _read(source)
    if wanted["path"] != place.name:
        raise StoreError(f"{source}: is a pointer to {wanted['path']}, expected one to {place.name}")
    content = source.read_bytes()
    with _repository(config, pointer, f"restoring {place.name} ({wanted['md5']})") as repo:
        if not _current(repo, place, pointer, wanted):
            _restore(repo, place, content)
        write_bytes(pointer, content)
    return place


def rounds(config: Config) -> list[VersionedRound]:
    """The versioned rounds, in order, read from their pointers alone. Raises StoreError where one is damaged."""
    found = []
    for pointer in sorted(_place(0, config)[0].parent.glob("round=*.dvc")):
        out, place = _read(pointer), pointer.with_suffix("")
        number = int(place.name.removeprefix("round="))
        found.append(VersionedRound(number, out["md5"], out["size"], out["nfiles"], pointer, place.is_dir()))
    return found


def _place(round_number: int, config: Config) -> tuple[Path, Path]:
    turns = config.data.root.absolute() / "turns"
    return turns / f"round={round_number:04d}", turns / f"round={round_number:04d}.dvc"


def _count(place: Path) -> tuple[int, int]:
    files = sorted(place.rglob("*.parquet"))
    if not files:
        raise StoreError(f"{place}: no Parquet files there to version; collect or check out the round first")
    rows = 0
    for file in files:
        try:
            rows += pq.read_metadata(file).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreError(f"{file}: not a readable Parquet file ({error})") from None
    return rows, len(files)


def _read(pointer: Path) -> dict[str, Any]:
    try:
        (out,) = yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"]
        return {
            "md5": str(out["md5"]),
            "path": str(out["path"]),
            "size": int(out["size"]),
            "nfiles": int(out["nfiles"]),
        }
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError):
        raise StoreError(f"{pointer}: not a whole DVC pointer to a folder; version the round again") from None


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".versioning.lock", timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise StoreError(f"{root}: another process has used the data versions for {LOCK_SECONDS:g} seconds") from None


@contextmanager
def _plain_errors(doing: str) -> Iterator[None]:
    """DVC's exceptions as StoreError, in one line, without the colours that they carry on a terminal."""
    from dvc.exceptions import DvcException
    from dvc_objects.errors import ObjectDBError, ObjectFormatError
    from dvc_objects.fs.errors import AuthError, RemoteMissingDepsError

    try:
        yield
    except (
        DvcException,
        ObjectDBError,
        ObjectFormatError,
        AuthError,
        RemoteMissingDepsError,
        ImportError,
        OSError,
    ) as error:
        raise StoreError(shown(f"{doing}: {' '.join(COLOUR.sub('', str(error)).split())}")) from error


@contextmanager
def _repository(config: Config, pointer: Path, doing: str) -> Iterator[Any]:
    root = config.data.root.absolute()
    with _locked(root), _plain_errors(doing):
        _prepare(root, config.data.remote)
        from dvc.repo import Repo
        from dvc.scm import SCM

        _quieten()
        _tidy(root, pointer)
        rounds(config)  # DVC reads all pointers, and names none that is damaged
        with Repo(str(root), scm=SCM(str(root), no_scm=True)) as repo:
            yield repo


def _tidy(root: Path, pointer: Path) -> None:
    """Remove what a killed process left: DVC would stumble over it for ever, and under our lock it is nobody's."""
    (root / ".dvc" / "tmp" / "rwlock").unlink(missing_ok=True)
    shutil.rmtree(root / ".restore", ignore_errors=True)
    try:
        _read(pointer)
    except (StoreError, OSError):
        pointer.unlink(missing_ok=True)


def _prepare(root: Path, remote: str | None) -> None:
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.config import Config as DvcConfig

    folder = root / ".dvc"
    for file, content in {folder / "config": NEW_CONFIG, root / ".dvcignore": IGNORE}.items():
        if not file.exists():
            write_bytes(file, content)
    settings = DvcConfig(str(folder))
    core = {"remote": REMOTE, "site_cache_dir": str(folder / "tmp" / "site")}
    url = _remote_url(root, remote)
    if core.items() <= settings["core"].items() and settings["remote"].get(REMOTE, {}).get("url") == url:
        return
    with settings.edit("local") as local:
        local["core"].update(core)
        local["remote"].setdefault(REMOTE, {}).update(url=url, verify=True)


def _quieten() -> None:
    """DVC speaks to a person at a terminal: spinners, bars and tracebacks. Here its errors are raised, and enough."""
    from dvc.ui import ui

    for name in ("dvc", "dvc_data", "dvc_objects"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ui.error_console.quiet = True


def _push_lost(repo: Any, out: Any) -> None:
    """Push files that the remote lost: DVC takes a folder's listing there as proof that all its files are there."""
    names = [hashed.value for _, _, hashed in out.get_obj()]
    cache = repo.cache.local
    repo.cloud.get_remote_odb(command="push").add([cache.oid_to_path(name) for name in names], cache.fs, names)


def _remote_url(root: Path, remote: str | None) -> str:
    remote = os.environ.get("IPPO_DATA_REMOTE") or remote
    if not remote:
        return str(root / "remote")
    return remote if "://" in remote else str(Path(remote).expanduser().absolute())


def _current(repo: Any, place: Path, pointer: Path, wanted: dict[str, Any]) -> bool:
    if not place.is_dir() or not pointer.exists() or _read(pointer)["md5"] != wanted["md5"]:
        return False
    (out,) = repo.stage.load_one(str(pointer)).outs
    return not out.changed_checksum()


def _restore(repo: Any, place: Path, pointer: bytes) -> None:
    """Check out beside the turns, then move into place, so that a kill never leaves half a round."""
    draft = place.parents[1] / ".restore"
    target = draft / f"{place.name}.dvc"
    write_bytes(target, pointer)
    try:
        _check_out(repo, target)
        _refuse_loss(repo, place)
        place.parent.mkdir(exist_ok=True)
        if place.exists():
            place.replace(draft / "replaced")
        (draft / place.name).replace(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_out(repo: Any, target: Path) -> None:
    from dvc.exceptions import CheckoutError, DownloadError

    try:
        repo.fetch([str(target)])
        repo.checkout([str(target)], force=True)
    except (CheckoutError, DownloadError):
        url, md5 = repo.config["remote"][REMOTE]["url"], _read(target)["md5"]
        raise StoreError(
            f"{target.stem} ({md5}): {shown(url)} lacks some of its files, or they are damaged there"
        ) from None


def _refuse_loss(repo: Any, place: Path) -> None:
    cache = repo.cache.local
    for file in sorted(p for p in place.rglob("*.parquet")):
        with file.open("rb") as source:
            if not cache.exists(hashlib.file_digest(source, "md5").hexdigest()):
                raise StoreError(f"{file}: was never versioned and would be lost; version its round or move it away")


version_round = task(name="version", cache_policy=NO_CACHE, persist_result=False)(version)
checkout_round = task(name="checkout", cache_policy=NO_CACHE, persist_result=False)(checkout)

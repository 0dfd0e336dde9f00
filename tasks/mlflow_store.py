"""Opening the MLflow store: a SQLite file, another database or a server; its faults as one line each."""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from iterative_ppo.config import TrackingConfig
from iterative_ppo.errors import StoreError

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK_SECONDS = 120.0
REACH_SECONDS = 5.0
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
SCHEMES = ("sqlite", *PORTS, "http", "https", "databricks")
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # a minute: a server may restart; the default is four
}


def open_store(config: TrackingConfig) -> tuple[str, str]:
    """The store's URI, absolute, and the experiment's id; a local store and the experiment are made where missing.

    The environment's MLFLOW_TRACKING_URI wins. Raises StoreError where the store is damaged, of another schema, locked
    or out of reach, or where the experiment was deleted or has lost its artifacts.
    """
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    uri = _resolved(os.environ.get("MLFLOW_TRACKING_URI") or config.uri)
    with locked(uri), _opening(f"tracking store {shown(uri)}"):
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        if is_sqlite(uri):
            _initialise(_file(uri))
        else:
            _reach(uri)
            _drive(uri)
        return uri, _experiment(client_of(uri), config.experiment, config.artifacts.absolute(), uri)


@lru_cache(maxsize=8)
def client_of(uri: str) -> MlflowClient:
    """The client of a store, made once."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """Hold a local store, so that nobody else looks for a thing and then makes it too. Other stores have no lock."""
    lock: AbstractContextManager[Any] = nullcontext()
    if is_sqlite(uri):
        file = _file(uri)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"tracking store {file}: {error.strerror}: {error.filename}") from None
        lock = FileLock(file.with_name(f".{file.name}.lock"), timeout=LOCK_SECONDS)
    try:
        with lock:
            yield
    except Timeout:
        raise StoreError(f"{shown(uri)}: another process has held the store for {LOCK_SECONDS:g} seconds") from None


@contextmanager
def plain_errors(doing: str) -> Iterator[None]:
    """MLflow's, the database's and the network's exceptions as StoreError, in one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise StoreError(f"{doing}: {_one_line(error)}") from error


def local_path(location: str) -> Path | None:
    """The folder that an artifact location names, or None where it is not on this machine."""
    parts = urlsplit(location)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(location)


def is_sqlite(uri: str) -> bool:
    return uri.startswith("sqlite:")


def shown(uri: str) -> str:
    """The URI, or a sentence with URIs, without passwords: before the host, or among the settings after a `?`."""
    return re.sub(r"(?<!sqlite)(://[^\s?]*)\?\S+", r"\1?***", re.sub(r"//[^@/]*@", "//***@", uri))


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split()).partition(" [SQL:")[0]
    found = re.search(r"(?:found version |identified by ')(\w+)", said)
    if not found:
        return said[:400]
    from mlflow import __version__

    return (
        f"its schema ({found[1]}) is not that of the installed MLflow {__version__}; install the MLflow that wrote it "
        "or, where that was an older one, take a copy and run `mlflow db upgrade <uri>`"
    )


@contextmanager
def _opening(doing: str) -> Iterator[None]:
    from alembic.util.exc import CommandError

    with plain_errors(doing):
        try:
            yield
        except (CommandError, ImportError, sqlite3.Error) as error:
            raise StoreError(f"{doing}: {_one_line(error)}") from error


def _resolved(uri: str) -> str:
    """A SQLite file by its absolute path, so that a later change of directory changes nothing."""
    scheme = uri.partition("://")[0].partition("+")[0]
    if scheme not in SCHEMES:
        raise StoreError(f"tracking.uri {shown(uri)!r}: expected sqlite:///FILE, a database or a server (http://...)")
    if scheme != "sqlite":
        return uri
    file, mark, settings = uri.partition(":///")[2].partition("?")
    if not file or file == ":memory:":
        raise StoreError(f"tracking.uri {uri!r}: runs must outlive the process; name a file, sqlite:///FILE")
    return f"sqlite:///{Path(file).absolute()}{mark}{settings}"


def _file(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def _initialise(file: Path) -> None:
    """Build a fresh store beside its place: a kill among the migrations would leave one that never opens again."""
    if file.exists() and (not file.is_file() or file.stat().st_size):
        _check(file)
        return
    draft = file.with_name(f".{file.name}.draft")
    for leftover in file.parent.glob(f"{draft.name}*"):
        leftover.unlink()
    client_of(f"sqlite:///{draft}").search_experiments(max_results=1)
    draft.replace(file)


def _check(file: Path) -> None:
    """Look first: MLflow retries for minutes to open a file that cannot be opened, and fills any database that can."""
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True)) as database:
        tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
    if tables and "alembic_version" not in tables:
        raise StoreError(f"{file}: a database, but not MLflow's; name another file in tracking.uri")


def _reach(uri: str) -> None:
    """Ask once, where MLflow itself would try for minutes; any answer will do."""
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            import requests

            requests.get(uri, timeout=REACH_SECONDS)
        elif parts.hostname:
            port = parts.port or PORTS.get(parts.scheme.partition("+")[0], 443)
            socket.create_connection((parts.hostname, port), timeout=REACH_SECONDS).close()
    except OSError as error:
        reason = type(error).__name__
        raise StoreError(f"tracking store {shown(uri)}: cannot be reached ({reason}); is it running?") from None


def _drive(uri: str) -> None:
    """Raises StoreError where the driver of a database is not installed."""
    if uri.startswith(("http", "databricks")):
        return
    from sqlalchemy import make_url

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        raise StoreError(
            f"tracking store {shown(uri)}: its driver {error.name or error} is not installed; install it, that of "
            "PostgreSQL by `pip install -c constraints.txt -e '.[postgres]'`, or name one that is (dialect+driver://...)"
        ) from None


def _experiment(client: MlflowClient, name: str, artifacts: Path, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if not uri.startswith(("http", "databricks")):
            artifacts.mkdir(parents=True, exist_ok=True)
            location = artifacts.as_uri()
        return client.create_experiment(name, artifact_location=location)
    if found.lifecycle_stage != "active":
        where = f"MLFLOW_TRACKING_URI={shlex.quote(shown(uri))}"  # else it looks in the working folder
        raise StoreError(
            f"experiment {name!r} was deleted; run `{where} mlflow experiments restore -x {found.experiment_id}`"
        )
    there = local_path(found.artifact_location)
    if there is not None and not there.is_dir():
        raise StoreError(f"experiment {name!r} keeps its artifacts in {there}, which is gone; bring that folder back")
    return found.experiment_id
